"""Some rows of a tile: cleared in shared memory, stored from registers. In interpret mode plain assignments."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from ring_jax.mosaic import compat
from ring_jax.mosaic.fragments import constant

_SMEM = plgpu.RefType((plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))
_THREADS = 128


def clear_rows(smem: Any, first: jax.Array) -> None:
    """Zeroes the rows from `first` on of a 16-bit tile [n, m] in `compat.tiled_smem` layout, for TMA's and wgmma's eyes too."""
    if compat.interpreting():
        rows = jax.lax.broadcasted_iota(jnp.int32, smem.shape, 0)
        smem[...] = jnp.where(rows < first, smem[...], jnp.zeros((), smem.dtype))
        plgpu.commit_smem()
        return

    @plgpu.inline_mgpu(arg_types=(_SMEM, plgpu.Layout.WG_SPLAT))
    def clear(_: Any, smem: ir.Value, first: Any) -> None:
        row_tiles, column_tiles, *_ = ir.MemRefType(smem.type).shape
        base = llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu_utils.memref_ptr(smem))
        thread = arith.andi(mgpu.thread_idx(), constant(_THREADS - 1))
        # 16 bytes a thread in the order of memory: a swizzle moves them within their row of 128 bytes only.
        for i in range(row_tiles * column_tiles * 64 // _THREADS):
            piece = arith.addi(thread, constant(i * _THREADS))
            row = arith.andi(arith.shrui(piece, constant(3)), constant(7))
            tile = arith.divui(arith.shrui(piece, constant(6)), constant(column_tiles))
            row = arith.addi(row, arith.shli(tile, constant(3)))
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [row, first.registers[()], arith.addi(base, arith.shli(piece, constant(4)))],
                "{ .reg .pred p; .reg .b32 z; mov.b32 z, 0; setp.ge.s32 p, $0, $1; @p st.shared.v4.b32 [$2], {z, z, z, z}; }",
                "r,r,r",
                has_side_effects=True,
            )

    clear(smem, first)
    plgpu.commit_smem()


def store_rows(gmem: Any, x: jax.Array) -> None:
    """Writes the first rows of a float32 array [64, n] in WGMMA layout to all of a contiguous array [rows, n]."""
    rows, columns = gmem.shape
    if compat.interpreting():
        gmem[...] = x[:rows]
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def write(_: Any, gmem: ir.Value, x: Any) -> None:
        thread = mgpu.thread_idx()
        lane, warp = arith.andi(thread, constant(31)), arith.andi(arith.shrui(thread, constant(5)), constant(3))
        first = arith.addi(arith.shli(warp, constant(4)), arith.shrui(lane, constant(2)))
        i64 = ir.IntegerType.get_signless(64)
        base = llvm.ptrtoint(i64, mgpu_utils.memref_ptr(gmem))
        pairs = list(x.registers.flat)
        for half in range(2):
            row = arith.addi(first, constant(8 * half))
            branch = scf.IfOp(arith.cmpi(arith.CmpIPredicate.slt, row, constant(rows)))
            with ir.InsertionPoint(branch.then_block):
                at = arith.addi(
                    arith.muli(row, constant(columns)), arith.shli(arith.andi(lane, constant(3)), constant(1))
                )
                address = arith.addi(base, arith.extui(i64, arith.shli(at, constant(2))))
                for i, pair in enumerate(pairs[half::2]):
                    llvm.inline_asm(
                        ir.Type.parse("!llvm.void"),
                        [address, *(llvm.extractelement(pair, constant(j)) for j in range(2))],
                        f"st.global.v2.f32 [$0 + {32 * i}], {{$1, $2}};",
                        "l,f,f",
                        has_side_effects=True,
                    )
                scf.YieldOp([])

    write(gmem, x)
