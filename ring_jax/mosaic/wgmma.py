"""Hopper matrix products (wgmma) as PTX.

`plgpu.wgmma` cannot express what an overlapped softmax needs: it moves a register operand at the moment of issue, and ptxas
then serialises whatever product is already in flight (C7513); it also spends one move a register on zeroing an accumulator
that the first instruction could overwrite, and takes key tiles in steps of 64 only. Here one asm block issues S = Q K^T
and acc += P V back to back, and `wait` ties the registers to the instruction that makes them readable.

Operands in shared memory are in `compat.tiled_smem` layout: 8 x 64 tiles of 1024 bytes, 128-byte swizzle (PTX
ISA, "Asynchronous warpgroup level matrix shared memory layout"). A register array in `Layout.WGMMA` lists its registers in the order
of wgmma's own fragments. None of this can be interpreted, so in interpret mode the same products are `lax.dot`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from ring_jax.mosaic import compat

_WGMMA = plgpu.Layout.WGMMA
_SMEM = plgpu.RefType((plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))
_TILE_BYTES = 1024  # 8 rows of 64 16-bit elements
_K = 16  # contraction of one instruction


def start(q_smem: Any, k_smem: Any, acc: jax.Array, p: jax.Array, v_smem: Any) -> tuple[jax.Array, jax.Array]:
    """Issues scores = Q K^T, then acc += P V; `wait(1, scores)`, then `wait(0, acc)` before reading them.

    p must not be computed before the previous product that read it is done: its registers are the same.
    """
    scores, acc = start_products((None, q_smem, k_smem), (acc, p, v_smem))
    return scores, acc


def start_scores(q_smem: Any, k_smem: Any) -> jax.Array:
    """Issues Q K^T; `wait` before reading it."""
    return start_products((None, q_smem, k_smem))[0]


def start_values(acc: jax.Array, p: jax.Array, v_smem: Any) -> jax.Array:
    """Issues acc + P V; `wait` before reading it."""
    return start_products((acc, p, v_smem))[0]


def start_products(*products: tuple[Any, ...]) -> tuple[jax.Array, ...]:
    """Issues A B^T for each (None, a, b) and acc + A B for each (acc, a, b), in order; `wait` before reading them.

    a is an array or a slice of a Ref of 64 rows, b a slice of a Ref. A fourth item says whether B is transposed,
    where that is the other way round: (None, a, b, False) is A B, (acc, a, b, True) is acc + A B^T.
    """
    products = tuple((*product, product[0] is None) if len(product) == 3 else product for product in products)
    if compat.interpreting():
        return tuple(_product(*product) for product in products)
    transposed = [product[3] for product in products]
    products = [product[:3] for product in products]
    operands = [x for product in products for x in product if x is not None]
    shapes = [
        (a.shape[0], b.shape[0 if turned else 1]) if acc is None else acc.shape
        for (acc, a, b), turned in zip(products, transposed, strict=True)
    ]

    @plgpu.inline_mgpu(
        arg_types=tuple(_WGMMA if isinstance(x, jax.Array) else _SMEM for x in operands),
        return_type=tuple(_float32(*shape) for shape in shapes),
    )
    def issue(_: Any, *operands: Any) -> Any:
        rest = iter(operands)
        return _issue([tuple(None if x is None else next(rest) for x in product) for product in products], transposed)

    return issue(*operands)


def _product(acc: jax.Array | None, a: Any, b: Any, transposed: bool) -> jax.Array:
    a = a if isinstance(a, jax.Array) else a[...]
    product = lax.dot(a, b[...].T if transposed else b[...], preferred_element_type=jnp.float32)
    return product if acc is None else acc + product


def wait(pending: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, once at most `pending` of the products issued last are still in flight; none is used earlier."""
    if compat.interpreting():
        return arrays

    @plgpu.inline_mgpu(arg_types=(_WGMMA,) * len(arrays), return_type=tuple(_float32(*x.shape) for x in arrays))
    def await_group(_: Any, *arrays: Any) -> Any:
        tied = [register for x in arrays for register in _registers(x)]
        registers = _asm(f"wgmma.wait_group.sync.aligned {pending};", tied=tied, outputs=0, inputs=[])
        return _arrays(registers, [x.shape for x in arrays])

    return await_group(*arrays)


