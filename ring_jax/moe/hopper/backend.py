"""The experts of a layer on Hopper GPUs: what the kernels take, and the weighted sums of what they give."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax._arrays import Shaped
from ring_jax._vma import align
from ring_jax.moe.hopper.config import ExpertsConfig, experts_config, outer_config, product_config
from ring_jax.moe.hopper.outer_kernel import outer_product
from ring_jax.moe.hopper.plan import Plan
from ring_jax.moe.hopper.rows_kernel import rows_product
from ring_jax.mosaic.device import hopper_reason

# Long sequences go in parts of so many assignments: each holds D + F numbers for the time of the call, 2.7 GB for 2^19 of
# 2048 + 512 in bfloat16. Their weights are read once a part.
_ASSIGNMENTS = 2**19


def unsupported_reason(x: Shaped, gate_up: Shaped, down: Shaped) -> str | None:
    """Why `run_experts` cannot run these arrays on the device that is being compiled for, or None."""
    return hopper_reason() or unsupported_arrays(x, gate_up, down)


def unsupported_arrays(x: Shaped, gate_up: Shaped, down: Shaped) -> str | None:
    """Why no Hopper GPU could run these arrays, or None."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, got {x.dtype}"
    if gate_up.dtype != x.dtype or down.dtype != x.dtype:
        return f"weights must have x's dtype {x.dtype}, got {gate_up.dtype} and {down.dtype}"
    width, features = x.shape[1], down.shape[1]
    if width % 128 or features % 64:
        return f"width must be a multiple of 128, features of 64, got {width} and {features}"
    if 0 in x.shape or 0 in gate_up.shape or 0 in down.shape:
        return f"empty arrays, got {x.shape}, {gate_up.shape} and {down.shape}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(
    config: ExpertsConfig,
    recompute: bool,
    x: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
) -> jax.Array:
    make = Plan.of_one_token if x.shape[0] == 1 else Plan.of
    plan = make(experts, gate_up.shape[0], config.rows)
    hidden = rows_product(x, gate_up, plan, config.up, gather=True)
    rows = rows_product(hidden, down, plan, config.down, scatter=True)
    return weighted_sum(rows, weights, _here(experts, gate_up))


def _forward(
    config: ExpertsConfig,
    recompute: bool,
    x: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
) -> tuple[jax.Array, tuple[Any, ...]]:
    operands = x, gate_up, down, weights, experts
    if recompute:
        return _run(config, recompute, *operands), (operands, None)
    with jax.enable_x64(False):
        plan = Plan.of(experts, gate_up.shape[0], config.rows)
        hidden, kept = rows_product(x, gate_up, plan, config.up, gather=True, keep=True)
        rows = rows_product(hidden, down, plan, config.down, scatter=True)
        return weighted_sum(rows, weights, _here(experts, gate_up)), (operands, kept)


def _backward(
    config: ExpertsConfig, recompute: bool, residuals: tuple[Any, ...], dy: jax.Array
) -> tuple[jax.Array | None, ...]:
    operands, kept = residuals
    with jax.enable_x64(False):
        return _gradients(*operands, kept, dy)


