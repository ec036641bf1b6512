"""The two recurrences of the backward of the gated delta rule over the chunks of a sequence, on Hopper, side by side in one launch.

Half of the thread blocks walk *ahead* and make again what the forward had, half of them walk *back* with the gradient of the
state; neither needs the other. Both keep 64 columns of a value head's state transposed in float32 registers, as
`forward_kernel` does. With T = (I + strict_lower[K K^T . D] diag(beta))^-1 of a chunk, P and the decays as there, S the state
that enters a chunk and dS the gradient of the state that leaves it:

    ahead:  z^T = (V^T - (S^T K^T) from_start) T^T;                  S^T <- S^T total + (z^T beta to_end) K
    back:   dV^T = ((dS^T K^T) to_end + dO^T P) beta T
            dS^T <- dS^T total + (dO^T scale from_start) Q - (dV^T from_start) K

beta z is what the forward calls u. S, z, dS and dV (a result) of every chunk go to memory in 16 bits: `gradient_kernel` makes the
other gradients of them. With beta on this side of the inverse beta = 0 is no special case there.
"""

import dataclasses
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax.gdn.hopper.config import CHUNK, GATE_ROWS, ForwardConfig
from ring_jax.gdn.hopper.forward_kernel import compute_scores
from ring_jax.gdn.hopper.prepare import down
from ring_jax.mosaic import compat, wgmma
from ring_jax.mosaic.fragments import load_transposed, store, store_transposed
from ring_jax.mosaic.pipeline import feed, ring_slot

_TILE = plgpu.Layout.WGMMA
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
    documents: bool
    dtype: Any
    config: ForwardConfig
    only_gradient: bool = False

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.time, CHUNK)

    @property
    def slices(self) -> int:
        return self.value_size // 64


