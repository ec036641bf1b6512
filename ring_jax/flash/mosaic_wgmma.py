"""Hopper matrix products (wgmma) of the attention kernels, as PTX.

`plgpu.wgmma` cannot express what an overlapped softmax needs: it moves a register operand at the moment of issue, and ptxas
then serialises whatever product is already in flight (C7513); it also spends one move a register on zeroing an accumulator
that the first instruction could overwrite, and takes key tiles in steps of 64 only. Here one asm block issues S = Q K^T
and acc += P V back to back, and `wait` ties the registers to the instruction that makes them readable.

Operands in shared memory are in `mosaic_compat.tiled_smem` layout: 8 x 64 tiles of 1024 bytes, 128-byte swizzle (PTX
ISA, "Asynchronous warpgroup level matrix shared memory layout"). A register array in `Layout.WGMMA` lists its registers in the order
of wgmma's own fragments. None of this can be interpreted, so in interpret mode the same products are `lax.dot`.
"""

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

from ring_jax.flash import mosaic_compat

_WGMMA = plgpu.Layout.WGMMA
_SMEM = plgpu.RefType((plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))
_TILE_BYTES = 1024  # 8 rows of 64 16-bit elements
_K = 16  # contraction of one instruction


def start(q_smem: Any, k_smem: Any, acc: jax.Array, p: jax.Array, v_smem: Any) -> tuple[jax.Array, jax.Array]:
    """Issues scores = Q K^T, then acc += P V; `wait(1, scores)`, then `wait(0, acc)` before reading them.

    p must not be computed before the previous product that read it is done: its registers are the same.
    """
    if mosaic_compat.interpreting():
        return start_scores(q_smem, k_smem), start_values(acc, p, v_smem)

    @plgpu.inline_mgpu(
        arg_types=(_SMEM, _SMEM, _WGMMA, _WGMMA, _SMEM),
        return_type=(_float32(q_smem.shape[0], k_smem.shape[0]), _float32(*acc.shape)),
    )
    def issue(_, q, k, acc, p, v):
        return _issue((q, k), (acc, p, v))

    return issue(q_smem, k_smem, acc, p, v_smem)


def start_scores(q_smem: Any, k_smem: Any) -> jax.Array:
    """Issues Q K^T; `wait` before reading it."""
    if mosaic_compat.interpreting():
        return lax.dot(q_smem[...], k_smem[...].T, preferred_element_type=jnp.float32)

    @plgpu.inline_mgpu(arg_types=(_SMEM, _SMEM), return_type=_float32(q_smem.shape[0], k_smem.shape[0]))
    def issue(_, q, k):
        return _issue((q, k), None)[0]

    return issue(q_smem, k_smem)


def start_values(acc: jax.Array, p: jax.Array, v_smem: Any) -> jax.Array:
    """Issues acc + P V; `wait` before reading it."""
    if mosaic_compat.interpreting():
        return acc + lax.dot(p, v_smem[...], preferred_element_type=jnp.float32)

    @plgpu.inline_mgpu(arg_types=(_WGMMA, _WGMMA, _SMEM), return_type=_float32(*acc.shape))
    def issue(_, acc, p, v):
        return _issue(None, (acc, p, v))[0]

    return issue(acc, p, v_smem)


