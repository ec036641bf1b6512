"""The gated delta rule over the chunks of a sequence, on Hopper, in Pallas Mosaic GPU.

A thread block serves one value head of one sequence, or 64 of its columns, and walks over the chunks. The state is kept
transposed, S^T [64 columns, d_k] in float32 registers of each *state* warpgroup: rounded to 16 bits it is then the left operand of
every product that reads it, and so are u and y, without a trip through shared memory (FlashInfer's orientation). A chunk that
starts from S, with T from `prepare`, P = scale lower[Q K^T . D] and the decays of `gates`:

    y^T = V^T - (S^T K^T) from_start;   u^T = y^T T^T
    O^T = (S^T Q^T) scale from_start + u^T P^T;   S^T <- S^T total + (u^T to_end) K

A *scores* warpgroup computes P one chunk ahead, a *memory* warpgroup feeds shared memory by TMA.
"""

import dataclasses
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax.gdn.hopper.config import CHUNK, GATE_ROWS, ForwardConfig
from ring_jax.gdn.hopper.prepare import across, down, row_index
from ring_jax.mosaic import compat, wgmma
from ring_jax.mosaic.fragments import load_transposed, store, store_transposed
from ring_jax.mosaic.pipeline import feed, ring_slot

_TILE = plgpu.Layout.WGMMA
_ROWS = plgpu.Layout.WGMMA.reduce(1)
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Problem:
    batch: int
    time: int
    key_heads: int
    heads: int
    key_size: int
    value_size: int
    scale: float
    initial: bool
    documents: bool
    dtype: Any
    config: ForwardConfig
    pieces: int = 1  # of the sequence, walked over at the same time, each from a state of its own

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.time, CHUNK)

    @property
    def length(self) -> int:
        """Chunks of a piece; the last one may have fewer."""
        return pl.cdiv(self.chunks, self.pieces)

    @property
    def slices(self) -> int:
        """Thread blocks of a value head."""
        return self.value_size // self.config.value_columns


def forward(problem: Problem, query, key, value, inverse, gates, starts, initial):
    """out [B, T, N, dv] and the final state transposed, [B, N, dv, dk] float32, from initial ones [B, N, pieces, dv, dk]."""
    config = problem.config
    stages, columns = config.stages, config.state_warpgroups
    operands = [query, key, value, inverse, gates]
    operands += [starts] if problem.documents else []
    operands += [initial] if problem.initial else []
    out_type = (
        compat.output_like((problem.batch, problem.time, problem.heads, problem.value_size), problem.dtype, *operands),
        compat.output_like(
            (problem.batch, problem.heads, problem.value_size, problem.key_size), jnp.float32, *operands
        ),
    )
    scratch = dict(
        q_smem=compat.tiled_smem((stages, CHUNK, problem.key_size), problem.dtype),
        k_smem=compat.tiled_smem((stages, CHUNK, problem.key_size), problem.dtype),
        v_smem=compat.tiled_smem((stages, columns, CHUNK, 64), problem.dtype),
        t_smem=compat.tiled_smem((stages, CHUNK, CHUNK), problem.dtype),
        p_smem=compat.tiled_smem((2, CHUNK, CHUNK), problem.dtype),
        o_smem=compat.tiled_smem((2, columns, CHUNK, 64), problem.dtype),
        gates_smem=plgpu.SMEM((stages, GATE_ROWS, CHUNK), jnp.float32),
        starts_smem=plgpu.SMEM((stages, CHUNK), jnp.int32),
        full=plgpu.Barrier(num_arrivals=4 + columns + problem.documents, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=1 + columns, num_barriers=stages),
        p_full=plgpu.Barrier(num_barriers=2),
        p_free=plgpu.Barrier(num_arrivals=columns, num_barriers=2),
    )

    def body(*refs, **scratch_refs):
        _body(problem, *refs, **scratch_refs)

    call = compat.kernel(
        body,
        name="gated_delta_forward",
        out_type=out_type,
        scratch=scratch,
        grid=(problem.batch * problem.heads * problem.pieces * problem.slices,),
        grid_names=("program",),
        num_threads=columns + 2,
        thread_name="warpgroup",
    )
    return call(*operands)


