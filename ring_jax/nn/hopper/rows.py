"""RMS norms of many rows on Hopper: y = x / rms(x) * (1 + weight), each row read and written once.

A warp has a row (several short ones) in registers, its lanes eight neighbouring columns of each 256: sums are shuffles, nothing waits
for another warp, and a multiprocessor has a dozen rows on their way. XLA's fusion of the same, four rows of 4096 in eight warps, reaches
half of the memory's bandwidth.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from ring_jax._arrays import Shaped
from ring_jax._vma import align, pcast_to, varying_axes
from ring_jax.mosaic import compat
from ring_jax.mosaic.device import runs_kernels
from ring_jax.nn.hopper.config import WARPS

_COLUMNS = 256  # of a warp at a time: 16 bytes a lane
_WIDEST = 6144  # columns that a warp can hold
_LEAST = 1024  # rows, below which a launch costs more than the bandwidth


@dataclasses.dataclass(frozen=True)
class Problem:
    """One launch.

    Fields:
        tokens, columns: of x.
    """

    tokens: int
    columns: int
    epsilon: float

    @property
    def rows(self) -> int:
        """Of a warp."""
        return math.gcd(self.tokens // WARPS, max(1, 4096 // self.columns))

    @property
    def programs(self) -> int:
        return self.tokens // (self.rows * WARPS)


def worthwhile(x: Shaped) -> bool:
    """Whether `norm` runs rows like these, where they are being compiled for, faster than XLA's fusion."""
    columns, tokens = x.shape[-1], math.prod(x.shape[:-1])
    return (
        runs_kernels()
        and x.dtype in (jnp.bfloat16, jnp.float16)
        and tokens >= _LEAST
        and tokens % WARPS == 0
        and columns % _COLUMNS == 0
        and columns <= _WIDEST
    )


def norm(
    x: Float[Array, "*shape D"], weight: Float[Array, " D"], epsilon: float, formula: Callable[..., jax.Array]
) -> Float[Array, "*shape D"]:
    """In the dtype of x, bfloat16 or float16. The gradient is that of formula(x, weight, epsilon) by XLA."""
    problem = Problem(math.prod(x.shape[:-1]), x.shape[-1], epsilon)
    flat, weight = align(x.reshape(-1, x.shape[-1]), weight)
    return _run(problem, formula, flat, weight).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(problem: Problem, formula: Callable[..., jax.Array], x: jax.Array, weight: jax.Array) -> jax.Array:
    return _launch(problem, x.reshape(-1, problem.rows, problem.columns), weight).reshape(x.shape)


def _forward(problem: Problem, formula: Callable[..., jax.Array], *operands: jax.Array) -> tuple[jax.Array, Any]:
    return _run(problem, formula, *operands), operands


def _backward(problem: Problem, formula: Callable[..., jax.Array], operands: Any, gradient: jax.Array) -> Any:
    return jax.vjp(lambda x, weight: formula(x, weight, problem.epsilon), *operands)[1](gradient)


_run.defvjp(_forward, _backward)


# Layers with the same shapes are lowered and compiled once.
@functools.partial(jax.jit, static_argnums=0)
def _launch(problem: Problem, x: jax.Array, weight: jax.Array) -> jax.Array:
    with jax.enable_x64(False):
        call = compat.kernel(
            functools.partial(_kernel, problem),
            name="norm_of_rows",
            out_type=(compat.output_like(x.shape, x.dtype, x, weight),),
            scratch={},
            grid=(problem.programs,),
            grid_names=("program",),
            num_threads=1,
            thread_name="warpgroup",
        )
        return pcast_to(tuple(call(x, weight)), varying_axes((x, weight)))[0]


def _kernel(problem: Problem, x_ref, weight_ref, out_ref) -> None:
    """x and out [T / n, n, D], weight [D]."""
    rows = pl.ds(lax.axis_index("program") * WARPS, WARPS)
    layout = compat.row_layout(WARPS, _COLUMNS)
    pieces = [pl.ds(first, _COLUMNS) for first in range(0, problem.columns, _COLUMNS)]
    loaded = [compat.load(x_ref.at[rows, :, piece], layout) for piece in pieces]

    def wide(i):
        return loaded[i].astype(jnp.float32)

    squares = functools.reduce(lax.add, [jnp.sum(wide(i) * wide(i), axis=2) for i in range(len(pieces))])
    factor = lax.rsqrt(squares * (1.0 / problem.columns) + problem.epsilon)
    for i, piece in enumerate(pieces):
        scale = 1.0 + compat.load(weight_ref.at[piece], layout.reduce((0, 1))).astype(jnp.float32)
        scale = plgpu.layout_cast(lax.broadcast_in_dim(scale, loaded[i].shape, (2,)), layout)
        normed = wide(i) * plgpu.layout_cast(lax.broadcast_in_dim(factor, loaded[i].shape, (0, 1)), layout) * scale
        compat.store(out_ref.at[rows, :, piece], normed.astype(out_ref.dtype))