def wait(pending: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, once at most `pending` of the products issued last are still in flight; none is used earlier."""
    if mosaic_compat.interpreting():
        return arrays

    @plgpu.inline_mgpu(arg_types=(_WGMMA,) * len(arrays), return_type=tuple(_float32(*x.shape) for x in arrays))
    def await_group(_, *arrays):
        tied = [register for x in arrays for register in _registers(x)]
        registers = _asm(f"wgmma.wait_group.sync.aligned {pending};", tied=tied, outputs=0, inputs=[])
        return _arrays(registers, [x.shape for x in arrays])

    return await_group(*arrays)


def hold_back(l: jax.Array, smem: Any) -> None:
    """Keeps what l is computed from ahead of the `wait` that follows.

    ptxas moves arithmetic freely across wgmma waits, and so would run the softmax after the products that it is to
    hide. It does not move stores; this one, to `smem`, depends on l and never happens (l is not negative).
    """
    if mosaic_compat.interpreting():
        return

    @plgpu.inline_mgpu(arg_types=(_WGMMA, _SMEM))
    def conditional_store(_, l, smem):
        total, *others = _registers(l)
        for register in others:
            total = arith.addf(total, register)
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [total, mgpu_utils.memref_ptr(smem)],
            "{ .reg .pred p; setp.lt.f32 p, $0, 0fBF800000; @p st.shared.f32 [$1], $0; }",
            "f,r",
            has_side_effects=True,
        )

    conditional_store(l, smem)


def mask(scores: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """scores [64, n] with -inf wherever not low <= column < high; low and high [64] int32 per row.

    Written out because each register's column is its thread's offset plus a constant: with the offset moved over to the
    bounds, two comparisons with constants are left, and no column indices that fill registers across the loop.
    """
    if mosaic_compat.interpreting():
        column = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        visible = (column >= low[:, None]) & (column < high[:, None])
        return jnp.where(visible, scores, -jnp.inf)
    rows = plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(arg_types=(_WGMMA, rows, rows), return_type=_float32(*scores.shape))
    def select(_, scores, low, high):
        f32 = ir.F32Type.get()
        lane = arith.andi(mgpu.thread_idx(), _index(3))
        first_column = arith.muli(lane, _index(2))
        low, high = (
            [arith.subi(llvm.extractelement(row, _index(0)), first_column) for row in bound.registers.flat]
            for bound in (low, high)
        )
        hidden = arith.constant(f32, ir.FloatAttr.get(f32, float("-inf")))
        selected = []
        for i, score in enumerate(_registers(scores)):
            # In fragment order: 8 columns at a time, in them the upper and the lower row, of each two columns.
            column, row = _index(i // 4 * 8 + i % 2), i // 2 % 2
            visible = arith.andi(
                arith.cmpi(arith.CmpIPredicate.sle, low[row], column),
                arith.cmpi(arith.CmpIPredicate.sgt, high[row], column),
            )
            selected.append(arith.select(visible, score, hidden))
        return _array(selected, scores.shape)

    return select(scores, low, high)


def rescale(acc: jax.Array, alpha: jax.Array) -> jax.Array:
    """acc [64, n] times alpha [64] per row; a warp whose alphas are all 1 skips the multiplications."""
    if mosaic_compat.interpreting():
        return acc * alpha[:, None]

    @plgpu.inline_mgpu(arg_types=(_WGMMA, plgpu.Layout.WGMMA.reduce(1)), return_type=_float32(*acc.shape))
    def multiply(_, acc, alpha):
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
    if mosaic_compat.interpreting():
        return p.astype(dtype), p.astype(dtype).astype(jnp.float32)
    bfloat16 = jnp.dtype(dtype) == jnp.bfloat16

    @plgpu.inline_mgpu(
        arg_types=(_WGMMA,),
        return_type=(plgpu.ShapeDtypeStruct(p.shape, dtype, layout=_WGMMA), _float32(*p.shape)),
    )
    def convert(_, p):
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


def take_turn(warpgroup: jax.Array) -> None:
    """Waits until another warpgroup has called `pass_turn` for this one."""
    _named_barrier("sync", warpgroup)


def pass_turn(warpgroup: jax.Array) -> None:
    _named_barrier("arrive", warpgroup)


def _named_barrier(operation: str, warpgroup: jax.Array) -> None:
    """bar.sync / bar.arrive of two warpgroups: cheaper than an mbarrier. Mosaic itself uses the low barrier numbers."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def barrier(_, number):
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [number.registers[()]],
            f"bar.{operation} $0, 256;",
            "r",
            has_side_effects=True,
        )

    barrier(warpgroup + 8)


