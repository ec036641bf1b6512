"""The gated delta rule on one device: checks, defaults, and the choice of an implementation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ring_jax._checks import check_choice, check_number
from ring_jax.gdn.backends import BACKENDS, Backend, select
from ring_jax.gdn.checks import check_operands, state_dtype
from ring_jax.gdn.segments import blank_padding


def check_options(scale: Any, implementation: Any) -> float | None:
    """Raises unless these are what a gated delta rule can be asked for; `scale` as a Python float."""
    if scale is not None:
        scale = check_number("scale", scale, advice="multiply a traced scale into the query instead")
    check_choice("implementation", implementation, sorted(BACKENDS), optional=True)
    return scale


def delta_rule(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`ring_jax.gated_delta_rule` on one device: see there."""
    scale = check_options(scale, implementation)
    operands = query, key, value, log_decay, beta
    check_operands(*operands, initial_state, segment_ids)
    batch, _, _, dk = key.shape
    heads, dv = value.shape[2:]
    backend = select(implementation, query, key, value)
    empty = 0 in value.shape or dk == 0
    if initial_state is None and (empty or not backend.begins):
        initial_state = jnp.zeros((batch, heads, dk, dv), state_dtype(*operands))
    if empty:
        assert initial_state is not None
        return jnp.zeros_like(value), initial_state
    scale = dk**-0.5 if scale is None else scale
    return _rule(backend, float(scale), operands, initial_state, segment_ids)


# Called eagerly its scans would compile at every call.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _rule(
    backend: Backend, scale: float, operands: Any, initial_state: jax.Array | None, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    operands = blank_padding(segment_ids, *operands)
    with jax.named_scope(f"gated_delta_rule_{backend.name}"):
        return backend.run(*operands, scale=scale, initial_state=initial_state, segment_ids=segment_ids)