def _body(problem: Problem, query, key, value, inverse, gates, *refs, **scratch):
    refs = list(refs)
    starts = refs.pop(0) if problem.documents else None
    initial = refs.pop(0) if problem.initial else None
    out, final = refs
    config = problem.config
    warpgroup = lax.axis_index("warpgroup")
    program = lax.axis_index("program")
    part, program = lax.rem(program, problem.slices), lax.div(program, problem.slices)
    head, program = lax.rem(program, problem.heads), lax.div(program, problem.heads)
    piece, batch = lax.rem(program, problem.pieces), lax.div(program, problem.pieces)
    first = piece * problem.length
    count = problem.chunks if problem.pieces == 1 else lax.min(jnp.int32(problem.length), problem.chunks - first)
    key_head = lax.div(head, problem.heads // problem.key_heads)
    first_column = part * config.value_columns

    @pl.when(warpgroup < config.state_warpgroups)
    def _():
        plgpu.set_max_registers(config.state_registers, action="increase")
        columns = pl.ds(first_column + warpgroup * 64, 64)
        start = None if initial is None else initial.at[batch, head, piece, columns]

        def out_at(chunk):
            return out.at[batch, pl.ds((first + chunk) * CHUNK, CHUNK), head, columns]

        state = _state(problem, warpgroup, start, count, out_at, **scratch)

        @pl.when(piece == problem.pieces - 1)
        def _():
            compat.store(final.at[batch, head, columns], state)

        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == config.state_warpgroups)
    def _():
        action = "increase" if config.scores_registers > 128 else "decrease"
        plgpu.set_max_registers(config.scores_registers, action=action)
        compute_scores(problem, count, **scratch)

    @pl.when(warpgroup == config.state_warpgroups + 1)
    def _():
        plgpu.set_max_registers(config.memory_registers, action="decrease")

        def copies(chunk, slot, q_smem, k_smem, v_smem, t_smem, gates_smem, starts_smem, **_):
            chunk += first
            rows = pl.ds(chunk * CHUNK, CHUNK)
            yield key.at[batch, rows, key_head], k_smem.at[slot]
            yield gates.at[batch, head, chunk], gates_smem.at[slot]
            yield query.at[batch, rows, key_head], q_smem.at[slot]
            if starts is not None:
                yield starts.at[batch, chunk], starts_smem.at[slot]
            for w in range(config.state_warpgroups):
                columns = pl.ds(first_column + w * 64, 64)
                yield value.at[batch, rows, head, columns], v_smem.at[slot, w]
            yield inverse.at[batch, head, chunk], t_smem.at[slot]

        feed(count, config.stages, copies, **scratch)


def compute_scores(problem, count, *, q_smem, k_smem, p_smem, gates_smem, starts_smem, full, free, p_full, p_free, **_):
    """P of every chunk, rounded, to shared memory."""
    for slot in range(problem.config.stages):
        plgpu.barrier_arrive(free.at[slot])
    row = row_index()

    @pl.loop(0, count)
    def _(chunk):
        slot, p_slot = ring_slot(chunk, problem.config.stages), ring_slot(chunk, 2)
        plgpu.barrier_wait(full.at[slot])
        (products,) = wgmma.start_products((None, q_smem.at[slot], k_smem.at[slot]))
        gate = gates_smem.at[slot, 0]
        decay = jnp.exp2(across(compat.load(gate, _ROWS)) - down(compat.load(gate, _COLUMNS)))
        low = compat.load(starts_smem.at[slot], _ROWS) if problem.documents else None
        (products,) = wgmma.wait(0, products)
        scores = wgmma.mask(products * decay * problem.scale, low, row + 1, 0.0)
        plgpu.barrier_arrive(free.at[slot])
        plgpu.barrier_wait(p_free.at[p_slot])
        store(p_smem.at[p_slot], scores.astype(problem.dtype))
        plgpu.commit_smem()
        plgpu.barrier_arrive(p_full.at[p_slot])

    if compat.interpreting():
        for slot in range(2):
            plgpu.barrier_wait(p_free.at[slot])