def recurrences(problem: Problem, query, key, value, out_gradient, inverse, gates, starts, initial, last):
    """S, z [B, T, N, dv], dS, dV, the gradient of the initial state; S and dS of every chunk, transposed: [B, N, chunks, dv, dk].

    `initial` (the state) and `last` (the gradient of the final one) are [B, N, dv, dk] float32, as is the last result; with
    `only_gradient` that is all there is, and nobody walks ahead.
    """
    config = problem.config
    operands = [query, key, value, out_gradient, inverse, gates, initial, last]
    operands += [starts] if problem.documents else []
    per_head = (problem.batch, problem.heads)
    states = compat.output_like(
        (*per_head, problem.chunks, problem.value_size, problem.key_size), problem.dtype, *operands
    )
    tokens = compat.output_like(value.shape, problem.dtype, *operands)
    gradient = compat.output_like((*per_head, problem.value_size, problem.key_size), jnp.float32, *operands)
    stages = config.stages
    scratch = dict(
        q_smem=compat.tiled_smem((stages, CHUNK, problem.key_size), problem.dtype),
        k_smem=compat.tiled_smem((stages, CHUNK, problem.key_size), problem.dtype),
        v_smem=compat.tiled_smem((stages, CHUNK, 64), problem.dtype),
        t_smem=compat.tiled_smem((stages, CHUNK, CHUNK), problem.dtype),
        p_smem=compat.tiled_smem((2, CHUNK, CHUNK), problem.dtype),
        s_smem=compat.tiled_smem((2, 64, problem.key_size), problem.dtype),
        z_smem=compat.tiled_smem((2, CHUNK, 64), problem.dtype),
        gates_smem=plgpu.SMEM((stages, GATE_ROWS, CHUNK), jnp.float32),
        starts_smem=plgpu.SMEM((stages, CHUNK), jnp.int32),
        ahead_full=plgpu.Barrier(num_arrivals=4, num_barriers=stages),
        ahead_free=plgpu.Barrier(num_barriers=stages),
        back_full=plgpu.Barrier(num_arrivals=5 + problem.documents, num_barriers=stages),
        back_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        p_full=plgpu.Barrier(num_barriers=2),
        p_free=plgpu.Barrier(num_barriers=2),
    )

    def body(*refs, **scratch_refs):
        _body(problem, *refs, **scratch_refs)

    call = compat.kernel(
        body,
        name="gated_delta_recurrences",
        out_type=gradient if problem.only_gradient else (states, tokens, states, tokens, gradient),
        scratch=scratch,
        grid=((1 if problem.only_gradient else 2) * problem.batch * problem.heads * problem.slices,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
    )
    return call(*operands)


def _body(problem, query, key, value, out_gradient, inverse, gates, initial, last, *refs, ahead_full, ahead_free, back_full,
          back_free, **scratch):  # fmt: skip
    *refs, gradient = refs
    starts, (states, z, ends, dv) = (refs, [None] * 4) if problem.only_gradient else (refs[:-4], refs[-4:])
    config = problem.config
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    backward = jnp.int32(1)
    if not problem.only_gradient:
        backward, program = lax.rem(program, 2), lax.div(program, 2)
    part, program = lax.rem(program, problem.slices), lax.div(program, problem.slices)
    head, batch = lax.rem(program, problem.heads), lax.div(program, problem.heads)
    key_head = lax.div(head, problem.heads // problem.key_heads)
    columns = pl.ds(part * 64, 64)

    def targets(states, tokens):
        def at(chunk):
            return states.at[batch, head, chunk, columns], tokens.at[batch, _tokens(chunk), head, columns]

        return at

    def copies(chunk, slot, values, q_smem, k_smem, v_smem, t_smem, gates_smem, starts_smem, **_):
        yield key.at[batch, _tokens(chunk), key_head], k_smem.at[slot]
        yield gates.at[batch, head, chunk], gates_smem.at[slot]
        yield values.at[batch, _tokens(chunk), head, columns], v_smem.at[slot]
        if values is out_gradient:
            yield query.at[batch, _tokens(chunk), key_head], q_smem.at[slot]
            for ref in starts:
                yield ref.at[batch, chunk], starts_smem.at[slot]
        yield inverse.at[batch, head, chunk], t_smem.at[slot]

    when_ahead = (lambda body: None) if problem.only_gradient else pl.when(backward == 0)
    ahead, back = dict(full=ahead_full, free=ahead_free), dict(full=back_full, free=back_free)

    @pl.when(warpgroup == 0)
    def _():
        plgpu.set_max_registers(config.state_registers, action="increase")

        @when_ahead
        def _():
            _ahead(problem, initial.at[batch, head, columns], targets(states, z), **ahead, **scratch)

        @pl.when(backward == 1)
        def _():
            start = last.at[batch, head, columns]
            compat.store(gradient.at[batch, head, columns], _back(problem, start, targets(ends, dv), **back, **scratch))

        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 1)
    def _():
        plgpu.set_max_registers(config.scores_registers, action="decrease")

        @pl.when(backward == 1)
        def _():
            compute_scores(problem, problem.chunks, **back, **scratch)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(config.memory_registers, action="decrease")

        @when_ahead
        def _():
            feed(problem.chunks, config.stages, lambda i, *at, **to: copies(i, *at, value, **to), **ahead, **scratch)

        @pl.when(backward == 1)
        def _():
            end = problem.chunks - 1
            come = lambda i, *at, **to: copies(end - i, *at, out_gradient, **to)  # noqa: E731
            feed(problem.chunks, config.stages, come, **back, **scratch)


def _tokens(chunk):
    return pl.ds(chunk * CHUNK, CHUNK)


def _write(half, targets, s_smem, z_smem):
    plgpu.commit_smem()
    for source, target in zip((s_smem, z_smem), targets, strict=True):
        plgpu.copy_smem_to_gmem(source.at[half], target)


def _loaded(ref):
    # Nothing is in flight: the wait is for its type, which forgets over which mesh axes the array varies, as products do.
    return wgmma.wait(0, compat.load(ref, _TILE))[0]


def _ahead(problem, initial, targets, *, k_smem, v_smem, t_smem, s_smem, z_smem, gates_smem, full, free, **_):
    dtype, stages = problem.dtype, problem.config.stages
    for slot in range(stages):
        plgpu.barrier_arrive(free.at[slot])

    def step(chunk, state):
        slot, half = ring_slot(chunk, stages), ring_slot(chunk, 2)
        k, gate = k_smem.at[slot], gates_smem.at[slot]
        rounded = state.astype(dtype)
        plgpu.barrier_wait(full.at[slot])
        (read,) = wgmma.start_products((None, rounded, k))
        plgpu.wait_smem_to_gmem(2, wait_read_only=True)  # the copies of two chunks ago have read their buffers
        store(s_smem.at[half], rounded)
        values, total = load_transposed(v_smem.at[slot]), gates_smem[slot, 1, CHUNK - 1]
        from_start = compat.load(gate.at[1], _COLUMNS)
        (read,) = wgmma.wait(0, read)
        y = (values.astype(jnp.float32) - read * down(from_start)).astype(dtype)
        (z,) = wgmma.start_products((None, y, t_smem.at[slot]))
        state = state * total
        factor = compat.load(gate.at[2], _COLUMNS) * compat.load(gate.at[3], _COLUMNS)
        (z,) = wgmma.wait(0, z)
        (state,) = wgmma.start_products((state, (z * down(factor)).astype(dtype), k))
        store_transposed(z_smem.at[half], z.astype(dtype))
        _write(half, targets(chunk), s_smem, z_smem)
        (state,) = wgmma.wait(0, state)
        plgpu.barrier_arrive(free.at[slot])
        return state

    lax.fori_loop(0, problem.chunks, step, _loaded(initial))


def _back(problem, last, targets, *, q_smem, k_smem, v_smem, t_smem, p_smem, s_smem, z_smem, gates_smem, full, free, p_full,
          p_free, **_):  # fmt: skip
    dtype, stages = problem.dtype, problem.config.stages
    for slot in range(stages):
        plgpu.barrier_arrive(free.at[slot])
    for slot in range(2):
        plgpu.barrier_arrive(p_free.at[slot])

    def step(i, gradient):
        slot, half = ring_slot(i, stages), ring_slot(i, 2)
        k, gate = k_smem.at[slot], gates_smem.at[slot]
        rounded = gradient.astype(dtype)
        plgpu.barrier_wait(full.at[slot])
        d_out, total = load_transposed(v_smem.at[slot]), gates_smem[slot, 1, CHUNK - 1]
        from_start = compat.load(gate.at[1], _COLUMNS)
        scaled = (d_out.astype(jnp.float32) * down(from_start * problem.scale)).astype(dtype)
        gradient = gradient * total
        du, gradient = wgmma.start_products((None, rounded, k), (gradient, scaled, q_smem.at[slot]))
        plgpu.wait_smem_to_gmem(2, wait_read_only=True)  # the copies of two chunks ago have read their buffers
        if not problem.only_gradient:
            store(s_smem.at[half], rounded)
        to_end = compat.load(gate.at[2], _COLUMNS)
        (du,) = wgmma.wait(1, du)
        du = du * down(to_end)
        plgpu.barrier_wait(p_full.at[half])
        (du,) = wgmma.start_products((du, d_out, p_smem.at[half]))
        du, gradient = wgmma.wait(0, du, gradient)
        plgpu.barrier_arrive(p_free.at[half])
        du = (du * down(compat.load(gate.at[3], _COLUMNS))).astype(dtype)
        (dv,) = wgmma.start_products((None, du, t_smem.at[slot], False))
        from_start = compat.load(gate.at[1], _COLUMNS)
        (dv,) = wgmma.wait(0, dv)
        (gradient,) = wgmma.start_products((gradient, (dv * down(-from_start)).astype(dtype), k))
        if not problem.only_gradient:
            store_transposed(z_smem.at[half], dv.astype(dtype))
            _write(half, targets(problem.chunks - 1 - i), s_smem, z_smem)
        (gradient,) = wgmma.wait(0, gradient)
        plgpu.barrier_arrive(free.at[slot])
        return gradient

    return lax.fori_loop(0, problem.chunks, step, _loaded(last))
