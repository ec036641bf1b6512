"""Rows times the weights of their experts, for Hopper GPUs (sm90), in Pallas Mosaic GPU.

    out[r] = a[r] W[expert of r]      or, with SwiGLU,      out[r] = silu(a[r] W_gate) * (a[r] W_up)

Algorithm: a grouped matrix product on tiles of rows that share one expert (`plan`), by persistent thread blocks: a *memory*
warpgroup fills a ring of `stages` steps of 64 columns of A and rows of W, *compute* warpgroups multiply 64 rows each.
Rows are found through the routing: A is gathered from the tokens by cp.async (where it is in order, it comes by TMA, as W
does), and each result row is copied to its place on its own, so that no array is padded or permuted and groups end anywhere
(SonicMoE, Guo et al. 2025, arXiv 2512.14080, gathers so, too).

Tiles go expert by expert, and all columns of one band of tiles of rows come first: thread blocks that run side by side share rows
and weights in L2. A warpgroup without rows in a tile lets its steps pass. Slots follow from a counter of steps that runs
through all tiles, and are declared free at first, see `flash.hopper.forward_kernel`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax._vma import pcast_to, varying_axes
from ring_jax.moe.hopper import ptx
from ring_jax.moe.hopper.config import DEPTH, REGISTERS, ROWS, GroupedConfig
from ring_jax.moe.hopper.plan import Plan
from ring_jax.mosaic import compat
from ring_jax.mosaic.pipeline import ring_slot


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything static: `depth` is contracted, `columns` are W's. `gather`, `scatter`: A, out by token, by assignment."""

    depth: int
    columns: int
    by_columns: bool
    gather: bool
    scatter: bool
    keep: bool
    config: GroupedConfig

    @property
    def steps(self) -> int:
        return self.depth // DEPTH

    @property
    def across(self) -> int:
        """Tiles that one tile of rows makes."""
        return self.columns // self.config.columns

    def column(self, tile: Any, chunk: int) -> Any:
        """The first column of W of a chunk."""
        config = self.config
        if not config.swiglu:
            return tile * config.columns + chunk * config.width
        half = config.chunks // 2
        first = self.columns // 2 if chunk >= half else 0
        return first + tile * config.result_columns + chunk % half * config.width


