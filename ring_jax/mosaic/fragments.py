"""Tiles between shared memory and registers, as they are or transposed on the way (ldmatrix, stmatrix, and their .trans).

Arrays are in `Layout.WGMMA`, 64 rows: warp w holds rows 16 w ... 16 w + 15. Tiles are in `compat.tiled_smem` layout
with one tile of 64 columns: 8 rows of 128 bytes are 1024 bytes, and 16-byte piece p of row r lies at p ^ (r % 8). None of this
can be interpreted, so in interpret mode these are plain loads and stores. `store` is here because an assignment to a
reference also reads what was there.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
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


def load(smem: Any) -> jax.Array:
    """A 16-bit tile [64, 64] in shared memory, or 64 columns of a wider one."""
    if compat.interpreting():
        return smem[...]

    @plgpu.inline_mgpu(arg_types=(_SMEM,), return_type=plgpu.ShapeDtypeStruct(smem.shape, smem.dtype, layout=_WGMMA))
    def read(_: Any, smem: Any) -> Any:
        pair = ir.VectorType.get((2,), ir.MemRefType(smem.type).element_type)
        registers = [llvm.bitcast(pair, x) for piece in range(4) for x in _load_piece(smem, piece)]
        return array_of_pairs(registers, (64, 64))

    return read(smem)


def store(smem: Any, x: jax.Array) -> None:
    """Writes a 16-bit array [64, n], n a multiple of 64, to tiles."""
    if compat.interpreting():
        smem[...] = x
        return

    @plgpu.inline_mgpu(arg_types=(_SMEM, _WGMMA))
    def write(_: Any, smem: Any, x: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        registers = [llvm.bitcast(i32, pair) for pair in x.registers.flat]
        base, offsets = _base(smem), _row_offsets(smem)
        for i in range(0, x.shape[1] // 16):
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [base, offsets[i % 4], *registers[4 * i : 4 * i + 4]],
                "{ .reg .u32 at; add.u32 at, $0, $1; "
                f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [at + {i // 4 * 1024}], {{$2, $3, $4, $5}}; }}",
                "r,r,r,r,r,r",
                has_side_effects=True,
            )

    write(smem, x)


def store_transposed(smem: Any, x: jax.Array) -> None:
    """Writes the transpose of a 16-bit array [64, n] to a tile [n, 64]."""
    if compat.interpreting():
        smem[...] = x.T
        return

    @plgpu.inline_mgpu(arg_types=(_SMEM, _WGMMA))
    def write(_: Any, smem: Any, x: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        registers = [llvm.bitcast(i32, pair) for pair in x.registers.flat]
        for i, address in enumerate(_column_addresses(smem, x.shape[1])):
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [address, *registers[4 * i : 4 * i + 4]],
                "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};",
                "r,r,r,r,r",
                has_side_effects=True,
            )

    write(smem, x)


def store_column_sums(sums: Any, x: jax.Array) -> None:
    """Writes the sums of each warp's 16 rows of a float32 [64, 64] to sums [4, 64], plain shared memory."""
    if compat.interpreting():
        sums[...] = x.reshape(4, 16, 64).sum(1)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _WGMMA))
    def write(_: Any, sums: Any, x: Any) -> None:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        thread = mgpu.thread_idx()
        lane, warp = arith.andi(thread, constant(31)), arith.andi(arith.shrui(thread, constant(5)), constant(3))
        elements = [llvm.extractelement(pair, constant(i)) for pair in x.registers.flat for i in range(2)]
        # For each 8 columns the thread holds two of row g and two of row g + 8, g = lane / 4.
        groups = [
            [arith.addf(*(elements[4 * n + i + 2 * half] for half in range(2))) for i in range(2)] for n in range(8)
        ]
        # Lanes 16, 8 and 4 apart give each other half of what is left, so that lane 4 g + i ends with the columns 8 g + 2 i.
        for distance in (16, 8, 4):
            upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, constant(distance)), constant(0))
            half = len(groups) // 2
            kept = []
            for low, high in zip(groups[:half], groups[half:], strict=True):
                sent = [arith.select(upper, a, b) for a, b in zip(low, high, strict=True)]
                own = [arith.select(upper, b, a) for a, b in zip(low, high, strict=True)]
                text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;"
                got = [llvm.inline_asm(f32, [a], text, "=f,f", has_side_effects=True) for a in sent]
                kept.append([arith.addf(a, b) for a, b in zip(own, got, strict=True)])
            groups = kept
        address = llvm.ptrtoint(i32, mgpu_utils.memref_ptr(sums))
        address = arith.addi(address, arith.addi(arith.shli(warp, constant(8)), arith.shli(lane, constant(3))))
        text = "st.shared.v2.f32 [$0], {$1, $2};"
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, [address, *groups[0]], text, "r,f,f", has_side_effects=True)

    write(sums, x)