def hold_back(x: jax.Array, smem: Any) -> None:
    """Keeps what x is computed from ahead of the `wait` that follows.

    ptxas moves arithmetic freely across wgmma waits, and so would run the softmax after the products that it is to
    hide. It does not move stores; this one, to `smem`, depends on x and never happens: no four values of x may add up to
    infinity (a NaN does no harm).
    """
    if compat.interpreting():
        return

    @plgpu.inline_mgpu(arg_types=(_WGMMA, _SMEM))
    def conditional_store(_: Any, x: Any, smem: Any) -> None:
        total, *others = _registers(x)
        for register in others:
            total = arith.addf(total, register)
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [total, mgpu_utils.memref_ptr(smem)],
            "{ .reg .pred p; setp.gt.f32 p, $0, 0f7F7FFFFF; @p st.shared.f32 [$1], $0; }",
            "f,r",
            has_side_effects=True,
        )

    conditional_store(x, smem)


def mask(scores: jax.Array, low: jax.Array | None, high: jax.Array, hidden: float = -math.inf) -> jax.Array:
    """scores [64, n] with `hidden` wherever not low <= column < high; low (None: zeros) and high [64] int32 per row.

    Written out because each register's column is its thread's offset plus a constant: with the offset moved over to the
    bounds, two comparisons with constants are left, and no column indices that fill registers across the loop.
    """
    if compat.interpreting():
        column = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        visible = column < high[:, None]
        if low is not None:
            visible &= column >= low[:, None]
        return jnp.where(visible, scores, hidden)
    rows = plgpu.Layout.WGMMA.reduce(1)

    bounds = (high,) if low is None else (low, high)

    @plgpu.inline_mgpu(arg_types=(_WGMMA, *[rows] * len(bounds)), return_type=_float32(*scores.shape))
    def select(_: Any, scores: Any, *bounds: Any) -> Any:
        f32 = ir.F32Type.get()
        lane = arith.andi(mgpu.thread_idx(), _index(3))
        first_column = arith.muli(lane, _index(2))
        *low, high = (
            [arith.subi(llvm.extractelement(row, _index(0)), first_column) for row in bound.registers.flat]
            for bound in bounds
        )
        hidden_register = arith.constant(f32, ir.FloatAttr.get(f32, hidden))
        selected = []
        for i, score in enumerate(_registers(scores)):
            # In fragment order: 8 columns at a time, in them the upper and the lower row, of each two columns.
            column, row = _index(i // 4 * 8 + i % 2), i // 2 % 2
            visible = [arith.cmpi(arith.CmpIPredicate.sle, bound[row], column) for bound in low]
            visible.append(arith.cmpi(arith.CmpIPredicate.sgt, high[row], column))
            visible = visible[0] if len(visible) == 1 else arith.andi(*visible)
            selected.append(arith.select(visible, score, hidden_register))
        return _array(selected, scores.shape)

    return select(scores, *bounds)


def rescale(acc: jax.Array, alpha: jax.Array) -> jax.Array:
    """acc [64, n] times alpha [64] per row; a warp whose alphas are all 1 skips the multiplications."""
    if compat.interpreting():
        return acc * alpha[:, None]

    @plgpu.inline_mgpu(arg_types=(_WGMMA, plgpu.Layout.WGMMA.reduce(1)), return_type=_float32(*acc.shape))
    def multiply(_: Any, acc: Any, alpha: Any) -> Any:
        f32 = ir.F32Type.get()
        i32 = ir.IntegerType.get_signless(32)
        registers = _registers(acc)
        factors = [llvm.extractelement(row, _index(0)) for row in alpha.registers.flat]
        text = (
            "{ .reg .pred p, q; setp.ne.f32 p, $1, 0f3F800000; setp.ne.or.f32 p, $2, 0f3F800000, p; "
            "vote.sync.any.pred q, p, -1; selp.b32 $0, 1, 0, q; }"
        )
        needed = llvm.inline_asm(i32, factors, text, "=r,f,f", has_side_effects=True)
        needed = arith.cmpi(arith.CmpIPredicate.ne, needed, _index(0))
        branch = scf.IfOp(needed, [f32] * len(registers), has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scf.YieldOp([arith.mulf(x, factors[i // 2 % 2]) for i, x in enumerate(registers)])
        with ir.InsertionPoint(branch.else_block):
            scf.YieldOp(registers)
        return _array(list(branch.results), acc.shape)

    return multiply(acc, alpha)


def rounded(p: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """p in `dtype`, and that in float32 again.

    Written out because casts there and back, element by element, end in one slow conversion each; two at a time, and
    unpacked from their register by shifts, they are a quarter of the work.
    """
    if compat.interpreting():
        return p.astype(dtype), p.astype(dtype).astype(jnp.float32)
    bfloat16 = jnp.dtype(dtype) == jnp.bfloat16

    @plgpu.inline_mgpu(
        arg_types=(_WGMMA,),
        return_type=(plgpu.ShapeDtypeStruct(p.shape, dtype, layout=_WGMMA), _float32(*p.shape)),
    )
    def convert(_: Any, p: Any) -> Any:
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        half = ir.BF16Type.get() if bfloat16 else ir.F16Type.get()
        pair_type = ir.VectorType.get((2,), half)
        text = f"cvt.rn.{'bf16' if bfloat16 else 'f16'}x2.f32 $0, $1, $2;"
        registers = _registers(p)
        narrow, wide = [], []
        for low, high in zip(registers[::2], registers[1::2], strict=True):
            both = llvm.inline_asm(i32, [high, low], text, "=r,f,f")
            pair = llvm.bitcast(pair_type, both)
            narrow.append(pair)
            if bfloat16:
                bits = (arith.shli(both, _index(16)), arith.andi(both, _index(-65536)))
                wide += [llvm.bitcast(f32, x) for x in bits]
            else:
                wide += [arith.extf(f32, llvm.extractelement(pair, _index(i))) for i in range(2)]
        return _array_of(narrow, p.shape), _array(wide, p.shape)

    return convert(p)


def _float32(rows: int, columns: int) -> Any:
    return plgpu.ShapeDtypeStruct((rows, columns), jnp.float32, layout=_WGMMA)


def _issue(products: list[tuple[Any, ...]], transposed: list[bool]) -> tuple[Any, ...]:
    """Emits the products (acc or None, a, b), each its own wgmma group; the float32 arrays in flight."""
    shapes = [_result_shape(*product, turned) for product, turned in zip(products, transposed, strict=True)]
    fresh = [i for i, product in enumerate(products) if product[0] is None]
    # The results in the order of the asm's operands: fresh registers before tied ones.
    order = fresh + [i for i in range(len(products)) if i not in fresh]
    outputs = sum(shapes[i][0] * shapes[i][1] // 128 for i in fresh)
    tied = [register for i in order[len(fresh) :] for register in _registers(products[i][0])]
    operand, used = {}, 0
    for i in order:
        count = shapes[i][0] * shapes[i][1] // 128
        operand[i] = [f"${used + n}" for n in range(count)]
        used += count
    used += len(tied)

    inputs: list[tuple[ir.Value, str]] = []
    # Every register that a product reads is defined before the first one starts, or ptxas serialises them.
    before = [".reg .pred old, new;", "setp.eq.b32 old, 0, 0;", "setp.ne.b32 new, 0, 0;"]
    instructions = []
    for i, ((acc, a, b), turned) in enumerate(zip(products, transposed, strict=True)):
        in_registers = isinstance(a, mgpu.FragmentedArray)
        depth = a.shape[1] if in_registers else _logical_shape(a)[1]
        first = used + len(inputs)
        if in_registers:
            inputs += [(register, "r") for register in _registers(a)]
        else:
            inputs.append((_descriptor(a, leading=0, stride=_row_stride(a)), "l"))
        b_stride = _row_stride(b)
        b_base = f"${used + len(inputs)}"
        inputs.append((_descriptor(b, leading=0 if turned else _TILE_BYTES, stride=b_stride), "l"))
        for k in range(depth // _K):
            # 64 columns are one tile, and one tile row is one step of the swizzled 128 bytes.
            along_rows = (k // 4 * _TILE_BYTES + k % 4 * 2 * _K) >> 4
            before.append(
                f".reg .b64 b{i}_{k};\nadd.s64 b{i}_{k}, {b_base}, {along_rows if turned else k * 2 * b_stride >> 4};"
            )
            if in_registers:
                left = "{" + ",".join(f"${first + n}" for n in range(4 * k, 4 * k + 4)) + "}"
            else:
                left = f"a{i}_{k}"
                before.append(f".reg .b64 {left};\nadd.s64 {left}, ${first}, {along_rows};")
            flags = ["new" if acc is None and k == 0 else "old", "1", "1", *([] if in_registers else ["0"])]
            flags.append("0" if turned else "1")
            kind = str(ir.MemRefType(b.type).element_type)
            instructions.append(_instruction(shapes[i][1], kind, operand[i], left, f"b{i}_{k}", ", ".join(flags)))
        instructions.append("wgmma.commit_group.sync.aligned;")
    text = "\n".join(["{", *before, "wgmma.fence.sync.aligned;", *instructions, "}"])
    results = _arrays(_asm(text, tied=tied, outputs=outputs, inputs=inputs), [shapes[i] for i in order])
    return tuple(results[order.index(i)] for i in range(len(products)))


def _result_shape(acc: Any, a: Any, b: Any, transposed: bool) -> tuple[int, int]:
    if acc is not None:
        return tuple(acc.shape)
    rows = a.shape[0] if isinstance(a, mgpu.FragmentedArray) else _logical_shape(a)[0]
    return rows, _logical_shape(b)[0 if transposed else 1]


def _instruction(n: int, kind: str, accumulator: list[str], a: str, b: str, flags: str) -> str:
    names = "{" + ",".join(accumulator) + "}"
    return f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {names}, {a}, {b}, {flags};"


def _logical_shape(ref: ir.Value) -> tuple[int, int]:
    row_tiles, column_tiles, rows, columns = ir.MemRefType(ref.type).shape
    return row_tiles * rows, column_tiles * columns


def _row_stride(ref: ir.Value) -> int:
    """Bytes from one 8 rows to the next; the tiles may be some columns of wider ones."""
    strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
    return strides[0] * 2


def _descriptor(ref: ir.Value, *, leading: int, stride: int) -> ir.Value:
    """Shared-memory matrix descriptor: bytes between tiles of 64 columns (leading) and between tiles of 8 rows (stride)."""
    i64 = ir.IntegerType.get_signless(64)

    def constant(value: int) -> ir.Value:
        return llvm.ConstantOp(i64, ir.IntegerAttr.get(i64, value)).result

    address = llvm.ptrtoint(i64, mgpu_utils.memref_ptr(ref))
    address = llvm.lshr(llvm.and_(address, constant(0x3FFFF)), constant(4))
    swizzle_128 = 1 << 62
    return llvm.or_(address, constant(swizzle_128 | (stride >> 4) << 32 | (leading >> 4) << 16))


def _registers(x: Any) -> list[ir.Value]:
    """The 32-bit registers of an array in WGMMA layout, in fragment order."""
    i32 = ir.IntegerType.get_signless(32)
    registers = []
    for pair in x.registers.flat:
        if mgpu.bitwidth(x.mlir_dtype) == 16:
            registers.append(llvm.bitcast(i32, pair))
        else:
            registers += [llvm.extractelement(pair, _index(i)) for i in range(2)]
    return registers


def _arrays(registers: list[ir.Value], shapes: list[tuple[int, int]]) -> tuple[Any, ...]:
    arrays = []
    for shape in shapes:
        count = shape[0] * shape[1] // 128
        arrays.append(_array(registers[:count], shape))
        registers = registers[count:]
    return tuple(arrays)


def _array(registers: list[ir.Value], shape: tuple[int, int]) -> Any:
    f32 = ir.F32Type.get()
    pair_type = ir.VectorType.get((2,), f32)
    pairs = []
    for first, second in zip(registers[::2], registers[1::2], strict=True):
        pair = llvm.mlir_undef(pair_type)
        pair = llvm.insertelement(pair, first, _index(0))
        pairs.append(llvm.insertelement(pair, second, _index(1)))
    return _array_of(pairs, shape)


def _array_of(pairs: list[ir.Value], shape: tuple[int, int]) -> Any:
    array = np.empty(len(pairs), dtype=object)
    array[:] = pairs
    array = array.reshape(mgpu.WGMMA_LAYOUT.registers_shape(tuple(shape)))
    return mgpu.FragmentedArray(_registers=array, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)


def _index(i: int) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, i))


def _asm(text: str, *, tied: list[ir.Value], outputs: int, inputs: list[tuple[ir.Value, str]]) -> list[ir.Value]:
    """Volatile asm with `outputs` fresh float32 results, then the `tied` float32 registers, read and written."""
    f32 = ir.F32Type.get()
    count = outputs + len(tied)
    constraints = ["=f"] * count + [str(outputs + i) for i in range(len(tied))] + [kind for _, kind in inputs]
    struct = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * count),
        [*tied, *(value for value, _ in inputs)],
        text,
        ",".join(constraints),
        asm_dialect=0,
        has_side_effects=True,
    )
    return [llvm.extractvalue(f32, struct, [i]) for i in range(count)]
