"""A few rows times a weight on Hopper, with what lies around the product.

    y = epilogue(rms_norm(x) W);   epilogue: SwiGLU of two columns of W, what the result is added to

Bound by reading W once: no tensor cores, whose tiles would hold 64 rows. A program makes `columns` results of each row. Its threads
load W 16 bytes each, a warp whole lines of some rows, and multiply-add in float32, `loads` pieces in flight for each thread. Sums over
the rows of W come together at the end: within a warp by shuffles, then through shared memory.

The norm costs no pass: the weight of the norm multiplies x on the way, and one over the root of the mean square is a factor of the
sum. So neither is rounded before the product.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax.mosaic import compat
from ring_jax.nn.hopper.config import LANES, VECTOR, WARPS, FewRowsConfig


@dataclasses.dataclass(frozen=True)
class Problem:
    """One launch.

    Fields:
        rows, depth: of x. results: of each row.
        swiglu: W has 2 `results` columns, gate first. norm_epsilon: None for no norm. added: whether there is what is added.
    """

    rows: int
    depth: int
    results: int
    swiglu: bool
    norm_epsilon: float | None
    added: bool
    config: FewRowsConfig

    @property
    def halves(self) -> int:
        return 2 if self.swiglu else 1


def piece_layout(rows: int, columns: int) -> Any:
    """[4, rows, columns]: the first axis is the warp, a thread has eight columns of a row."""
    return compat.tiled_layout(((WARPS, rows, columns), (1, rows, columns), (1, 1, VECTOR)), (-9,), (-5, -4))


def results_layout(columns: int) -> Any:
    """[columns], the same in every warp."""
    lanes = min(columns, LANES)
    replicated = fragmented_array.Replicated
    within = (-2,) if lanes == LANES else (replicated(LANES // lanes), -2)
    return compat.tiled_layout(((columns,), (lanes,), (1,)), (replicated(WARPS),), within)


def scratch(problem: Problem) -> dict[str, Any]:
    """Shared memory of a program."""
    config, warps = problem.config, problem.config.warpgroups * WARPS
    found = dict(
        sums=plgpu.SMEM((warps, problem.halves * problem.rows, config.columns), jnp.float32),
        full=plgpu.Barrier(num_arrivals=config.warpgroups),
    )
    if problem.norm_epsilon is not None:
        found["squares"] = plgpu.SMEM((warps, problem.rows), jnp.float32)
    return found


def kernel(problem: Problem, x_ref, w_ref, *refs, sums, full, squares=None) -> None:
    """x [R, K / n, n], W [K / n, n, N] (n: the config's `warp_rows`); the norm's weight [K / n, n] and what is added [R, N], if there
    are; out."""
    *refs, out_ref = refs
    norm_ref = refs.pop(0) if problem.norm_epsilon is not None else None
    added_refs = refs[: problem.added]
    columns, warpgroups = problem.config.columns, problem.config.warpgroups
    warpgroup = lax.axis_index("warpgroup")
    first = lax.axis_index("program") * columns
    here, layout = pl.ds(first, columns), results_layout(columns)
    added = [compat.load(ref.at[r, here], layout) for ref in added_refs for r in range(problem.rows)]
    totals, own = _multiply(problem, x_ref, w_ref, norm_ref, warpgroup, first)
    mine = pl.ds(warpgroup * WARPS, WARPS)
    for i, total in enumerate(totals):
        compat.store(sums.at[mine, i], jnp.sum(total, axis=1))
    for r, each in enumerate(own):
        compat.store(squares.at[mine, r], jnp.sum(each, axis=1))
    plgpu.commit_smem()
    plgpu.barrier_arrive(full)
    plgpu.barrier_wait(full)
    for r in range(problem.rows):

        @pl.when(warpgroup == r % warpgroups)
        def _(r=r):
            parts = [sum_over(sums, half * problem.rows + r, layout) for half in range(problem.halves)]
            if squares is not None:
                total = squares[0, r]
                for i in range(1, squares.shape[0]):
                    total = total + squares[i, r]
                factor = lax.rsqrt(total * (1.0 / problem.depth) + problem.norm_epsilon)
                parts = [part * factor for part in parts]
            y = swiglu(*parts) if problem.swiglu else parts[0]
            if added:
                y = y + added[r].astype(jnp.float32)
            compat.store(out_ref.at[r, here], y.astype(out_ref.dtype))


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return gate * up / (1.0 + jnp.exp(-gate))


def sum_over(sums: Any, index: Any, layout: Any) -> jax.Array:
    """Of sums [n, ...] the sum over n at `index`, in order."""
    total = compat.load(sums.at[0, index], layout)
    for i in range(1, sums.shape[0]):
        total = total + compat.load(sums.at[i, index], layout)
    return total


def _multiply(problem: Problem, x_ref, w_ref, norm_ref, warpgroup, first) -> tuple[list[jax.Array], list[jax.Array]]:
    """This warpgroup's part of the products, gate then up, and of the squares, each still spread over rows of W."""
    config = problem.config
    shape = WARPS, config.warp_rows, config.columns
    layout = piece_layout(*shape[1:])
    by_row = layout.reduce(2)
    halves = [pl.ds(first + half * problem.results, config.columns) for half in range(problem.halves)]
    normed = norm_ref is not None

    def zeros(shape: tuple[int, ...], layout: Any) -> jax.Array:
        return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)

    def step(i: jax.Array, carry: Any) -> Any:
        totals, own = list(carry[0]), list(carry[1])
        pieces = [
            pl.ds(((i * config.loads + n) * config.warpgroups + warpgroup) * WARPS, WARPS) for n in range(config.loads)
        ]
        # All loads of W first: those of x hit a cache.
        weights = [[compat.load(w_ref.at[piece, :, half], layout) for half in halves] for piece in pieces]
        for piece, loaded in zip(pieces, weights, strict=True):
            wide = [w.astype(jnp.float32) for w in loaded]
            scale = 1.0 + compat.load(norm_ref.at[piece], by_row).astype(jnp.float32) if normed else None
            for r in range(problem.rows):
                x = compat.load(x_ref.at[r, piece], by_row).astype(jnp.float32)
                if normed:
                    own[r] = own[r] + x * x
                    x = x * scale
                x = plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (0, 1)), layout)
                for half, w in enumerate(wide):
                    n = half * problem.rows + r
                    totals[n] = totals[n] + w * x
        return tuple(totals), tuple(own)

    start = (
        tuple(zeros(shape, layout) for _ in range(problem.halves * problem.rows)),
        tuple(zeros(shape[:2], by_row) for _ in range(problem.rows if normed else 0)),
    )
    totals, own = lax.fori_loop(0, problem.depth // config.step, step, start)
    return list(totals), list(own)