def store_dot(sums: Any, a: Any, b: Any) -> None:
    """Writes the 128 threads' shares of sum(a b) in float32 to sums [2, 64], plain shared memory; a and b are 16-bit tiles."""
    if compat.interpreting():
        products = a[...].astype("float32") * b[...].astype("float32")
        sums[...] = products.reshape(2, 64, -1).sum(2)
        return
    blocks = [(pl.ds(i, 64), pl.ds(j, 64)) for i in range(0, a.shape[0], 64) for j in range(0, a.shape[1], 64)]
    tiles = [x.at[block] for block in blocks for x in (a, b)]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[_SMEM] * len(tiles)))
    def write(_: Any, sums: Any, *tiles: Any) -> None:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        kind = str(ir.MemRefType(tiles[0].type).element_type)
        zero = arith.constant(f32, ir.FloatAttr.get(f32, 0.0))
        totals = [zero] * 8
        for left, right in zip(tiles[::2], tiles[1::2], strict=True):
            for piece in range(4):
                for i, pair in enumerate(zip(_load_piece(left, piece), _load_piece(right, piece), strict=True)):
                    for j, (x, y) in enumerate(zip(*(_widened(register, kind) for register in pair), strict=True)):
                        n = 2 * i + j
                        totals[n] = llvm.inline_asm(f32, [x, y, totals[n]], "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f")
        while len(totals) > 1:
            totals = [arith.addf(x, y) for x, y in zip(totals[::2], totals[1::2], strict=True)]
        address = llvm.ptrtoint(i32, mgpu_utils.memref_ptr(sums))
        address = arith.addi(address, arith.shli(arith.andi(mgpu.thread_idx(), constant(127)), constant(2)))
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, [address, totals[0]], "st.shared.f32 [$0], $1;", "r,f", has_side_effects=True)

    write(sums, *tiles)


def _widened(pair: ir.Value, kind: str) -> list[ir.Value]:
    """Two 16-bit numbers of a register as float32."""
    f32 = ir.F32Type.get()
    if kind == "bf16":
        bits = (arith.shli(pair, constant(16)), arith.andi(pair, constant(-65536)))
        return [llvm.bitcast(f32, x) for x in bits]
    pair = llvm.bitcast(ir.VectorType.get((2,), ir.F16Type.get()), pair)
    return [arith.extf(f32, llvm.extractelement(pair, constant(i))) for i in range(2)]


def hand_over(smem: Any, x: jax.Array) -> None:
    """Writes a float32 [64, 64] to plain shared memory [64, 64] for `take_over` of another warpgroup, in their own order."""
    if compat.interpreting():
        smem[...] = x
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _WGMMA))
    def write(_: Any, smem: Any, x: Any) -> None:
        void = ir.Type.parse("!llvm.void")
        elements = [llvm.extractelement(pair, constant(i)) for pair in x.registers.flat for i in range(2)]
        address = _thread_address(smem)
        for i in range(0, len(elements), 4):
            text = f"st.shared.v4.f32 [$0 + {i * 512}], {{$1, $2, $3, $4}};"
            llvm.inline_asm(void, [address, *elements[i : i + 4]], text, "r,f,f,f,f", has_side_effects=True)

    write(smem, x)


def take_over(smem: Any) -> jax.Array:
    """What `hand_over` left."""
    if compat.interpreting():
        return smem[...]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((64, 64), "float32", layout=_WGMMA)
    )
    def read(_: Any, smem: Any) -> Any:
        f32 = ir.F32Type.get()
        result, pair_type = llvm.StructType.get_literal([f32] * 4), ir.VectorType.get((2,), f32)
        address, pairs = _thread_address(smem), []
        for i in range(0, 32, 4):
            text = f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4 + {i * 512}];"
            struct = llvm.inline_asm(result, [address], text, "=f,=f,=f,=f,r", has_side_effects=True)
            for j in (0, 2):
                pair = llvm.mlir_undef(pair_type)
                for k in range(2):
                    pair = llvm.insertelement(pair, llvm.extractvalue(f32, struct, [j + k]), constant(k))
                pairs.append(pair)
        return array_of_pairs(pairs, (64, 64))

    return read(smem)


def _thread_address(smem: ir.Value) -> ir.Value:
    base = llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu_utils.memref_ptr(smem))
    return arith.addi(base, arith.shli(arith.andi(mgpu.thread_idx(), constant(127)), constant(4)))


def _base(smem: ir.Value) -> ir.Value:
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu_utils.memref_ptr(smem))


def _load_piece(smem: ir.Value, piece: int) -> list[ir.Value]:
    """Columns 16 piece to 16 piece + 15 of a tile of 64: four registers."""
    i32 = ir.IntegerType.get_signless(32)
    struct = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * 4),
        [_base(smem), _row_offsets(smem)[piece]],
        "{ .reg .u32 at; add.u32 at, $4, $5; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [at]; }",
        "=r,=r,=r,=r,r,r",
        has_side_effects=True,
    )
    return [llvm.extractvalue(i32, struct, [i]) for i in range(4)]


def _row_offsets(smem: ir.Value) -> list[ir.Value]:
    """This lane's place in a tile for each four 8 x 8 matrices: two of 8 rows after each other, for two times 8 columns.

    Added to a tile's address only where it is used, so that loops keep four numbers and not four for every tile.
    """
    thread = mgpu.thread_idx()
    lane, warp = arith.andi(thread, constant(31)), arith.andi(arith.shrui(thread, constant(5)), constant(3))
    row = arith.andi(lane, constant(7))
    tile = arith.addi(arith.shli(warp, constant(1)), arith.andi(arith.shrui(lane, constant(3)), constant(1)))
    strides, _ = ir.MemRefType(smem.type).get_strides_and_offset()
    offset = arith.addi(arith.muli(tile, constant(strides[0] * 2)), arith.shli(row, constant(7)))
    second = arith.shrui(lane, constant(4))
    pieces = [arith.shli(arith.xori(arith.addi(second, constant(2 * i)), row), constant(4)) for i in range(4)]
    return [arith.addi(offset, piece) for piece in pieces]


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
