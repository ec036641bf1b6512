"""Gradients of the experts' weights, for Hopper GPUs (sm90), in Pallas Mosaic GPU.

    out[e] = sum over the rows r of expert e of  a[r]^T b[r]

Algorithm: persistent thread blocks walk over tiles of out, expert by expert; rows are what is contracted, 64 a step. The
memory warpgroup gathers one operand by token with cp.async (see `rows_kernel`), zeros beyond the last row of an expert, so
that groups end anywhere; the other one, whose rows are in order, comes by TMA. Both lie in shared memory with their rows as
K: wgmma transposes 16-bit operands as it reads them.
An expert without rows gets zeros.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax._vma import pcast_to, varying_axes
from ring_jax.moe.hopper import ptx
from ring_jax.moe.hopper.config import DEPTH, REGISTERS, ROWS, GroupedConfig
from ring_jax.moe.hopper.plan import Plan
from ring_jax.moe.hopper.rows_kernel import finish, hand_over
from ring_jax.mosaic import compat
from ring_jax.mosaic.pipeline import ring_slot


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything static: `experts` times [rows, columns]; which operands are gathered by token."""

    experts: int
    rows: int
    columns: int
    gather_a: bool
    gather_b: bool
    config: GroupedConfig

    @property
    def across(self) -> int:
        return self.columns // self.config.columns

    @property
    def copies(self) -> int:
        """TMA copies of a step."""
        return (0 if self.gather_a else self.config.warpgroups) + (0 if self.gather_b else self.config.chunks)

    @property
    def each(self) -> int:
        """Tiles of an expert."""
        return self.rows // self.config.rows * self.across


