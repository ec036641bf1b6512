"""What the grouped products need as PTX: rows gathered by cp.async, wgmma on chunks of weights, rows stored one by one.

Why not Pallas's own operations: on Hopper TMA copies no rows from a list, `plgpu.wgmma` takes no operand made of several
TMA chunks, and no store is masked by rows. None of this can be interpreted, so in interpret mode the same is done by plain
loads, stores and `lax.dot`.

An operand in shared memory is made of *chunks* of 64 rows of 128 bytes (or 64, see `width`) in TMA's swizzle, one behind
the other: 8-row groups are 1024 (512) bytes apart, chunks 8192 (4096). A row has eight 16-byte units of its chunk; unit u
of row r lies at u xor (r mod 8). A warpgroup's thread t copies unit t mod 8 of rows t / 8 + 16 j.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from ring_jax.mosaic import compat, wgmma

_SCALAR = plgpu.Layout.WG_SPLAT
_PLAIN = plgpu.RefType()
_K = 16  # contraction of one wgmma
_ROW_BYTES = 128


def chunked(width: int) -> plgpu.RefType:
    """Chunks of `width` 16-bit columns, as `chunk_smem` makes them. Not tiled: TMA's boxes may then begin at any row."""
    return plgpu.RefType((plgpu.SwizzleTransform(2 * width),))  # type: ignore[abstract]


