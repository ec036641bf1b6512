"""The Hopper transition of a stretch of tokens with a gradient: that of the form in XLA, from the operands alone."""

import jax

from ring_jax._vma import pcast_to, varying_axes
from ring_jax.gdn import chunked
from ring_jax.gdn.hopper import launch


@jax.custom_vjp
def transition(key, value, log_decay, beta, segment_ids):
    """(M, B) of S_out = M S_in + B, see `launch.transition`."""
    axes = varying_axes(key, value, log_decay, beta, segment_ids)
    with jax.enable_x64(False):  # the kernels compute indices in int32
        maps = launch.transition(key, value, log_decay, beta, segment_ids)
    return pcast_to(maps, axes)


def _forward(*arguments):
    return transition(*arguments), arguments


def _backward(arguments, cotangents):
    *operands, segment_ids = arguments
    pull = jax.vjp(lambda *operands: chunked.transition(*operands, segment_ids), *operands)[1]
    return *pull(cotangents), None


transition.defvjp(_forward, _backward)
