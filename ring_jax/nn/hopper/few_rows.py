"""Products of few rows on Hopper as functions of arrays: what they take, how they are cut, and the launch. See `few_rows_kernel`."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ring_jax._arrays import Shaped
from ring_jax._vma import align, pcast_to, varying_axes
from ring_jax.moe.hopper import dense
from ring_jax.mosaic import compat
from ring_jax.mosaic.device import runs_kernels
from ring_jax.nn.hopper import few_rows_kernel
from ring_jax.nn.hopper.config import FewRowsConfig, few_rows_config
from ring_jax.nn.hopper.few_rows_kernel import Problem
from ring_jax.nn.norm import Normed

MAX_ROWS = 4
_SEVERAL_ROWS = 36 << 20  # bytes of a weight: a larger one cuBLAS reads faster for two rows and more (H100, 2026-11-27)


def worthwhile(x: Shaped, w: Shaped, *, swiglu: bool = False) -> bool:
    """Whether `product` runs x [..., K] times w [K, N] where it is being compiled for, faster than XLA's product."""
    rows, results = math.prod(x.shape[:-1]), w.shape[1] // (2 if swiglu else 1)
    return (
        runs_kernels()
        and 1 <= rows <= MAX_ROWS
        and (rows == 1 or 2 * math.prod(w.shape) <= _SEVERAL_ROWS)
        and x.dtype == w.dtype
        and x.dtype in (jnp.bfloat16, jnp.float16)
        and few_rows_config(rows, x.shape[-1], results, swiglu) is not None
    )


def product(
    x: Float[Array, "R K"] | Normed,
    w: Float[Array, "K N"],
    *,
    swiglu: bool = False,
    added: Float[Array, "R M"] | None = None,
    config: FewRowsConfig | None = None,
) -> Float[Array, "R M"]:
    """x w of few rows in x's dtype, summed in float32. The gradient is XLA's.

    Args:
        x: bfloat16 or float16, at most `MAX_ROWS` rows; its norm, if it has one, is made on the way. w: of the same dtype.
        swiglu: silu(gate) * up, where the first half of w's columns are gate.
        added: to the result, before it is rounded.
        config: None takes the tuned one.

    Raises:
        NotImplementedError: sizes that no config fits.
    """
    weight, epsilon = (x.weight, x.epsilon) if isinstance(x, Normed) else (None, None)
    x = x.x if isinstance(x, Normed) else x
    (rows, depth), results = x.shape, w.shape[1] // (2 if swiglu else 1)
    config = config or few_rows_config(rows, depth, results, swiglu)
    if config is None or depth % config.step or results % config.columns:
        raise NotImplementedError(f"the Hopper product of few rows: {config} cuts no weight {w.shape}")
    problem = Problem(rows, depth, results, swiglu, epsilon, added is not None, config)
    return _run(problem, *align(x, w, weight, added))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(problem: Problem, x: jax.Array, w: jax.Array, weight: jax.Array | None, added: jax.Array | None) -> jax.Array:
    n = problem.config.warp_rows
    operands = [x.reshape(problem.rows, -1, n), w.reshape(-1, n, w.shape[1])]
    operands += [] if weight is None else [weight.reshape(-1, n)]
    operands += [] if added is None else [added]
    return _launch(problem, *operands)


def _plain(
    problem: Problem, x: jax.Array, w: jax.Array, weight: jax.Array | None, added: jax.Array | None
) -> jax.Array:
    """What the kernel computes, as XLA differentiates it."""
    x = x if weight is None else Normed(x, weight, problem.norm_epsilon or 0.0).array()
    y = jnp.matmul(x, w, preferred_element_type=jnp.float32)
    y = dense.combine(y) if problem.swiglu else y
    return (y if added is None else y + added.astype(jnp.float32)).astype(x.dtype)


def _forward(problem: Problem, *operands: Any) -> tuple[jax.Array, Any]:
    return jax.vjp(functools.partial(_plain, problem), *operands)


def _backward(problem: Problem, back: Any, dout: jax.Array) -> Any:
    return back(dout)


_run.defvjp(_forward, _backward)


# Layers with the same shapes are lowered and compiled once.
@functools.partial(jax.jit, static_argnums=0)
def _launch(problem: Problem, *operands: jax.Array) -> jax.Array:
    with jax.enable_x64(False):
        call = compat.kernel(
            functools.partial(few_rows_kernel.kernel, problem),
            name="few_rows_product",
            out_type=compat.output_like((problem.rows, problem.results), operands[0].dtype, *operands),
            scratch=few_rows_kernel.scratch(problem),
            grid=(problem.results // problem.config.columns,),
            grid_names=("program",),
            num_threads=problem.config.warpgroups,
            thread_name="warpgroup",
        )
        return pcast_to(call(*operands), varying_axes(operands))
