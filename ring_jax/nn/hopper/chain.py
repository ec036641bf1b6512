"""What lies between two mixers of a decode step at one row, as a function of arrays: see `chain_kernel`."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ring_jax._arrays import Shaped
from ring_jax._hardware import HOPPER
from ring_jax._vma import align, pcast_to, varying_axes
from ring_jax.mosaic import compat, in_place
from ring_jax.nn.hopper import chain_kernel
from ring_jax.nn.hopper.chain_kernel import COLUMNS, COMPUTE, PIECE, WARP_ROWS, Problem, Product

_THREADS = 128 * COMPUTE  # a vector is spread over them
_PARTS, _STAGES = 16, 12  # at most


def start() -> Int32[Array, "2"]:
    """A meeting place for `between_mixers`, to be handed from one to the next."""
    return jnp.zeros(2, jnp.int32)


def plan(
    out: Shaped, up: Shaped, down: Shaped, into: Shaped, *, epsilon: float, programs: int = HOPPER.multiprocessors
) -> Problem | None:
    """How the products with these weights are cut for so many programs, or None where they cannot be."""
    if any(w.shape[0] % PIECE or w.shape[1] % COLUMNS for w in (out, up, down, into)):
        return None

    def cut(w: Shaped, most: int, fits: Callable[[Product], bool] = lambda _: True) -> Product:
        """In the fewest parts of those that keep all programs equally busy, to a tenth."""
        parts = [n for n in range(1, most + 1) if w.shape[0] % (n * PIECE) == 0]
        products = [Product(*w.shape, n) for n in parts]
        products = [x for x in products if fits(x)] or products[:1]
        busiest = max(x.busy(programs) for x in products)
        return next(x for x in products if x.busy(programs) >= 0.9 * busiest)

    problem = Problem(
        out=cut(out, _PARTS),
        up=cut(up, 1),  # `down` reads it
        down=cut(down, _PARTS, lambda x: x.units <= programs and x.rows % _THREADS == 0),  # `Problem.one_part`
        into=cut(into, 1),  # the result itself
        epsilon=epsilon,
        programs=programs,
        stages=2,
    )
    if problem.out.depth % _THREADS or problem.width % _THREADS or 2 * problem.down.depth != problem.up.results:
        return None
    stages = (HOPPER.shared_memory_bytes - problem.other_bytes) // (2 * PIECE * COLUMNS)
    return dataclasses.replace(problem, stages=min(stages, _STAGES)) if stages >= 2 else None


def between_mixers(
    y: Float[Array, " K"],
    h: Float[Array, " D"],
    out: Float[Array, "K D"],
    norm: Float[Array, " D"],
    up: Float[Array, "D _"],
    down: Float[Array, "M D"],
    next_norm: Float[Array, " D"],
    into: Float[Array, "D F"],
    place: Int32[Array, "2"],
    *,
    epsilon: float,
    problem: Problem | None = None,
) -> tuple[Float[Array, " D"], Float[Array, " F"], Int32[Array, "2"]]:
    """(h2, p, place) of one row in bfloat16 or float16: h1 = h + y out, h2 = h1 + swiglu(norm(h1) up) down, p = norm(h2) into.

    Norms are RMS with a weight of 1 + `norm`. Sums are float32; h1, h2, the activation and p are rounded. `place` is `start()`'s, or
    what the call before left; calls that share one run one after the other. No gradient.

    Raises:
        NotImplementedError: sizes that `plan` cannot cut.
    """
    problem = problem or plan(out, up, down, into, epsilon=epsilon)
    if problem is None:
        raise NotImplementedError(f"no plan for weights {[w.shape for w in (out, up, down, into)]}")
    problem = dataclasses.replace(problem, epsilon=epsilon)
    weights = [w.reshape(-1, WARP_ROWS, w.shape[1]) for w in (out, up, down, into)]
    return _launch(problem, *align(y, h, norm, next_norm, *weights, place))


# Layers with the same shapes are lowered and compiled once.
@functools.partial(jax.jit, static_argnums=0)
def _launch(problem: Problem, *operands: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    *operands, place = operands  # type: ignore[assignment]
    dtype = operands[0].dtype
    with jax.enable_x64(False):
        shapes = [((problem.width,), dtype), ((problem.into.results,), dtype)]
        shapes += [((x.splits, x.results), jnp.float32) for x in problem.products[:3]]
        outputs = tuple(compat.output_like(shape, kind, *operands, place) for shape, kind in shapes)
        call = compat.kernel(
            functools.partial(chain_kernel.kernel, problem),
            name="between_mixers",
            out_type=outputs,
            scratch=chain_kernel.scratch(problem, dtype),
            grid=(problem.programs,),
            grid_names=("program",),
            num_threads=COMPUTE + 1,
            thread_name="warpgroup",
        )
        h, p, *_, place = in_place.update(call, outputs, operands, (place,))
    return pcast_to((h, p, place), varying_axes((*operands, place)))
