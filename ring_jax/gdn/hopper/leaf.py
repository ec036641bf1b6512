"""Inverses of the 16 x 16 diagonal blocks of I - N, each inside one warp.

Blocks of 8 by forward substitution in float32, two at a time and row by row: X_i += N_ij X_j for all i > j once row j is
done. Two blocks are joined by products of 8 x 8 matrices in float16 (mma.sync): the block below them is X_22 N_21 X_11. A thread
of a warp holds the rows g and g + 8 and the columns 2 q, 2 q + 1 and those + 8 of its block (g = lane / 4, q = lane mod 4),
which is `Layout.WGMMA`; rows and factors travel by shuffles.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from ring_jax.gdn.inverse import unit_lower_inverse
from ring_jax.mosaic import compat
from ring_jax.mosaic.fragments import array_of_pairs, constant

LEAF = 16
_WGMMA = plgpu.Layout.WGMMA


def leaf_inverses(strict: jax.Array) -> jax.Array:
    """The block diagonal of (I - block)^-1 for the 16 x 16 diagonal blocks of a strictly lower [64, 64], zero elsewhere."""
    if compat.interpreting():
        blocks = [unit_lower_inverse(-strict[i : i + LEAF, i : i + LEAF]) for i in range(0, 64, LEAF)]
        return jax.scipy.linalg.block_diag(*blocks)

    @plgpu.inline_mgpu(arg_types=(_WGMMA,), return_type=plgpu.ShapeDtypeStruct((64, 64), jnp.float32, layout=_WGMMA))
    def invert(_, strict):
        return _invert(strict)

    return invert(strict)


def joined_blocks(strict: jax.Array, size: int) -> jax.Array:
    """The `size` x `size` blocks below the diagonal in each pair of diagonal blocks of a 16-bit [64, 64], else zero."""
    if compat.interpreting():
        row, column = (jax.lax.broadcasted_iota(jnp.int32, strict.shape, i) // size for i in range(2))
        return jnp.where((row % 2 == 1) & (column == row - 1), strict, jnp.zeros_like(strict))

    @plgpu.inline_mgpu(arg_types=(_WGMMA,), return_type=plgpu.ShapeDtypeStruct((64, 64), strict.dtype, layout=_WGMMA))
    def select(_, strict):
        warp = arith.andi(arith.shrui(mgpu.thread_idx(), constant(5)), constant(3))
        pairs = list(strict.registers.flat)
        zero = llvm.mlir_zero(pairs[0].type)
        chosen = []
        for i, pair in enumerate(pairs):
            block = i // 2 * 8 // size
            if block % 2:
                chosen.append(zero)
            else:  # a warp has 16 rows
                own = arith.cmpi(arith.CmpIPredicate.eq, arith.shrui(warp, constant(size // 32)), constant(block + 1))
                chosen.append(arith.select(own, pair, zero))
        return array_of_pairs(chosen, (64, 64))

    return select(strict)


def _invert(strict: Any) -> Any:
    f32 = ir.F32Type.get()
    zero, one = (arith.constant(f32, ir.FloatAttr.get(f32, x)) for x in (0.0, 1.0))
    thread = mgpu.thread_idx()
    lane, warp = arith.andi(thread, constant(31)), arith.andi(arith.shrui(thread, constant(5)), constant(3))
    group, quarter = arith.shrui(lane, constant(2)), arith.andi(lane, constant(3))
    in_warp = [arith.cmpi(arith.CmpIPredicate.eq, warp, constant(w)) for w in range(4)]
    elements = [llvm.extractelement(pair, constant(i)) for pair in strict.registers.flat for i in range(2)]

    def of_warp(half_column, half_row, column):
        """Entry of the warp's own diagonal block."""
        choices = [elements[(2 * w + half_column) * 4 + half_row * 2 + column] for w in range(4)]
        chosen = choices[3]
        for w in range(3):
            chosen = arith.select(in_warp[w], choices[w], chosen)
        return chosen

    diagonal = [[of_warp(i, i, c) for c in range(2)] for i in range(2)]
    below = [of_warp(0, 1, c) for c in range(2)]
    first = arith.shli(quarter, constant(1))
    unit = [
        arith.select(arith.cmpi(arith.CmpIPredicate.eq, group, arith.addi(first, constant(c))), one, zero)
        for c in range(2)
    ]
    x = [list(unit), list(unit)]
    own_row = arith.andi(lane, constant(28))
    for j in range(7):
        holder, source = arith.addi(own_row, constant(j // 2)), arith.addi(quarter, constant(4 * j))
        for i in range(2):
            factor = _shuffle(diagonal[i][j % 2], holder)
            done = [_shuffle(x[i][c], source) for c in range(2)]
            x[i] = [_multiply_add(factor, done[c], x[i][c]) for c in range(2)]
    joined = _product(_halves(x[1]), _transposed(_halves(_product(_halves(below), _transposed(_halves(x[0]))))))
    x = [[x[0], joined], [[zero, zero], x[1]]]
    registers = []
    for block in range(8):
        w, c8 = divmod(block, 2)
        for half in range(2):
            pair = llvm.mlir_undef(ir.VectorType.get((2,), f32))
            for c in range(2):
                value = arith.select(in_warp[w], x[c8][half][c], zero)
                pair = llvm.insertelement(pair, value, constant(c))
            registers.append(pair)
    return array_of_pairs(registers, (64, 64))


def _shuffle(x: ir.Value, lane: ir.Value) -> ir.Value:
    text = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
    return llvm.inline_asm(ir.F32Type.get(), [x, lane], text, "=f,f,r", has_side_effects=True)


def _halves(pair: list[ir.Value]) -> ir.Value:
    """Two float32 as one register of float16."""
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [pair[1], pair[0]], "cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f")


def _transposed(x: ir.Value) -> ir.Value:
    text = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
    return llvm.inline_asm(ir.IntegerType.get_signless(32), [x], text, "=r,r", has_side_effects=True)


def _product(a: ir.Value, b_transposed: ir.Value) -> list[ir.Value]:
    """A B of 8 x 8 matrices: the lower half of a product of 16 rows whose upper half is zero."""
    f32 = ir.F32Type.get()
    text = (
        "{ .reg .b32 zero; .reg .f32 upper0, upper1; mov.b32 zero, 0; "
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {upper0, upper1, $0, $1}, {zero, $2}, {$3}, "
        "{0f00000000, 0f00000000, 0f00000000, 0f00000000}; }"
    )
    struct = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * 2), [a, b_transposed], text, "=f,=f,r,r", has_side_effects=True
    )
    return [llvm.extractvalue(f32, struct, [i]) for i in range(2)]


def _multiply_add(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return llvm.inline_asm(ir.F32Type.get(), [a, b, c], "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f")