def _gradients(
    x: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    kept: jax.Array | None,
    dy: jax.Array,
) -> tuple[jax.Array | None, ...]:
    dtype, wide = x.dtype, weights.dtype
    dout = dy.astype(dtype)
    both, features, width = (product_config(n) for n in (gate_up.shape[2], down.shape[1], x.shape[1]))
    plan = Plan.of(experts, gate_up.shape[0], both.rows)
    if kept is None:
        kept = rows_product(x, gate_up, plan, both, gather=True)
    gate, up = jnp.split(kept.astype(wide), 2, axis=1)
    dscaled = rows_product(dout, down, plan, features, gather=True, transposed=True).astype(wide)
    # Rows of no expert here hold anything: zeros, before they are multiplied with.
    real = (jnp.arange(plan.order.size, dtype=jnp.int32) < plan.groups[-1, 1])[:, None]
    gate, up, dscaled = (jnp.where(real, a, jnp.zeros_like(a)) for a in (gate, up, dscaled))
    factor = weights.reshape(-1)[plan.order][:, None]
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    hidden = silu * up
    dhidden = dscaled * factor
    dgate = dhidden * up * (sigmoid + silu * (1 - sigmoid))
    din = jnp.concatenate([dgate, dhidden * silu], axis=1).astype(dtype)
    scaled = (hidden * factor).astype(dtype)
    # Apart: fused into what scatters it, the sum would be left to a few threads.
    by_row = lax.optimization_barrier((dscaled * hidden).sum(axis=1))
    dweights = jnp.zeros_like(by_row).at[plan.order].set(by_row, unique_indices=True).reshape(weights.shape)
    dgate_up = outer_product(x, din, plan, outer_config(x.shape[1], din.shape[1]), gather_a=True)
    ddown = outer_product(scaled, dout, plan, outer_config(scaled.shape[1], x.shape[1]), gather_b=True)
    dx = rows_product(din, gate_up, plan, width, transposed=True, scatter=True)
    dx = weighted_sum(dx, jnp.ones_like(weights), _here(experts, gate_up)).astype(dtype)
    return dx, dgate_up, ddown, dweights, None


_run.defvjp(_forward, _backward)


def _here(experts: jax.Array, gate_up: jax.Array) -> jax.Array:
    return (experts >= 0) & (experts < gate_up.shape[0])


def weighted_sum(rows: jax.Array, weights: jax.Array, here: jax.Array) -> jax.Array:
    """Sum over k of weights [T, k] times rows [T k, D], in the weights' dtype; rows that are not `here` hold anything."""
    tokens, per_token = weights.shape
    rows = rows.reshape(tokens, per_token, -1)
    # Spelled out, since a sum over an axis in the middle becomes a slower kind of loop than its terms.
    terms = (
        jnp.where(
            here[:, j, None], rows[:, j].astype(weights.dtype) * weights[:, j, None], jnp.zeros((), weights.dtype)
        )
        for j in range(per_token)
    )
    total = next(terms)
    for term in terms:
        total = total + term
    return total


def run_experts(
    x: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    *,
    total: int | None = None,
    recompute: bool = False,
    config: ExpertsConfig | None = None,
) -> jax.Array:
    """Weighted sums of the experts' outputs.

    Args:
        x: [T, D], bfloat16 or float16. gate_up: [E, D, 2, F], gate first. down: [E, F, D]. All of one dtype.
        weights: float32 [T, k]. experts: int32 [T, k], those of each token, distinct; 0 ... E - 1 are here, others are not.
        total: experts that the assignments spread over, not only those here; they decide the tiles. Default: E.
        recompute: the backward pass repeats the first product, rather than keep its 2 F numbers of each assignment.
        config: tiles; None takes the tuned ones.

    Returns:
        y float32 [T, D]: zero for tokens without an expert here.

    Raises:
        NotImplementedError: if `unsupported_arrays` gives a reason.
    """
    reason = unsupported_arrays(x, gate_up, down)
    if reason is not None:
        raise NotImplementedError(f"the Hopper expert kernels: {reason}")
    x, gate_up, down, weights, experts = align(x, gate_up, down, weights, experts)
    per_expert = experts.size / (total or gate_up.shape[0])
    config = config or experts_config(per_expert if x.shape[0] > 1 else 0.0, down.shape[1], x.shape[1])
    fused = gate_up.reshape(*gate_up.shape[:2], -1)
    parts = -(-experts.size // _ASSIGNMENTS)
    size = -(-x.shape[0] // parts)
    with jax.enable_x64(False):
        sums = [
            _run(config, recompute, x[i : i + size], fused, down, weights[i : i + size], experts[i : i + size])
            for i in range(0, x.shape[0], size)
        ]
        return sums[0] if len(sums) == 1 else jnp.concatenate(sums)
