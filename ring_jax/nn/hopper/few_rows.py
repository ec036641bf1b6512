"""Products of few rows on Hopper as functions of arrays: what they take, how they are cut, and the launch. See `few_rows_kernel`."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ring_jax._arrays import Shaped
from ring_jax._vma import align, pcast_to, varying_axes
from ring_jax.mosaic import compat
from ring_jax.mosaic.device import hopper_reason
from ring_jax.nn.hopper import few_rows_kernel
from ring_jax.nn.hopper.few_rows_kernel import VECTOR, WARPS, Problem

MAX_ROWS = 4
MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewRowsConfig:
    """How a product is cut.

    Attributes:
        columns: results of a program, of each row: 8, 16, 32, 64 or 128.
        warpgroups: of a program; they share the rows of the weight.
        loads: pieces of 16 bytes that each thread has in flight.
    """

    columns: int
    warpgroups: int = 4
    loads: int = 8

    def __post_init__(self) -> None:
        if self.columns not in (8, 16, 32, 64, 128):
            raise ValueError(f"{self.columns=} must be 8, 16, 32, 64 or 128")
        if self.warpgroups not in (1, 2, 4):
            raise ValueError(f"{self.warpgroups=} must be 1, 2 or 4")
        if not 1 <= self.loads <= 16:
            raise ValueError(f"{self.loads=} must be from 1 to 16")

    @property
    def step(self) -> int:
        """Rows of the weight that a program takes at once."""
        return WARPS * (32 * VECTOR // self.columns) * self.warpgroups * self.loads


def few_rows_config(rows: int, depth: int, results: int, swiglu: bool) -> FewRowsConfig | None:
    """The config that is used for these sizes, None where none fits: the widest programs of those that keep nine of ten
    multiprocessors busy, else those that keep most. Chosen from registers (ptxas) and arithmetic; no card has timed it."""
    most = 8 if rows == 1 and not swiglu else 4
    found: list[tuple[float, FewRowsConfig]] = []
    for columns in (64, 32, 16, 8):
        programs = results // columns
        # One program for each multiprocessor needs all warps, of several some may wait.
        shape = {"columns": columns, "warpgroups": 4 if programs <= MULTIPROCESSORS else 2}
        fits = (FewRowsConfig(**shape, loads=n) for n in range(most, 0, -1))
        config = next((config for config in fits if depth % config.step == 0), None)
        if results % columns == 0 and config is not None:
            busy = programs / (MULTIPROCESSORS * math.ceil(programs / MULTIPROCESSORS))
            found.append((min(busy, 0.9), config))
    return max(found, key=lambda each: each[0])[1] if found else None


class Norm(NamedTuple):
    """x / rms(x) * (1 + weight)."""

    weight: Float[Array, " K"]
    epsilon: float


def worthwhile(x: Shaped, w: Shaped, *, swiglu: bool = False) -> bool:
    """Whether `product` runs x [..., K] times w [K, N] where it is being compiled for, faster than XLA's product."""
    rows, results = math.prod(x.shape[:-1]), w.shape[1] // (2 if swiglu else 1)
    return (
        compat.INTERPRET_AVAILABLE
        and hopper_reason() is None
        and 1 <= rows <= MAX_ROWS
        and x.dtype == w.dtype
        and x.dtype in (jnp.bfloat16, jnp.float16)
        and few_rows_config(rows, x.shape[-1], results, swiglu) is not None
    )


def product(
    x: Float[Array, "R K"],
    w: Float[Array, "K N"],
    *,
    norm: Norm | None = None,
    swiglu: bool = False,
    added: Float[Array, "R M"] | None = None,
    config: FewRowsConfig | None = None,
) -> Float[Array, "R M"]:
    """x w of few rows in x's dtype, summed in float32. The gradient is XLA's.

    Args:
        x: bfloat16 or float16, at most `MAX_ROWS` rows. w: of the same dtype.
        norm: of x, made on the way.
        swiglu: silu(gate) * up, where the first half of w's columns are gate.
        added: to the result, before it is rounded.
        config: None takes the tuned one.

    Raises:
        NotImplementedError: sizes that no config fits.
    """
    (rows, depth), halves = x.shape, 2 if swiglu else 1
    results = w.shape[1] // halves
    config = config or few_rows_config(rows, depth, results, swiglu)
    if config is None or depth % config.step or results % config.columns:
        raise NotImplementedError(f"the Hopper product of few rows: {config} cuts no weight {w.shape}")
    problem = Problem(
        rows=rows,
        depth=depth,
        results=results,
        columns=config.columns,
        warpgroups=config.warpgroups,
        loads=config.loads,
        swiglu=swiglu,
        norm_epsilon=None if norm is None else norm.epsilon,
        added=added is not None,
    )
    weight = None if norm is None else norm.weight
    return _run(problem, *align(x, w, weight, added))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(problem: Problem, x: jax.Array, w: jax.Array, weight: jax.Array | None, added: jax.Array | None) -> jax.Array:
    n = problem.warp_rows
    operands = [x.reshape(problem.rows, -1, n), w.reshape(-1, n, w.shape[1])]
    operands += [] if weight is None else [weight.reshape(-1, n)]
    operands += [] if added is None else [added]
    return _launch(problem, *operands)


def _plain(
    problem: Problem, x: jax.Array, w: jax.Array, weight: jax.Array | None, added: jax.Array | None
) -> jax.Array:
    """What the kernel computes, as XLA differentiates it."""
    wide = x.astype(jnp.float32)
    if weight is not None:
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=1, keepdims=True) + problem.norm_epsilon)
        wide = wide * (1 + weight.astype(jnp.float32))[None]
    y = jnp.matmul(wide.astype(x.dtype), w, preferred_element_type=jnp.float32)
    if problem.swiglu:
        gate, up = jnp.split(y, 2, axis=1)
        y = jax.nn.silu(gate) * up
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
            grid=(problem.results // problem.columns,),
            grid_names=("program",),
            num_threads=problem.warpgroups,
            thread_name="warpgroup",
        )
        return pcast_to(call(*operands), varying_axes(operands))
