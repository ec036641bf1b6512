"""Tiles between shared memory and registers, as they are or transposed on the way (ldmatrix, stmatrix, and their .trans).

Arrays are in `Layout.WGMMA`, 64 rows: warp w holds rows 16 w ... 16 w + 15. Tiles are in `compat.tiled_smem` layout
with one tile of 64 columns: 8 rows of 128 bytes are 1024 bytes, and 16-byte piece p of row r lies at p ^ (r % 8). None of this
can be interpreted, so in interpret mode these are plain loads and stores. `store` is here because an assignment to a
reference also reads what was there.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from ring_jax.mosaic import compat

_WGMMA = plgpu.Layout.WGMMA
_SMEM = plgpu.RefType((plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def load_transposed(smem: Any) -> jax.Array:
    """The transpose of a 16-bit tile [n, 64] in shared memory, n a multiple of 16."""
    if compat.interpreting():
        return smem[...].T
    rows, columns = smem.shape

    @plgpu.inline_mgpu(
        arg_types=(_SMEM,), return_type=plgpu.ShapeDtypeStruct((columns, rows), smem.dtype, layout=_WGMMA)
    )
    def load(_: Any, smem: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.MemRefType(smem.type).element_type)
        result = llvm.StructType.get_literal([i32] * 4)
        registers = []
        for address in _column_addresses(smem, rows):
            text = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];"
            struct = llvm.inline_asm(result, [address], text, "=r,=r,=r,=r,r", has_side_effects=True)
            registers += [llvm.bitcast(pair, llvm.extractvalue(i32, struct, [i])) for i in range(4)]
        return array_of_pairs(registers, (columns, rows))

    return load(smem)


def store(smem: Any, x: jax.Array) -> None:
    """Writes a 16-bit array [64, n], n a multiple of 64, to tiles."""
    if compat.interpreting():
        smem[...] = x
        return
    _store(smem, x, "", _row_addresses)


def store_transposed(smem: Any, x: jax.Array) -> None:
    """Writes the transpose of a 16-bit array [64, n] to a tile [n, 64]."""
    if compat.interpreting():
        smem[...] = x.T
        return

    _store(smem, x, ".trans", _column_addresses)


def _store(smem: Any, x: jax.Array, form: str, addresses: Callable[[Any, int], list[ir.Value]]) -> None:
    @plgpu.inline_mgpu(arg_types=(_SMEM, _WGMMA))
    def write(_: Any, smem: Any, x: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        registers = [llvm.bitcast(i32, pair) for pair in x.registers.flat]
        for i, address in enumerate(addresses(smem, x.shape[1])):
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [address, *registers[4 * i : 4 * i + 4]],
                f"stmatrix.sync.aligned.m8n8.x4{form}.shared.b16 [$0], {{$1, $2, $3, $4}};",
                "r,r,r,r,r",
                has_side_effects=True,
            )

    write(smem, x)


def _row_addresses(smem: ir.Value, columns: int) -> list[ir.Value]:
    """This lane's address for each four 8 x 8 matrices: two of 8 rows after each other, for two times 8 columns."""
    thread = mgpu.thread_idx()
    lane, warp = arith.andi(thread, constant(31)), arith.andi(arith.shrui(thread, constant(5)), constant(3))
    row = arith.andi(lane, constant(7))
    tile = arith.addi(arith.shli(warp, constant(1)), arith.andi(arith.shrui(lane, constant(3)), constant(1)))
    base = llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu_utils.memref_ptr(smem))
    tile = arith.muli(tile, constant(columns // 64 * 1024))
    base = arith.addi(base, arith.addi(tile, arith.shli(row, constant(7))))
    second = arith.shrui(lane, constant(4))
    pieces = [arith.shli(arith.xori(arith.addi(second, constant(2 * i)), row), constant(4)) for i in range(4)]
    return [arith.addi(base, arith.addi(piece, constant(1024 * i))) for i in range(columns // 64) for piece in pieces]


def _column_addresses(smem: ir.Value, rows: int) -> list[ir.Value]:
    """This lane's address for each four 8 x 8 matrices: two of 8 columns after each other, for two times 8 rows."""
    thread = mgpu.thread_idx()
    lane, warp = arith.andi(thread, constant(31)), arith.andi(arith.shrui(thread, constant(5)), constant(3))
    row = arith.andi(lane, constant(7))
    piece = arith.addi(arith.shli(warp, constant(1)), arith.andi(arith.shrui(lane, constant(3)), constant(1)))
    offset = arith.addi(
        arith.addi(arith.shli(arith.shrui(lane, constant(4)), constant(10)), arith.shli(row, constant(7))),
        arith.shli(arith.xori(piece, row), constant(4)),
    )
    base = llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu_utils.memref_ptr(smem))
    base = arith.addi(base, offset)
    return [arith.addi(base, constant(2048 * i)) for i in range(rows // 16)]


def constant(i: int) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, i))


def array_of_pairs(pairs: list[ir.Value], shape: tuple[int, int]) -> Any:
    """An array in WGMMA layout from its vectors of two elements, in the order of wgmma's fragments."""
    array = np.empty(len(pairs), dtype=object)
    array[:] = pairs
    array = array.reshape(mgpu.WGMMA_LAYOUT.registers_shape(tuple(shape)))
    return mgpu.FragmentedArray(_registers=array, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)
