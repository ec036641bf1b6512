"""(M, B) of S_out = M S_in + B over stretches of a sequence, on Hopper: the rule applied to the states [0 | I] side by side.

Nothing is written into the second, so that [B | M] comes out, both carried in float32 registers. As in `forward_kernel` the
states are kept transposed, 64 columns of them in each *state* warpgroup, without what the outputs need:

    y^T = V^T - (S^T K^T) from_start (V = 0 for M);   u^T = y^T T^T;   S^T <- S^T total + (u^T to_end) K
"""

import dataclasses
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax.gdn.hopper.config import CHUNK, GATE_ROWS
from ring_jax.gdn.hopper.prepare import down
from ring_jax.mosaic import compat, wgmma
from ring_jax.mosaic.fragments import load_transposed
from ring_jax.mosaic.pipeline import ring_slot

_TILE = plgpu.Layout.WGMMA
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
_STAGES = 4
_STATE_REGISTERS, _MEMORY_REGISTERS = 232, 24


@dataclasses.dataclass(frozen=True)
class Problem:
    batch: int
    chunks: int
    key_heads: int
    heads: int
    key_size: int
    value_size: int
    pieces: int  # stretches of `length` chunks; the last one may be shorter
    length: int
    dtype: Any

    @property
    def columns(self) -> int:
        return self.value_size + self.key_size

    @property
    def warpgroups(self) -> int:
        return 2 if self.columns % 128 == 0 else 1

    @property
    def slices(self) -> int:
        return self.columns // (64 * self.warpgroups)


def transition(problem: Problem, key, value, inverse, gates):
    """[B, N, pieces, dv + dk, dk] float32: the transposes of B and of M of each piece, one below the other."""
    operands = key, value, inverse, gates
    shape = (problem.batch, problem.heads, problem.pieces, problem.columns, problem.key_size)
    warpgroups = problem.warpgroups
    scratch = dict(
        k_smem=compat.tiled_smem((_STAGES, CHUNK, problem.key_size), problem.dtype),
        v_smem=compat.tiled_smem((_STAGES, warpgroups, CHUNK, 64), problem.dtype),
        t_smem=compat.tiled_smem((_STAGES, CHUNK, CHUNK), problem.dtype),
        gates_smem=plgpu.SMEM((_STAGES, GATE_ROWS, CHUNK), jnp.float32),
        full=plgpu.Barrier(num_arrivals=3 + warpgroups, num_barriers=_STAGES),
        free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=_STAGES),
    )

    def body(*refs, **scratch_refs):
        _body(problem, *refs, **scratch_refs)

    call = compat.kernel(
        body,
        name="gated_delta_transition",
        out_type=compat.output_like(shape, jnp.float32, *operands),
        scratch=scratch,
        grid=(problem.batch * problem.heads * problem.pieces * problem.slices,),
        grid_names=("program",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
    )
    return call(*operands)


def _body(problem: Problem, key, value, inverse, gates, final, **scratch):
    warpgroup = lax.axis_index("warpgroup")
    program = lax.axis_index("program")
    part, program = lax.rem(program, problem.slices), lax.div(program, problem.slices)
    head, program = lax.rem(program, problem.heads), lax.div(program, problem.heads)
    piece, batch = lax.rem(program, problem.pieces), lax.div(program, problem.pieces)
    first = piece * problem.length
    count = lax.min(jnp.int32(problem.length), problem.chunks - first)

    @pl.when(warpgroup < problem.warpgroups)
    def _():
        plgpu.set_max_registers(_STATE_REGISTERS, action="increase")
        column = (part * problem.warpgroups + warpgroup) * 64
        target = final.at[batch, head, piece, pl.ds(column, 64)]
        _state(problem, warpgroup, column - problem.value_size, count, target, **scratch)

    @pl.when(warpgroup == problem.warpgroups)
    def _():
        plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")
        _memory(problem, (batch, head, part, first, count), key, value, inverse, gates, **scratch)


def _memory(problem, place, key, value, inverse, gates, *, k_smem, v_smem, t_smem, gates_smem, full, free):
    batch, head, part, first, count = place
    key_head = lax.div(head, problem.heads // problem.key_heads)

    @pl.loop(0, count)
    def _(i):
        slot, chunk = ring_slot(i, _STAGES), first + i
        rows = pl.ds(chunk * CHUNK, CHUNK)
        plgpu.barrier_wait(free.at[slot])

        def copy(source, target):
            plgpu.copy_gmem_to_smem(source, target, full.at[slot])

        copy(key.at[batch, rows, key_head], k_smem.at[slot])
        copy(gates.at[batch, head, chunk], gates_smem.at[slot])
        for w in range(problem.warpgroups):
            # The columns of M have no values: what comes in their place is not used.
            column = (part * problem.warpgroups + w) * 64
            columns = pl.ds(jnp.where(column < problem.value_size, column, 0), 64)
            copy(value.at[batch, rows, head, columns], v_smem.at[slot, w])
        copy(inverse.at[batch, head, chunk], t_smem.at[slot])

    if compat.interpreting():
        for slot in range(_STAGES):
            plgpu.barrier_wait(free.at[slot])


def _state(problem, warpgroup, column, count, target, *, k_smem, v_smem, t_smem, gates_smem, full, free):
    """64 columns of [B | M], of M from column `column` on where that is not negative."""
    shape = (64, problem.key_size)
    for slot in range(_STAGES):
        plgpu.barrier_arrive(free.at[slot])
    writes = column < 0

    def step(i, state):
        slot = ring_slot(i, _STAGES)
        k, gate = k_smem.at[slot], gates_smem.at[slot]
        rounded = state.astype(problem.dtype)
        plgpu.barrier_wait(full.at[slot])
        (read,) = wgmma.start_products((None, rounded, k))
        values = load_transposed(v_smem.at[slot, warpgroup])
        values = jnp.where(writes, values, jnp.zeros_like(values))
        from_start, total = compat.load(gate.at[1], _COLUMNS), gates_smem[slot, 1, CHUNK - 1]
        (read,) = wgmma.wait(0, read)
        y = (values.astype(jnp.float32) - read * down(from_start)).astype(problem.dtype)
        (u,) = wgmma.start_products((None, y, t_smem.at[slot]))
        state = state * total
        to_end = compat.load(gate.at[2], _COLUMNS)
        (u,) = wgmma.wait(0, u)
        u = (u * down(to_end)).astype(problem.dtype)
        (state,) = wgmma.wait(0, *wgmma.start_products((state, u, k)))
        plgpu.barrier_arrive(free.at[slot])
        return state

    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_TILE)
    unit = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_TILE) == row + column
    one, zero = (plgpu.layout_cast(jnp.full(shape, x, jnp.float32), _TILE) for x in (1.0, 0.0))
    state = jnp.where(unit, one, zero)
    compat.store(target, lax.fori_loop(0, count, step, state))
