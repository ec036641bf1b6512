"""The Hopper kernels as an implementation of the gated delta rule: device check, types over mesh axes, gradients.

What the forward takes the backward takes too, so gradients are always those of the kernels (`backward_launch`), from the
operands alone: nothing else is kept.
"""

from functools import partial

import jax

from ring_jax._arrays import Shaped
from ring_jax._vma import align, pcast_to, varying_axes
from ring_jax.gdn.hopper import backward_launch, launch
from ring_jax.mosaic.device import hopper_reason


def unsupported(query: Shaped, key: Shaped, value: Shaped) -> str | None:
    """Why the kernels cannot run these inputs here, or None."""
    return hopper_reason() or launch.unsupported_reason(query, key, value)


def hopper(query, key, value, log_decay, beta, *, scale, initial_state, segment_ids):
    """See `ring_jax.gated_delta_rule`; initial_state may be None, which saves reading zeros."""
    return _rule(scale, *align(query, key, value, log_decay, beta, initial_state, segment_ids))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(scale, query, key, value, log_decay, beta, initial_state, segment_ids):
    operands = query, key, value, log_decay, beta
    axes = varying_axes(*operands)
    with jax.enable_x64(False):  # the kernels compute indices in int32
        results = launch.forward(*operands, scale=scale, initial_state=initial_state, segment_ids=segment_ids)
    return pcast_to(results, axes)


def _forward(scale, *arguments):
    return _rule(scale, *arguments), arguments


def _backward(scale, arguments, cotangents):
    *operands, initial_state, segment_ids = arguments
    options = dict(scale=scale, initial_state=initial_state, segment_ids=segment_ids)
    with jax.enable_x64(False):
        *gradients, state_gradient = backward_launch.backward(operands, cotangents, **options)
    gradients = *gradients, None if initial_state is None else state_gradient
    return *pcast_to(gradients, varying_axes(*operands)), None


_rule.defvjp(_forward, _backward)
