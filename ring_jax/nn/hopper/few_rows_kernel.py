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
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax.mosaic import compat

WARPS, _LANES, VECTOR = 4, 32, 8


@dataclasses.dataclass(frozen=True)
class Problem:
    """One launch.

    Fields:
        rows, depth: of x. results: of each row.
        columns: of a program. warpgroups: of a program; each takes every warpgroups-th piece of the depth. loads: pieces in flight.
        swiglu: W has 2 `results` columns, gate first. norm_epsilon: None for no norm. added: whether there is what is added.
    """

    rows: int
    depth: int
    results: int
    columns: int
    warpgroups: int
    loads: int
    swiglu: bool
    norm_epsilon: float | None
    added: bool

    @property
    def warp_rows(self) -> int:
        """Rows of W that a warp loads at once."""
        return _LANES * VECTOR // self.columns

    @property
    def halves(self) -> int:
        return 2 if self.swiglu else 1


def _tiled(tiling: Any, warp_dims: Any, lane_dims: Any) -> Any:
    layout = mgpu.TiledLayout(fragmented_array.Tiling(tiling), warp_dims, lane_dims, -1, _check_canonical=False)
    layout = layout.canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def piece_layout(rows: int, columns: int) -> Any:
    """[4, rows, columns]: the first axis is the warp, a thread has eight columns of a row."""
    return _tiled(((WARPS, rows, columns), (1, rows, columns), (1, 1, VECTOR)), (-9,), (-5, -4))


def results_layout(columns: int) -> Any:
    """[columns], the same in every warp."""
    lanes = min(columns, _LANES)
    replicated = fragmented_array.Replicated
    within = (-2,) if lanes == _LANES else (replicated(_LANES // lanes), -2)
    return _tiled(((columns,), (lanes,), (1,)), (replicated(WARPS),), within)


def scratch(problem: Problem) -> dict[str, Any]:
    """Shared memory of a program."""
    p, partial = problem, (problem.warpgroups * WARPS,)
    found = dict(
        sums=plgpu.SMEM((*partial, p.halves * p.rows, p.columns), jnp.float32),
        full=plgpu.Barrier(num_arrivals=p.warpgroups),
    )
    if p.norm_epsilon is not None:
        found["squares"] = plgpu.SMEM((*partial, p.rows), jnp.float32)
    return found


def kernel(problem: Problem, x_ref, w_ref, *refs, sums, full, squares=None) -> None:
    """x [R, K / n, n], W [K / n, n, N] (n: `warp_rows`); the norm's weight [K / n, n] and what is added [R, N] if there are; out."""
    *refs, out_ref = refs
    norm_ref = refs.pop(0) if problem.norm_epsilon is not None else None
    added_refs = refs[: problem.added]
    warpgroup = lax.axis_index("warpgroup")
    first = lax.axis_index("program") * problem.columns
    here = pl.ds(first, problem.columns)
    layout = results_layout(problem.columns)
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

        @pl.when(warpgroup == r % problem.warpgroups)
        def _(r=r):
            parts = [_sum_over(sums, half * problem.rows + r, layout) for half in range(problem.halves)]
            if squares is not None:
                total = squares[0, r]
                for i in range(1, squares.shape[0]):
                    total = total + squares[i, r]
                factor = lax.rsqrt(total * (1.0 / problem.depth) + problem.norm_epsilon)
                parts = [part * factor for part in parts]
            y = parts[0]
            if problem.swiglu:
                y = y * parts[1] / (1.0 + jnp.exp(-y))
            if added:
                y = y + added[r].astype(jnp.float32)
            compat.store(out_ref.at[r, here], y.astype(out_ref.dtype))


def _sum_over(sums: Any, index: int, layout: Any) -> jax.Array:
    total = compat.load(sums.at[0, index], layout)
    for i in range(1, sums.shape[0]):
        total = total + compat.load(sums.at[i, index], layout)
    return total


def _multiply(problem: Problem, x_ref, w_ref, norm_ref, warpgroup, first) -> tuple[list[jax.Array], list[jax.Array]]:
    """This warpgroup's part of the products, gate then up, and of the squares, each still spread over rows of W."""
    shape = WARPS, problem.warp_rows, problem.columns
    layout = piece_layout(*shape[1:])
    by_row = layout.reduce(2)
    halves = [pl.ds(first + half * problem.results, problem.columns) for half in range(problem.halves)]
    normed = norm_ref is not None

    def zeros(shape: tuple[int, ...], layout: Any) -> jax.Array:
        return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)

    def step(i: jax.Array, carry: Any) -> Any:
        totals, own = list(carry[0]), list(carry[1])
        pieces = [
            pl.ds(((i * problem.loads + n) * problem.warpgroups + warpgroup) * WARPS, WARPS)
            for n in range(problem.loads)
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
    steps = problem.depth // (WARPS * problem.warp_rows * problem.warpgroups * problem.loads)
    totals, own = lax.fori_loop(0, steps, step, start)
    return list(totals), list(own)
