"""The Hopper kernels as an implementation of the gated delta rule: device check, types over mesh axes, gradients.

The gradients are those of the chunked form in XLA, from the operands alone.
"""

from functools import partial

import jax

from ring_jax._arrays import Shaped
from ring_jax._vma import pcast_to, varying_axes
from ring_jax.gdn.chunked import chunked
from ring_jax.gdn.hopper import launch
from ring_jax.mosaic.device import hopper_reason


def unsupported(query: Shaped, key: Shaped, value: Shaped) -> str | None:
    """Why the kernels cannot run these inputs here, or None."""
    return hopper_reason() or launch.unsupported_reason(query, key, value)


def hopper(query, key, value, log_decay, beta, *, scale, initial_state, segment_ids):
    """See `ring_jax.gated_delta_rule`; initial_state may be None, which saves reading zeros."""
    return _rule(scale, query, key, value, log_decay, beta, initial_state, segment_ids)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(scale, query, key, value, log_decay, beta, initial_state, segment_ids):
    operands = query, key, value, log_decay, beta
    axes = varying_axes(*operands, initial_state, segment_ids)
    with jax.enable_x64(False):  # the kernels compute indices in int32
        results = launch.forward(*operands, scale=scale, initial_state=initial_state, segment_ids=segment_ids)
    return pcast_to(results, axes)


def _forward(scale, *arguments):
    return _rule(scale, *arguments), arguments


def _backward(scale, arguments, cotangents):
    *operands, initial_state, segment_ids = arguments
    state = initial_state
    if state is None:
        batch, _, heads, value_size = operands[2].shape
        state = jax.numpy.zeros((batch, heads, operands[1].shape[3], value_size), jax.numpy.float32)

    def plain(*operands_and_state):
        *operands, state = operands_and_state
        return chunked(*operands, scale=scale, initial_state=state, segment_ids=segment_ids)

    *gradients, state_gradient = jax.vjp(plain, *operands, state)[1](cotangents)
    return *gradients, None if initial_state is None else state_gradient, None


_rule.defvjp(_forward, _backward)
