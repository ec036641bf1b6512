"""What the kernels need of decays, write strengths and documents, chunk by chunk.

With G_i the sum of the log decays of a chunk up to token i, to base 2, the rows of `gates` [B, N, chunks, 4, 64] are

    G_i;   2^{G_i}, from the state that enters to token i;   2^{G_end - G_i}, from token i to the state that leaves;   beta_i

where the second is 0 behind a document border and the third before one. Between two tokens of a chunk the decay is 2^{G_i - G_j}
where `starts` [B, chunks, 64], the place in the chunk at which the document of token i begins (-1: before the chunk), is at
most j. `prepare` makes them from log decays and strengths, one warp for each value head.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from ring_jax._arrays import LOG2E
from ring_jax.gdn.hopper.config import CHUNK
from ring_jax.gdn.segments import document_index
from ring_jax.mosaic import compat
from ring_jax.mosaic.fragments import constant


def chunked_rows(log_decay: jax.Array, beta: jax.Array) -> jax.Array:
    """Both [B, T, N] as float32 [B, N, chunks, 2, 64], zeros at the end."""
    x = jnp.stack([log_decay.astype(jnp.float32), beta.astype(jnp.float32)])
    _, batch, time, heads = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -time % CHUNK), (0, 0)))
    return x.reshape(2, batch, -1, CHUNK, heads).transpose(1, 4, 2, 0, 3)


def document_starts(segment_ids: jax.Array) -> jax.Array:
    """`starts`, int32 [B, chunks, 64]. The padding after the end belongs to the last document."""
    index = document_index(segment_ids)
    batch, time = index.shape
    index = jnp.pad(index, ((0, 0), (0, -time % CHUNK)), mode="edge")
    begins = jnp.diff(index, axis=1, prepend=0) > 0
    begins = begins.reshape(batch, -1, CHUNK)
    place = lax.broadcasted_iota(jnp.int32, begins.shape, 2)
    return lax.cummax(jnp.where(begins, place, -1), axis=2)


def document_spans(starts: jax.Array) -> jax.Array:
    """`starts` [B, chunks, 64] and, beside them, where in the chunk the document of each token ends: [B, chunks, 2, 64]."""
    place = lax.broadcasted_iota(jnp.int32, starts.shape, 2)
    begins = jnp.where(starts == place, place, CHUNK)
    following = jnp.pad(begins[..., 1:], ((0, 0), (0, 0), (0, 1)), constant_values=CHUNK)
    return jnp.stack([starts, lax.cummin(following, axis=2, reverse=True)], axis=2)


def gate_rows(rows: jax.Array, starts: jax.Array | None) -> jax.Array:
    """`gates` [..., 4, 64] of `chunked_rows` [..., 2, 64] and starts [..., 64], of one rank."""
    total = jnp.cumsum(rows[..., 0, :] * LOG2E, axis=-1)
    from_start, to_end = jnp.exp2(total), jnp.exp2(total[..., -1:] - total)
    if starts is not None:
        from_start = jnp.where(starts < 0, from_start, 0.0)
        place = lax.broadcasted_iota(jnp.int32, starts.shape, starts.ndim - 1)
        to_end = jnp.where(place >= starts[..., -1:], to_end, 0.0)
    return jnp.stack([total, from_start, to_end, rows[..., 1, :]], axis=-2)


def write_gate_rows(rows, starts, gates) -> None:
    """`gate_rows` for references to shared memory: rows [heads, 2, 64], starts [64] or None, gates [heads, 4, 64]."""
    if compat.interpreting():
        gates[...] = gate_rows(rows[...], None if starts is None else starts[...][None])
        return
    heads = rows.shape[0]
    documents = () if starts is None else (starts,)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (2 + len(documents)))
    def write(_, rows, gates, *documents):
        warp = arith.andi(arith.shrui(mgpu.thread_idx(), constant(5)), constant(3))
        for first in range(0, heads, 4):
            head = arith.addi(warp, constant(first))
            branch = scf.IfOp(arith.cmpi(arith.CmpIPredicate.slt, head, constant(heads)))
            with ir.InsertionPoint(branch.then_block):
                _scan(head, *(_address(x) for x in (rows, gates, *documents)))
                scf.YieldOp([])

    write(rows, gates, *documents)


def _scan(head, rows, gates, starts=None) -> None:
    """One warp, two tokens a lane."""
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    lane = arith.andi(mgpu.thread_idx(), constant(31))
    offset = arith.shli(lane, constant(3))
    rows = arith.addi(arith.addi(rows, offset), arith.muli(head, constant(2 * CHUNK * 4)))
    gates = arith.addi(arith.addi(gates, offset), arith.muli(head, constant(4 * CHUNK * 4)))
    zero, log2e = (arith.constant(f32, ir.FloatAttr.get(f32, x)) for x in (0.0, LOG2E))
    first, second = (arith.mulf(x, log2e) for x in _load_pair(rows, 0, f32))
    beta = _load_pair(rows, CHUNK * 4, f32)
    total = arith.addf(first, second)
    for distance in (1, 2, 4, 8, 16):
        before = _shuffle("up", total, distance, 0, f32)
        reaches = arith.cmpi(arith.CmpIPredicate.sge, lane, constant(distance))
        total = arith.addf(total, arith.select(reaches, before, zero))
    before = _shuffle("up", total, 1, 0, f32)
    before = arith.select(arith.cmpi(arith.CmpIPredicate.eq, lane, constant(0)), zero, before)
    totals = [arith.addf(before, first), total]
    end = _shuffle("idx", total, 31, 31, f32)
    from_start = [_exp2(x) for x in totals]
    to_end = [_exp2(arith.subf(end, x)) for x in totals]
    if starts is not None:
        begins = _load_pair(arith.addi(starts, offset), 0, i32)
        last = _shuffle("idx", begins[1], 31, 31, i32)
        place = arith.shli(lane, constant(1))
        for i in range(2):
            inside = arith.cmpi(arith.CmpIPredicate.slt, begins[i], constant(0))
            from_start[i] = arith.select(inside, from_start[i], zero)
            inside = arith.cmpi(arith.CmpIPredicate.sge, arith.addi(place, constant(i)), last)
            to_end[i] = arith.select(inside, to_end[i], zero)
    for row, pair in enumerate((totals, from_start, to_end, beta)):
        text = f"st.shared.v2.f32 [$0 + {row * CHUNK * 4}], {{$1, $2}};"
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [gates, *pair], text, "r,f,f", has_side_effects=True)


def _address(ref) -> ir.Value:
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu_utils.memref_ptr(ref))


def _load_pair(address, offset: int, kind) -> list[ir.Value]:
    letter = "r" if isinstance(kind, ir.IntegerType) else "f"
    text = f"ld.shared.v2.b32 {{$0, $1}}, [$2 + {offset}];"
    result = llvm.StructType.get_literal([kind] * 2)
    pair = llvm.inline_asm(result, [address], text, f"={letter},={letter},r", has_side_effects=True)
    return [llvm.extractvalue(kind, pair, [i]) for i in range(2)]


def _shuffle(mode: str, x, distance: int, clamp: int, kind) -> ir.Value:
    letter = "r" if isinstance(kind, ir.IntegerType) else "f"
    text = f"shfl.sync.{mode}.b32 $0, $1, {distance}, {clamp}, 0xffffffff;"
    return llvm.inline_asm(kind, [x], text, f"={letter},{letter}", has_side_effects=True)


def _exp2(x) -> ir.Value:
    return llvm.inline_asm(ir.F32Type.get(), [x], "ex2.approx.ftz.f32 $0, $1;", "=f,f")