def rows_product(
    a: jax.Array,
    w: jax.Array,
    plan: Plan,
    config: GroupedConfig,
    *,
    gather=False,
    scatter=False,
    transposed=False,
    keep=False,
):
    """a[r] W[e] for every row r of the plan.

    Args:
        a: [A, K] in the plan's order of rows, or with `gather` [T, K], one row for each token.
        w: [E, K, N], or with `transposed` [E, N, K]. With SwiGLU the first half of the N columns are gate.
        config: its columns must divide N; K must be a multiple of 64.

    Returns:
        [A, N], or with SwiGLU [A, N / 2], in a's dtype; with `scatter` row by row of assignments. Rows of no expert
        here are not written. With `keep`, SwiGLU's argument [A, N], gate first, as well.
    """
    depth, columns = (w.shape[2], w.shape[1]) if transposed else w.shape[1:]
    problem = Problem(depth, columns, not transposed, gather, scatter, keep, config)
    if depth % DEPTH or columns % config.columns or plan.rows != config.rows:
        raise ValueError(f"{config} cannot cut a product of {depth=}, {columns=} with tiles of {plan.rows} rows")
    if keep and not config.swiglu:
        raise ValueError("only a SwiGLU product has an argument to keep")
    if transposed and config.width != 64:
        raise ValueError(f"transposed weights need chunks of 64, got {config.width=}")
    indices = ((plan.tokens,) if gather else ()) + ((plan.order,) if scatter else ())
    operands = (a, w, plan.tiles, plan.count, *indices)
    width = columns // 2 if config.swiglu else columns
    wgs, stages = config.warpgroups, config.stages
    chunk_shape = (stages, config.chunks, DEPTH, config.width)
    scratch = dict(
        a_smem=ptx.chunk_smem((stages, wgs, ROWS, DEPTH), a.dtype),
        b_smem=ptx.chunk_smem(chunk_shape, a.dtype),
        staging=plgpu.SMEM((wgs, ROWS, config.pitch), a.dtype),
        full=plgpu.Barrier(num_arrivals=config.chunks + (1 if gather else wgs), num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
    )

    call = compat.kernel(
        functools.partial(kernel, problem),
        name=("dense" if w.shape[0] == 1 else "grouped") + ("_swiglu" if config.swiglu else "_rows"),
        out_type=tuple(
            compat.output_like((plan.order.shape[0], n), a.dtype, *operands)
            for n in ((width, columns) if keep else (width,))
        ),
        scratch=scratch,
        grid=(config.multiprocessors,),
        grid_names=("block",),
        num_threads=wgs + 1,
        thread_name="warpgroup",
    )
    # `plgpu.kernel` forgets over which manual mesh axes its outputs vary.
    results = pcast_to(call(*operands), varying_axes(operands))
    return results if keep else results[0]


def kernel(problem: Problem, a, w, tiles, count, *refs, a_smem, b_smem, staging, full, free):
    results = refs[-1 - problem.keep :]
    indices = list(refs[: -len(results)])
    tokens = indices.pop(0) if problem.gather else None
    order = indices.pop(0) if problem.scatter else None
    config, steps = problem.config, problem.steps
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    rounds = lax.div(count[0] * problem.across + (config.multiprocessors - 1 - block), config.multiprocessors)

    def item(index):
        """(expert, first row, rows, tile of columns) of this block's tile number `index`."""
        tile = block + index * config.multiprocessors
        first = lax.div(tile, config.band * problem.across) * config.band
        size = jnp.minimum(config.band, count[0] - first)
        tile = tile - first * problem.across
        column = lax.div(tile, size)
        of_rows = first + tile - column * size
        return tiles[of_rows, 0], tiles[of_rows, 1], tiles[of_rows, 2], column

    @pl.when(warpgroup < config.warpgroups)
    def _compute():
        if config.warpgroups > 1:
            plgpu.set_max_registers(REGISTERS[0], action="increase")
        for slot in range(config.stages):
            plgpu.barrier_arrive(free.at[slot])

        @pl.loop(0, rounds)
        def _(index):
            _, first, rows, tile = item(index)
            mine = rows - warpgroup * ROWS

            @pl.when(mine > 0)
            def _():
                acc = multiply_tile(problem, index * steps, a_smem, b_smem, full, free, warpgroup)
                write_tile(problem, acc, staging.at[warpgroup], results, order, first + warpgroup * ROWS, mine, tile)

            @pl.when(mine <= 0)
            def _():
                @pl.loop(0, steps)
                def _(k):
                    slot = ring_slot(index * steps + k, config.stages)
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.barrier_arrive(free.at[slot])

        ptx.stores_done()

    @pl.when(warpgroup == config.warpgroups)
    def _memory():
        if config.warpgroups > 1:
            plgpu.set_max_registers(REGISTERS[1], action="decrease")

        @pl.loop(0, rounds)
        def _(index):
            expert, first, rows, tile = item(index)
            offsets = ptx.row_offsets(tokens, first, rows, config.rows, problem.depth) if problem.gather else None

            @pl.loop(0, steps)
            def _(k):
                step = index * steps + k
                slot = ring_slot(step, config.stages)
                plgpu.barrier_wait(free.at[slot])
                for chunk in range(config.chunks):
                    depth, column = pl.ds(k * DEPTH, DEPTH), problem.column(tile, chunk)
                    if problem.by_columns:
                        source = w.at[expert, depth, pl.ds(column, config.width)]
                    else:
                        source = w.at[expert, pl.ds(column, 64), depth]
                    plgpu.copy_gmem_to_smem(source, b_smem.at[slot, chunk], full.at[slot])
                if problem.gather:
                    ptx.gather(offsets, a, a_smem.at[slot], k * DEPTH)
                    hand_over(config, full, step)
                    return
                size = min(config.rows, ROWS)
                for block_of_rows in range(config.warpgroups):
                    source = a.at[pl.ds(first + block_of_rows * ROWS, size), pl.ds(k * DEPTH, DEPTH)]
                    plgpu.copy_gmem_to_smem(source, a_smem.at[slot, block_of_rows, pl.ds(0, size)], full.at[slot])

        finish(config, full if problem.gather else None, free, rounds * steps)


def write_tile(problem: Problem, acc, staging, results, order, first, rows, tile) -> None:
    """Stores 64 rows of a tile, of which the first `rows` are real."""
    config = problem.config
    size = config.result_columns
    column = tile * size
    if problem.keep:
        for half in range(2):
            ptx.stage(acc, staging, half * size, size)
            ptx.store(staging, results[1], None, first, rows, half * (problem.columns // 2) + column, size)
    ptx.stage(acc, staging, 0, size, config.swiglu)
    ptx.store(staging, results[0], order, first, rows, column, size)


def multiply_tile(problem, first_step, a_smem, b_smem, full, free, warpgroup) -> jax.Array:
    """The sum over all steps of a tile, for one compute warpgroup."""
    config = problem.config

    def slot_of(k):
        return ring_slot(first_step + k, config.stages)

    def add(k, acc):
        slot = slot_of(k)
        plgpu.barrier_wait(full.at[slot])
        a, b = a_smem.at[slot, warpgroup], b_smem.at[slot]
        return ptx.multiply(acc, a, b, b_by_columns=problem.by_columns)

    def step(k, acc):
        acc = add(k, acc)
        ptx.in_flight(1)
        plgpu.barrier_arrive(free.at[slot_of(k - 1)])
        return acc

    acc = lax.fori_loop(1, problem.steps, step, add(0, None))
    acc = ptx.finished(acc)
    plgpu.barrier_arrive(free.at[slot_of(problem.steps - 1)])
    return acc


def hand_over(config: GroupedConfig, full, step) -> None:
    """Declares full what was gathered `lag` steps ago, which has arrived meanwhile."""

    @pl.when(step >= config.lag)
    def _():
        ptx.gathered(config.lag)
        plgpu.barrier_arrive(full.at[ring_slot(step - config.lag, config.stages)])


def finish(config: GroupedConfig, full, free, steps) -> None:
    """Hands over what is left of `steps` steps; `full` is None where nothing was gathered."""
    if full is not None:
        ptx.gathered(0)
        left = jnp.minimum(steps, config.lag)

        @pl.loop(0, left)
        def _(i):
            plgpu.barrier_arrive(full.at[ring_slot(steps - left + i, config.stages)])

    if compat.interpreting():  # which wants every phase of a barrier to be seen
        for slot in range(config.stages):
            plgpu.barrier_wait(free.at[slot])