def _state(problem, warpgroup, initial, count, out_at, *, q_smem, k_smem, v_smem, t_smem, p_smem, o_smem, gates_smem,
           full, free, p_full, p_free, **_):  # fmt: skip
    """The recurrence of 64 columns of a value head over `count` chunks: the state that it ends with."""
    dtype, config = problem.dtype, problem.config
    for slot in range(config.stages):
        plgpu.barrier_arrive(free.at[slot])
    for slot in range(2):
        plgpu.barrier_arrive(p_free.at[slot])

    def correction(read, from_start, values):
        return (values.astype(jnp.float32) - read * down(from_start)).astype(dtype)

    def stage(chunk, out):
        # The copy of two chunks ago has read this buffer.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        store_transposed(o_smem.at[ring_slot(chunk, 2), warpgroup], out.astype(dtype))

    def write(chunk):
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_smem.at[ring_slot(chunk, 2), warpgroup], out_at(chunk))

    def operands(slot):
        gate = gates_smem.at[slot]
        values = load_transposed(v_smem.at[slot, warpgroup])
        return values, compat.load(gate.at[1], _COLUMNS), gates_smem[slot, 1, CHUNK - 1]

    def in_turn(chunk, state):
        slot, half = ring_slot(chunk, config.stages), ring_slot(chunk, 2)
        k = k_smem.at[slot]
        rounded = state.astype(dtype)
        plgpu.barrier_wait(full.at[slot])
        products = wgmma.start_products((None, rounded, k), (None, rounded, q_smem.at[slot]))
        read, out = wgmma.wait(0, *products)
        values, from_start, total = operands(slot)
        y = correction(read, from_start, values)
        (u,) = wgmma.start_products((None, y, t_smem.at[slot]))
        out = out * down(from_start * problem.scale)
        state = state * total
        to_end = compat.load(gates_smem.at[slot, 2], _COLUMNS)
        (u,) = wgmma.wait(0, u)
        plgpu.barrier_wait(p_full.at[half])
        out, state = wgmma.start_products(
            (out, u.astype(dtype), p_smem.at[half], True), (state, (u * down(to_end)).astype(dtype), k)
        )
        (out,) = wgmma.wait(1, out)
        plgpu.barrier_arrive(p_free.at[half])
        stage(chunk, out)
        write(chunk)
        (state,) = wgmma.wait(0, state)
        plgpu.barrier_arrive(free.at[slot])
        return state

    def pipelined(chunk, carry):
        # P u of the last chunk runs while y of this one is computed, Q S while u is rounded.
        state, last_out, last_u, _ = carry
        slot, before = ring_slot(chunk, config.stages), ring_slot(chunk + 1, 2)
        k = k_smem.at[slot]
        rounded = state.astype(dtype)
        plgpu.barrier_wait(full.at[slot])
        read, last_out = wgmma.start_products((None, rounded, k), (last_out, last_u, p_smem.at[before], True))
        values, from_start, total = operands(slot)
        (read,) = wgmma.wait(1, read)
        y = correction(read, from_start, values)
        (u,) = wgmma.start_products((None, y, t_smem.at[slot]))
        state = state * total
        (last_out,) = wgmma.wait(1, last_out)

        @pl.when(chunk > 0)
        def _():
            plgpu.barrier_arrive(p_free.at[before])
            stage(chunk - 1, last_out)
            write(chunk - 1)

        # Not earlier, though the tensor cores wait for it: there are no more registers.
        (out,) = wgmma.start_products((None, rounded, q_smem.at[slot]))
        to_end = compat.load(gates_smem.at[slot, 2], _COLUMNS)
        (u,) = wgmma.wait(1, u)
        (state,) = wgmma.start_products((state, (u * down(to_end)).astype(dtype), k))
        u = u.astype(dtype)
        (out,) = wgmma.wait(1, out)
        from_start = compat.load(gates_smem.at[slot, 1], _COLUMNS)  # again: it would take registers all the while
        out = out * down(from_start * problem.scale)
        plgpu.barrier_wait(p_full.at[ring_slot(chunk, 2)])
        (state,) = wgmma.wait(0, state)
        plgpu.barrier_arrive(free.at[slot])
        return state, out, u, chunk

    if initial is None:
        state = plgpu.layout_cast(jnp.zeros((64, problem.key_size), jnp.float32), _TILE)
    else:
        # Nothing is in flight: the wait is for its type, which forgets over which mesh axes the array varies, as products do.
        (state,) = wgmma.wait(0, compat.load(initial, _TILE))
    if config.pipelined:
        out = plgpu.layout_cast(jnp.zeros((64, CHUNK), jnp.float32), _TILE)
        # Before the first chunk there is no P, and what comes of it is not stored.
        carry = (state, out, out.astype(dtype), jnp.int32(0))
        state, out, u, last = lax.fori_loop(0, count, pipelined, carry)
        (out,) = wgmma.wait(0, *wgmma.start_products((out, u, p_smem.at[ring_slot(last, 2)], True)))
        plgpu.barrier_arrive(p_free.at[ring_slot(last, 2)])
        stage(last, out)
        write(last)
    else:
        state = lax.fori_loop(0, count, in_turn, state)
    return state