def outer_product(
    a: jax.Array, b: jax.Array, plan: Plan, config: GroupedConfig, *, gather_a=False, gather_b=False
) -> jax.Array:
    """Sums of a[r]^T b[r] over each expert's rows.

    Args:
        a: [A, M] in the plan's order of rows, or with `gather_a` [T, M], one row for each token. b: [A, N] likewise.
            One of them is gathered. What the other holds in rows of no expert here must be finite.
        config: its rows must divide M, its columns N.

    Returns:
        [E, M, N] in a's dtype.
    """
    experts = plan.groups.shape[0]
    problem = Problem(experts, a.shape[1], b.shape[1], gather_a, gather_b, config)
    if gather_a == gather_b:
        raise ValueError("one of the operands must be gathered: it has the zeros where an expert's rows end")
    if problem.rows % config.rows or problem.columns % config.columns or config.width != 64:
        raise ValueError(f"{config} cannot cut gradients [{problem.rows}, {problem.columns}]")
    operands = (a, b, plan.groups, plan.tokens)
    wgs, stages = config.warpgroups, config.stages
    scratch = dict(
        a_smem=ptx.chunk_smem((stages, wgs, DEPTH, ROWS), a.dtype),
        b_smem=ptx.chunk_smem((stages, config.chunks, DEPTH, config.width), a.dtype),
        staging=plgpu.SMEM((wgs, ROWS, config.pitch), a.dtype),
        full=plgpu.Barrier(num_arrivals=problem.copies + 1, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
    )

    call = compat.kernel(
        functools.partial(kernel, problem),
        name="grouped_outer",
        out_type=compat.output_like((experts * problem.rows, problem.columns), a.dtype, *operands),
        scratch=scratch,
        grid=(config.multiprocessors,),
        grid_names=("block",),
        num_threads=wgs + 1,
        thread_name="warpgroup",
    )
    # `plgpu.kernel` forgets over which manual mesh axes its outputs vary.
    out = pcast_to(call(*operands), varying_axes(operands))
    return out.reshape(experts, problem.rows, problem.columns)


def kernel(problem: Problem, a, b, groups, tokens, out, *, a_smem, b_smem, staging, full, free):
    config = problem.config
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    total = problem.experts * problem.each
    rounds = lax.div(total + config.multiprocessors - 1 - block, config.multiprocessors)

    def walk(body):
        """body(expert, row of out, column of out, first row, rows, first step) for each tile of this block."""

        def tile(index, step):
            number = block + index * config.multiprocessors
            expert = lax.div(number, problem.each)
            number -= expert * problem.each
            down = lax.div(number, problem.across)
            first = groups[expert, 0]
            rows = groups[expert, 1] - first
            row, column = down * config.rows, (number - down * problem.across) * config.columns
            body(expert, row, column, first, rows, step)
            return step + lax.div(rows + DEPTH - 1, DEPTH)

        return lax.fori_loop(0, rounds, tile, jnp.int32(0))

    @pl.when(warpgroup < config.warpgroups)
    def _compute():
        if config.warpgroups > 1:
            plgpu.set_max_registers(REGISTERS[0], action="increase")
        for slot in range(config.stages):
            plgpu.barrier_arrive(free.at[slot])

        def tile(expert, row, column, first, rows, step):
            mine = row + warpgroup * ROWS

            def write(acc):
                target = expert * problem.rows + mine
                ptx.stage(acc, staging.at[warpgroup], 0, config.columns)
                ptx.store(staging.at[warpgroup], out, None, target, jnp.int32(ROWS), column, config.columns)

            @pl.when(rows > 0)
            def _():
                write(
                    multiply_rows(config, step, lax.div(rows + DEPTH - 1, DEPTH), a_smem, b_smem, full, free, warpgroup)
                )

            @pl.when(rows <= 0)
            def _():
                zeros = jnp.zeros((ROWS, config.columns), jnp.float32)
                write(plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))

        walk(tile)
        ptx.stores_done()

    @pl.when(warpgroup == config.warpgroups)
    def _memory():
        if config.warpgroups > 1:
            plgpu.set_max_registers(REGISTERS[1], action="decrease")

        def tile(_, row, column, first, rows, step):
            sources = ((a, a_smem, row, problem.gather_a), (b, b_smem, column, problem.gather_b))

            def offsets(k):
                """Of the rows of step k that are gathered, read one step ahead: in a list, which has one entry."""
                at, left = first + k * DEPTH, rows - k * DEPTH
                return [
                    ptx.row_offsets(tokens, at, left, DEPTH, source.shape[1])
                    for source, _, _, by_token in sources
                    if by_token
                ]

            def load(k, now):
                following = offsets(k + 1)
                slot = ring_slot(step + k, config.stages)
                plgpu.barrier_wait(free.at[slot])
                for source, smem, begin, by_token in sources:
                    chunks = smem.shape[1]
                    for chunk in range(0 if by_token else chunks):
                        rows_of_step, columns = pl.ds(first + k * DEPTH, DEPTH), pl.ds(begin + chunk * 64, 64)
                        plgpu.copy_gmem_to_smem(source.at[rows_of_step, columns], smem.at[slot, chunk], full.at[slot])
                    if by_token:
                        ptx.gather(now.pop(0), source, smem.at[slot], begin, chunks)
                hand_over(config, full, step + k)
                return following

            steps = lax.div(rows + DEPTH - 1, DEPTH)
            if compat.interpreting():  # where offsets are no arrays
                pl.loop(0, steps)(lambda k: load(k, offsets(k)) and None)
            else:
                lax.fori_loop(0, steps, load, offsets(0))

        finish(config, full, free, walk(tile))


def multiply_rows(config: GroupedConfig, first_step, steps, a_smem, b_smem, full, free, warpgroup) -> jax.Array:
    """The sum over all steps of a tile, of which there is at least one, for one compute warpgroup."""

    def slot_of(k):
        return ring_slot(first_step + k, config.stages)

    def add(k, acc):
        slot = slot_of(k)
        plgpu.barrier_wait(full.at[slot])
        return ptx.multiply(acc, a_smem.at[slot, warpgroup], b_smem.at[slot], a_by_columns=True)

    def step(k, acc):
        acc = add(k + 1, acc)
        ptx.in_flight(1)
        plgpu.barrier_arrive(free.at[slot_of(k)])
        return acc

    # From 0, since the number of steps may vary over a manual mesh axis and the loop's own counter does not.
    acc = ptx.finished(lax.fori_loop(0, steps - 1, step, add(jnp.int32(0), None)))
    plgpu.barrier_arrive(free.at[slot_of(steps - 1)])
    return acc
