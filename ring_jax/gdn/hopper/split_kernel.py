"""The gated delta rule over the chunks of a sequence with split operands: float32 results from 16-bit products on Hopper.

As `forward_kernel` (see its formulas), but whatever is not an input, the state, y, u, T and P, enters products as the sum of two
16-bit numbers, of which the product of the two low ones is left out: 13 products a chunk instead of 5, errors of 2^-17 of an operand
instead of 2^-9. T and P come in two parts from XLA (`split.matrices`). A thread block serves 64 columns of a value head; one
warpgroup multiplies, another feeds shared memory. Outputs leave in float32, as they lie in registers: transposed.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax.gdn.hopper.config import CHUNK
from ring_jax.gdn.hopper.prepare import down
from ring_jax.mosaic import compat, wgmma
from ring_jax.mosaic.fragments import load_transposed
from ring_jax.mosaic.pipeline import feed, ring_slot

GATES = 3  # rows of a chunk's gates: 2^G, scale 2^G, 2^(G_end - G)
_STAGES = 2
_TILE = plgpu.Layout.WGMMA
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Problem:
    batch: int
    chunks: int
    key_heads: int
    heads: int
    key_size: int
    value_size: int
    initial: bool
    dtype: Any

    @property
    def slices(self) -> int:
        """Thread blocks of a value head."""
        return self.value_size // 64


def forward(problem: Problem, query, key, value, inverse, scores, gates, initial):
    """out [B, N, dv, chunks 64] and the final state [B, N, dv, dk], float32, both transposed.

    query, key [B, T, K, dk] and value [B, T, N, dv] as TMA can read them; inverse and scores [chunks, B, N, 2, 64, 64] in their
    dtype; gates [chunks, B, N, 3, 64] and initial [B, N, dv, dk] (or None) float32.
    """
    operands = [query, key, value, inverse, scores, gates, *([initial] if problem.initial else [])]
    per_head = (problem.batch, problem.heads, problem.value_size)
    out_type = (
        compat.output_like((*per_head, problem.chunks * CHUNK), jnp.float32, *operands),
        compat.output_like((*per_head, problem.key_size), jnp.float32, *operands),
    )
    scratch = dict(
        q_smem=compat.tiled_smem((_STAGES, CHUNK, problem.key_size), problem.dtype),
        k_smem=compat.tiled_smem((_STAGES, CHUNK, problem.key_size), problem.dtype),
        v_smem=compat.tiled_smem((_STAGES, CHUNK, 64), problem.dtype),
        t_smem=compat.tiled_smem((_STAGES, 2, CHUNK, CHUNK), problem.dtype),
        p_smem=compat.tiled_smem((_STAGES, 2, CHUNK, CHUNK), problem.dtype),
        gates_smem=plgpu.SMEM((_STAGES, GATES, CHUNK), jnp.float32),
        full=plgpu.Barrier(num_arrivals=6, num_barriers=_STAGES),
        free=plgpu.Barrier(num_barriers=_STAGES),
    )

    def body(*refs, **scratch_refs):
        _body(problem, *refs, **scratch_refs)

    call = compat.kernel(
        body,
        name="gated_delta_split",
        out_type=out_type,
        scratch=scratch,
        grid=(problem.batch * problem.heads * problem.slices,),
        grid_names=("program",),
        num_threads=2,
        thread_name="warpgroup",
    )
    return call(*operands)


def _body(problem: Problem, query, key, value, inverse, scores, gates, *refs, **scratch):
    *initial, out, final = refs
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    part, program = lax.rem(program, problem.slices), lax.div(program, problem.slices)
    head, batch = lax.rem(program, problem.heads), lax.div(program, problem.heads)
    key_head = lax.div(head, problem.heads // problem.key_heads)
    columns = pl.ds(part * 64, 64)

    @pl.when(warpgroup == 0)
    def _():
        start = initial[0].at[batch, head, columns] if problem.initial else None

        def out_at(chunk):
            return out.at[batch, head, columns, pl.ds(chunk * CHUNK, CHUNK)]

        compat.store(final.at[batch, head, columns], _state(problem, start, out_at, **scratch))

    @pl.when(warpgroup == 1)
    def _():
        def copies(chunk, slot, q_smem, k_smem, v_smem, t_smem, p_smem, gates_smem):
            tokens, place = pl.ds(chunk * CHUNK, CHUNK), (chunk, batch, head)
            yield key.at[batch, tokens, key_head], k_smem.at[slot]
            yield query.at[batch, tokens, key_head], q_smem.at[slot]
            yield gates.at[place], gates_smem.at[slot]
            yield value.at[batch, tokens, head, columns], v_smem.at[slot]
            yield inverse.at[place], t_smem.at[slot]
            yield scores.at[place], p_smem.at[slot]

        feed(problem.chunks, _STAGES, copies, **scratch)


def _halves(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Two 16-bit arrays whose sum is x but for 2^-17 of it (2^-22 in float16)."""
    high, wide = wgmma.rounded(x, dtype)
    return high, (x - wide).astype(dtype)


def _state(problem, initial, out_at, *, q_smem, k_smem, v_smem, t_smem, p_smem, gates_smem, full, free):
    """The recurrence of 64 columns of a value head: the state that it ends with."""
    dtype = problem.dtype
    for slot in range(_STAGES):
        plgpu.barrier_arrive(free.at[slot])

    def step(chunk, state):
        slot = ring_slot(chunk, _STAGES)
        q, k, gate = q_smem.at[slot], k_smem.at[slot], gates_smem.at[slot]
        t_high, t_low = (t_smem.at[slot, i] for i in range(2))
        p_high, p_low = (p_smem.at[slot, i] for i in range(2))
        high, low = _halves(state, dtype)
        plgpu.barrier_wait(full.at[slot])
        read, out = wgmma.start_products((None, high, k), (None, high, q))
        read, out = wgmma.start_products((read, low, k, True), (out, low, q, True))
        from_start = compat.load(gate.at[0], _COLUMNS)
        total = gates_smem[slot, 0, CHUNK - 1]
        read, out = wgmma.wait(0, read, out)
        values = load_transposed(v_smem.at[slot]).astype(jnp.float32)
        high, low = _halves(values - read * down(from_start), dtype)
        (u,) = wgmma.start_products((None, high, t_high))
        for y, t in ((low, t_high), (high, t_low)):
            (u,) = wgmma.start_products((u, y, t, True))
        out, state = out * down(compat.load(gate.at[1], _COLUMNS)), state * total
        to_end = compat.load(gate.at[2], _COLUMNS)
        (u,) = wgmma.wait(0, u)
        high, low = _halves(u, dtype)
        for left, p in ((high, p_high), (low, p_high), (high, p_low)):
            (out,) = wgmma.start_products((out, left, p, True))
        for left in _halves(u * down(to_end), dtype):
            (state,) = wgmma.start_products((state, left, k))
        out, state = wgmma.wait(0, out, state)
        plgpu.barrier_arrive(free.at[slot])
        compat.store(out_at(chunk), out)
        return state

    if initial is None:
        state = plgpu.layout_cast(jnp.zeros((64, problem.key_size), jnp.float32), _TILE)
    else:
        # Nothing is in flight: the wait is for its type, which forgets over which mesh axes the array varies, as products do.
        (state,) = wgmma.wait(0, compat.load(initial, _TILE))
    return lax.fori_loop(0, problem.chunks, step, state)