def chunk_smem(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for chunks [..., 64, width]."""
    return plgpu.SMEM(shape, dtype, transforms=chunked(shape[-1]).transforms)


# Rows from memory.


def row_offsets(index: Any, first: jax.Array, rows: jax.Array, count: int, row_elements: int) -> Any:
    """Where the rows of a tile of `count` rows begin, for `gather`: row i is row index[first + i] of the source.

    Args:
        index: int32 Ref. first, rows: of the tile; rows beyond are not read.
        row_elements: of a source row, a multiple of 8.
    """
    if compat.interpreting():
        return index, first, rows, count
    shape = (8 * count,)
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=1)

    @plgpu.inline_mgpu(
        arg_types=(_PLAIN, _SCALAR, _SCALAR),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=layout),
    )
    def offsets(_, index, first, rows):
        mine = _shift_right(_thread(), 3)
        registers = []
        for j in range(count // 16):
            row = arith.addi(mine, _i32(16 * j))
            inside = arith.cmpi(arith.CmpIPredicate.slt, row, _scalar(rows))
            place = _load_index(index, arith.addi(_scalar(first), row), inside)
            registers.append(arith.select(inside, arith.muli(place, _i32(row_elements // 8)), _i32(-1)))
        return _int_array(registers, layout)

    return offsets(index, first, rows)


def gather(offsets: Any, source: Any, smem: Any, column: jax.Array, chunks: int = 1) -> None:
    """Starts copying columns column ... column + 64 chunks - 1 of the rows into chunks of `smem`; rows beyond are zero."""
    if compat.interpreting():
        index, first, rows, count = offsets
        row = lax.iota(jnp.int32, count)
        at = jnp.where(row < rows, first + row, 0)
        at = index[...][at]
        values = jnp.where((row < rows)[:, None], source[:, pl.ds(column, 64 * chunks)][at], jnp.zeros((), smem.dtype))
        for i in range(pl.cdiv(count, 64)):
            for chunk in range(chunks):
                part = values[64 * i : 64 * (i + 1), 64 * chunk : 64 * (chunk + 1)]
                smem[i + chunk, pl.ds(0, part.shape[0])] = part
        return
    layout = plgpu.Layout.WG_STRIDED(offsets.shape, vec_size=1)

    @plgpu.inline_mgpu(arg_types=(layout, _PLAIN, chunked(64), _SCALAR))
    def copy(_, offsets, source, smem, column):
        thread = _thread()
        unit, row = arith.andi(thread, _i32(7)), _shift_right(thread, 3)
        swizzled = arith.xori(unit, arith.andi(row, _i32(7)))
        target = arith.addi(_smem_address(smem), arith.muli(row, _i32(_ROW_BYTES)))
        target = arith.addi(target, arith.muli(swizzled, _i32(16)))
        unit = arith.addi(unit, _shift_right(_scalar(column), 3))
        base = _pointer(source)
        for j, register in enumerate(offsets.registers.flat):
            offset = llvm.extractelement(register, _i32(0))
            inside = arith.cmpi(arith.CmpIPredicate.sge, offset, _i32(0))
            size = arith.select(inside, _i32(16), _i32(0))
            offset = arith.select(inside, arith.addi(offset, unit), _i32(0))
            wide = llvm.mul(llvm.zext(_i64_type(), offset), _i64(16), overflow_flags=_NO_FLAGS)
            address = llvm.add(base, wide, overflow_flags=_NO_FLAGS)
            for chunk in range(chunks):
                text = (
                    f"cp.async.cg.shared.global.L2::128B [$0 + {chunk * 64 * _ROW_BYTES + j * 16 * _ROW_BYTES}], "
                    f"[$1 + {chunk * _ROW_BYTES}], 16, $2;"
                )
                _void(text, [(target, "r"), (address, "l"), (size, "r")])
        _void("cp.async.commit_group;", [])

    copy(offsets, source, smem, column)


def gathered(pending: int) -> None:
    """Waits until at most `pending` of this thread's last gathers are under way; wgmma may read the others."""
    if compat.interpreting():
        return

    @plgpu.inline_mgpu()
    def wait(_):
        _void(f"cp.async.wait_group {pending};", [])
        _void("fence.proxy.async.shared::cta;", [])

    wait()


# Products.


def multiply(
    acc: jax.Array | None, a: Any, b: Any, *, a_by_columns: bool = False, b_by_columns: bool = True
) -> jax.Array:
    """Issues acc + A B for one pipeline step (A B where acc is None); `finished` before reading it.

    Args:
        acc: float32 [64, n].
        a: one chunk of A: its 64 rows, or with `a_by_columns` of A^T.
        b: chunks [c, 64, width] of n columns together: of B, c times `width` of its columns; without `b_by_columns` of
            B^T, 64 rows (columns of B) each.
    """
    chunks, _, width = b.shape
    columns = chunks * (width if b_by_columns else 64)
    if compat.interpreting():
        left = a[...].T if a_by_columns else a[...]
        parts = [b[i] if b_by_columns else b[i].T for i in range(chunks)]
        new = lax.dot(left, jnp.concatenate(parts, axis=1), preferred_element_type=jnp.float32)
        return new if acc is None else acc + new
    held = () if acc is None else (acc,)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,) * len(held) + (chunked(64), chunked(width)),
        return_type=plgpu.ShapeDtypeStruct((64, columns), jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def issue(_, *operands):
        *held, a, b = operands
        tied = [register for x in held for register in wgmma._registers(x)]
        outputs = 0 if held else columns // 2
        used = outputs + 2 * len(tied)
        names = ",".join(f"${i}" for i in range(columns // 2))
        kind = str(ir.MemRefType(b.type).element_type)
        lines = ["{", ".reg .pred old, new;", "setp.eq.b32 old, 0, 0;", "setp.ne.b32 new, 0, 0;"]
        steps = []
        for k in range(64 // _K):
            # Along K: 16 columns of a chunk lie within its rows; 16 rows of it are two groups of 8.
            a_step = 2 * 8 * _ROW_BYTES * k if a_by_columns else 2 * _K * k
            b_step = 2 * 8 * 2 * width * k if b_by_columns else 2 * _K * k
            lines += [f".reg .b64 a{k}, b{k};", f"add.s64 a{k}, ${used}, {a_step >> 4};"]
            lines += [f"add.s64 b{k}, ${used + 1}, {b_step >> 4};"]
            scale = "new" if not held and k == 0 else "old"
            steps.append(
                f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {{{names}}}, a{k}, b{k}, "
                f"{scale}, 1, 1, {int(a_by_columns)}, {int(b_by_columns)};"
            )
        lines += ["wgmma.fence.sync.aligned;", *steps, "wgmma.commit_group.sync.aligned;", "}"]
        inputs = [(_descriptor(a, 64), "l"), (_descriptor(b, width), "l")]
        registers = wgmma._asm("\n".join(lines), tied=tied, outputs=outputs, inputs=inputs)
        return wgmma._array(registers, (64, columns))

    return issue(*held, a, b)


def in_flight(pending: int) -> None:
    """Waits until at most `pending` of the products issued last are running: what the others read is free."""
    if compat.interpreting():
        return

    @plgpu.inline_mgpu()
    def wait(_):
        _void(f"wgmma.wait_group.sync.aligned {pending};", [])

    wait()


def finished(acc: jax.Array) -> jax.Array:
    """The sum, once all products are done."""
    return wgmma.wait(0, acc)[0]


# Results to memory.


def stage(acc: jax.Array, staging: Any, first: int, columns: int, swiglu: bool = False) -> None:
    """Rounds columns first ... first + columns - 1 of acc [64, n] into `staging` [64, pitch], once what was there has left.

    With `swiglu`, they are silu(left half of acc) * (right half).
    """
    if compat.interpreting():
        if swiglu:
            gate, up = jnp.split(acc, 2, axis=1)
            acc = gate / (1 + jnp.exp(-gate)) * up
        staging[:, pl.ds(0, columns)] = acc[:, first : first + columns].astype(staging.dtype)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, _PLAIN))
    def write(_, acc, staging):
        _void("cp.async.bulk.wait_group.read 0;", [])
        mgpu_utils.warpgroup_barrier()
        registers = wgmma._registers(acc)
        part = slice(first // 2, (first + columns) // 2)
        if swiglu:
            half = len(registers) // 2
            pairs = zip(registers[:half][part], registers[half:][part], strict=True)
            registers = [_silu_times(x, y) for x, y in pairs]
        else:
            registers = registers[part]
        kind = ir.MemRefType(staging.type).element_type
        form = "bf16x2" if isinstance(kind, ir.BF16Type) else "f16x2"
        pairs = [
            _asm_i32(f"cvt.rn.{form}.f32 $0, $1, $2;", [(high, "f"), (low, "f")], effects=False)
            for low, high in zip(registers[::2], registers[1::2], strict=True)
        ]
        thread = _thread()
        lane = arith.andi(thread, _i32(31))
        row = arith.addi(arith.muli(_shift_right(thread, 5), _i32(16)), arith.andi(lane, _i32(15)))
        pitch = ir.MemRefType(staging.type).shape[1] * 2
        target = arith.addi(_smem_address(staging), arith.muli(row, _i32(pitch)))
        target = arith.addi(target, arith.muli(_shift_right(lane, 4), _i32(16)))
        for j in range(len(pairs) // 4):
            text = f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0 + {32 * j}], {{$1, $2, $3, $4}};"
            _void(text, [(target, "r"), *((x, "r") for x in pairs[4 * j : 4 * j + 4])])
        mgpu.commit_shared()

    write(acc, staging)


def store(
    staging: Any, out: Any, index: Any, first: jax.Array, rows: jax.Array, column: jax.Array, columns: int
) -> None:
    """Starts copying the first `rows` (at most 64) rows of `staging` to columns `column` ... of out.

    Row i goes to row index[first + i] (None: first + i).
    """
    if compat.interpreting():

        @pl.loop(0, 64)
        def _(i):
            @pl.when(i < rows)
            def _():
                row = first + i if index is None else index[first + i]
                out[row, pl.ds(column, columns)] = staging[i, pl.ds(0, columns)]

        return
    table = () if index is None else (index,)

    @plgpu.inline_mgpu(arg_types=(_PLAIN, _PLAIN) + (_PLAIN,) * len(table) + (_SCALAR,) * 3)
    def copy(_, staging, out, *arguments):
        *table, first, rows, column = arguments
        thread = _thread()
        inside = arith.cmpi(arith.CmpIPredicate.slt, thread, _scalar(rows))
        inside = arith.andi(inside, arith.cmpi(arith.CmpIPredicate.slt, thread, _i32(64)))
        flag = arith.extui(_i32_type(), inside)
        row = arith.addi(_scalar(first), thread)
        if table:
            row = _load_index(table[0], row, inside)
        width = ir.MemRefType(out.type).shape[1]
        target = _address(out, row, 2 * width)
        target = llvm.add(target, _wide(arith.muli(_scalar(column), _i32(2))), overflow_flags=_NO_FLAGS)
        pitch = ir.MemRefType(staging.type).shape[1] * 2
        source = arith.addi(_smem_address(staging), arith.muli(thread, _i32(pitch)))
        text = (
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; "
            f"@p cp.async.bulk.global.shared::cta.bulk_group [$0], [$1], {2 * columns}; }}"
        )
        _void(text, [(target, "l"), (source, "r"), (flag, "r")])
        _void("cp.async.bulk.commit_group;", [])

    copy(staging, out, *table, first, rows, column)


def stores_done() -> None:
    """Waits for all copies that `store` started: shared memory must outlive them."""
    if compat.interpreting():
        return

    @plgpu.inline_mgpu()
    def wait(_):
        _void("cp.async.bulk.wait_group 0;", [])

    wait()


# MLIR.

_NO_FLAGS = llvm.IntegerOverflowFlags.none


def _silu_times(gate: ir.Value, up: ir.Value) -> ir.Value:
    """gate up / (1 + 2^(-gate log2 e)), in approximations good to about 1e-7."""
    text = (
        "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
        "rcp.approx.ftz.f32 t, t; mul.f32 t, t, $1; mul.f32 $0, t, $2; }"
    )
    return llvm.inline_asm(ir.F32Type.get(), [gate, up], text, "=f,f,f")


def _descriptor(ref: ir.Value, width: int) -> ir.Value:
    """wgmma's description of chunks: 8-row groups lie 16 `width` bytes apart (stride), chunks 128 `width` (leading)."""
    address = llvm.zext(_i64_type(), _smem_address(ref))
    address = llvm.lshr(llvm.and_(address, _i64(0x3FFFF)), _i64(4))
    swizzle = {64: 1, 32: 2}[width] << 62
    if swizzle >= 1 << 63:
        swizzle -= 1 << 64
    return llvm.or_(address, _i64(swizzle | (16 * width >> 4) << 32 | (128 * width >> 4) << 16))


def _thread() -> ir.Value:
    """Number of this thread in its warpgroup."""
    return arith.andi(mgpu.thread_idx(), _i32(127))


def _i32_type() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _i64_type() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def _i32(value: int) -> ir.Value:
    return arith.constant(_i32_type(), ir.IntegerAttr.get(_i32_type(), value))


def _i64(value: int) -> ir.Value:
    return llvm.ConstantOp(_i64_type(), ir.IntegerAttr.get(_i64_type(), value)).result


def _wide(value: ir.Value) -> ir.Value:
    return llvm.sext(_i64_type(), value)


def _shift_right(value: ir.Value, bits: int) -> ir.Value:
    return arith.shrui(value, _i32(bits))


def _scalar(array: Any) -> ir.Value:
    return array.registers[()]


def _smem_address(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(_i32_type(), mgpu_utils.memref_ptr(ref))


def _pointer(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(_i64_type(), mgpu_utils.memref_ptr(ref))


def _load_index(index: ir.Value, place: ir.Value, inside: ir.Value) -> ir.Value:
    """index[place], or 0 where not `inside`."""
    text = "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.nc.b32 $0, [$1]; }"
    return _asm_i32(text, [(_address(index, place, 4), "l"), (arith.extui(_i32_type(), inside), "r")])


def _address(ref: ir.Value, index: ir.Value, stride: int) -> ir.Value:
    """Of entry `index` of an array in memory whose entries are `stride` bytes apart."""
    offset = llvm.mul(_wide(index), _i64(stride), overflow_flags=_NO_FLAGS)
    return llvm.add(_pointer(ref), offset, overflow_flags=_NO_FLAGS)


def _void(text: str, operands: list[tuple[ir.Value, str]]) -> None:
    values, kinds = [value for value, _ in operands], [kind for _, kind in operands]
    # Memory is clobbered: none of these may pass another access.
    constraints = ",".join([*kinds, "~{memory}"])
    llvm.inline_asm(ir.Type.parse("!llvm.void"), values, text, constraints, has_side_effects=True)


def _asm_i32(text: str, operands: list[tuple[ir.Value, str]], effects: bool = True) -> ir.Value:
    values, kinds = [value for value, _ in operands], [kind for _, kind in operands]
    return llvm.inline_asm(_i32_type(), values, text, ",".join(["=&r", *kinds]), has_side_effects=effects)


def _int_array(registers: list[ir.Value], layout: Any) -> Any:
    vector = ir.VectorType.get((1,), _i32_type())
    array = np.empty(len(registers), dtype=object)
    for i, register in enumerate(registers):
        array[i] = llvm.insertelement(llvm.mlir_undef(vector), register, _i32(0))
    return mgpu.FragmentedArray(_registers=array, _layout=layout.to_mgpu(), _is_signed=True)