def _float32(rows: int, columns: int) -> Any:
    return plgpu.ShapeDtypeStruct((rows, columns), jnp.float32, layout=_WGMMA)


def _issue(scores_of, values_of) -> tuple[Any, ...]:
    """Emits the products of (q, k) and of (acc, p, v), each its own wgmma group; the float32 arrays in flight."""
    outputs, tied, inputs, shapes = 0, [], [], []
    if scores_of is not None:
        q, k = scores_of
        (rows, depth), (keys, _) = _logical_shape(q), _logical_shape(k)
        kind = str(ir.MemRefType(q.type).element_type)
        outputs = rows * keys // 128
        shapes.append((rows, keys))
        inputs += [(_descriptor(x, leading=0, stride=depth // 64 * _TILE_BYTES), "l") for x in (q, k)]
    if values_of is not None:
        acc, p, v = values_of
        kind = str(p.mlir_dtype)
        tied = _registers(acc)
        shapes.append(tuple(acc.shape))
        columns = acc.shape[1]
        inputs += [(register, "r") for register in _registers(p)]
        inputs.append((_descriptor(v, leading=_TILE_BYTES, stride=columns // 64 * _TILE_BYTES), "l"))

    operand = [f"${i}" for i in range(outputs + 2 * len(tied) + len(inputs))]
    results, arguments = operand[: outputs + len(tied)], operand[outputs + 2 * len(tied) :]
    # Every register that a product reads is defined before the first one starts, or ptxas serialises them.
    before = [".reg .pred old, new;", "setp.eq.b32 old, 0, 0;", "setp.ne.b32 new, 0, 0;"]
    products = []
    if scores_of is not None:
        (q_base, k_base), arguments = arguments[:2], arguments[2:]
        for i in range(depth // _K):
            # 64 columns are one tile, and one tile row is one step of the swizzled 128 bytes.
            offset = (i // 4 * _TILE_BYTES + i % 4 * 2 * _K) >> 4
            before.append(
                f".reg .b64 q{i}, k{i};\nadd.s64 q{i}, {q_base}, {offset};\nadd.s64 k{i}, {k_base}, {offset};"
            )
            flags = f"{'new' if i == 0 else 'old'}, 1, 1, 0, 0"
            products.append(_instruction(keys, kind, results[:outputs], f"q{i}", f"k{i}", flags))
        products.append("wgmma.commit_group.sync.aligned;")
    if values_of is not None:
        *p_registers, v_base = arguments
        for i in range(p.shape[1] // _K):
            offset = i * 2 * (columns // 64) * _TILE_BYTES >> 4
            before.append(f".reg .b64 v{i};\nadd.s64 v{i}, {v_base}, {offset};")
            fragment = "{" + ",".join(p_registers[4 * i : 4 * i + 4]) + "}"
            products.append(_instruction(columns, kind, results[outputs:], fragment, f"v{i}", "old, 1, 1, 1"))
        products.append("wgmma.commit_group.sync.aligned;")
    text = "\n".join(["{", *before, "wgmma.fence.sync.aligned;", *products, "}"])
    return _arrays(_asm(text, tied=tied, outputs=outputs, inputs=inputs), shapes)


def _instruction(n: int, kind: str, accumulator: list[str], a: str, b: str, flags: str) -> str:
    names = "{" + ",".join(accumulator) + "}"
    return f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {names}, {a}, {b}, {flags};"


def _logical_shape(ref: ir.Value) -> tuple[int, int]:
    row_tiles, column_tiles, rows, columns = ir.MemRefType(ref.type).shape
    return row_tiles * rows, column_tiles * columns


def _descriptor(ref: ir.Value, *, leading: int, stride: int) -> ir.Value:
    """Shared-memory matrix descriptor: bytes between tiles of 64 columns (leading) and between tiles of 8 rows (stride)."""
    i64 = ir.IntegerType.get_signless(64)

    def constant(value):
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
