"""The gated delta rule on chunks that lie on several ranks, by the Hopper kernels, with gradients by them too.

Over a chunk S_out = M S_in + B, so states pass between ranks as pairs (M, B) (`state_scan.py`). Gradients of states pass back by the
same maps: with c what a chunk's outputs give to S_in,

    dS_in = c + M^T dS_out,    and dS_out of a chunk is dS_in of the next one, at the end that of the final state.

That is the transpose of how states pass, which is linear in B: the gradient of B is dS_out. With S_in and dS_out known, the
rest of a chunk's gradients are those of one device. c costs half of the backward's recurrences once more; M is kept.
"""

from functools import partial
from typing import Any

import jax

from ring_jax._vma import align, pcast_to, varying_axes
from ring_jax.gdn.hopper import backward_launch, launch
from ring_jax.gdn.state_scan import Chunks


def passing(
    chunks: Chunks, scale: float, operands: Any, segment_ids: Any, initial_state: Any, joins: Any
) -> tuple[jax.Array, jax.Array]:
    """out [folds B, size, N, dv] and the state after the sequence, the same on all ranks; inside a shard_map.

    Args:
        operands: query, key, value, log_decay, beta of the chunks here, as rows of a batch: [folds B, size, ...].
        segment_ids: [folds B, size] or None.
        initial_state: before the sequence, [B, N, dk, dv], or None for zeros.
        joins: bool [folds, B], whether the state that enters a chunk goes on in it; None where it always does.
    """
    *operands, segment_ids = align(*operands, segment_ids)
    return _rule(chunks, scale, tuple(operands), segment_ids, initial_state, joins)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rule(chunks, scale, operands, segment_ids, initial_state, joins):
    return _forward(chunks, scale, operands, segment_ids, initial_state, joins)[0]


def _forward(chunks, scale, operands, segment_ids, initial_state, joins):
    with jax.enable_x64(False):  # the kernels compute indices in int32
        maps = launch.transition(*operands[1:], segment_ids)
    m, b = (x.reshape(chunks.folds, -1, *x.shape[1:]) for x in _typed(maps, operands))
    entering = chunks.entering(m, b, initial_state, joins=joins)
    with jax.enable_x64(False), jax.named_scope("gated_delta_rule_mosaic"):
        results = launch.forward(
            *operands, scale=scale, initial_state=entering.reshape(-1, *entering.shape[2:]), segment_ids=segment_ids
        )
    out, state = _typed(results, operands)
    saved = operands, segment_ids, initial_state, joins, m, b, entering
    return (out, chunks.of_last(state.reshape(entering.shape))), saved


def _backward(chunks, scale, saved, cotangents):
    operands, segment_ids, initial_state, joins, m, b, entering = saved

    def passed(b, initial):
        states = chunks.entering(m, b, initial, joins=joins)
        return states, chunks.leaving(m, b, states)

    with jax.enable_x64(False):
        prepared = backward_launch.prepare(operands, cotangents[0], scale=scale, segment_ids=segment_ids)
        own = _typed(backward_launch.entering_gradient(prepared), operands)
    last, initial_gradient = jax.vjp(passed, b, initial_state)[1]((own.reshape(entering.shape), cotangents[1]))
    with jax.enable_x64(False):
        *gradients, _ = backward_launch.gradients(prepared, entering.reshape(own.shape), last.reshape(own.shape))
    return _typed(tuple(gradients), operands), None, initial_gradient, None


def _typed(results: Any, operands: Any) -> Any:
    """What kernels give, which varies over the mesh axes that the operands vary over."""
    return pcast_to(results, varying_axes(*operands))


_rule.defvjp(_forward, _backward)
