"""The tail that the Hopper convolution leaves, and the gradient of the one it is given. Both touch few tokens, and are XLA's."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from ring_jax.gdn import by_head
from ring_jax.gdn.conv import convolve_buffer
from ring_jax.gdn.heads import Heads
from ring_jax.gdn.hopper.conv_problem import FLAG_AHEAD, FLAG_CONTINUES, FLAG_FIRST, NORM_EPSILON
from ring_jax.gdn.segments import first_valid, last_valid, segment_at


def leaving_tail(arrays: Sequence[jax.Array], heads: Heads, tail, segment_ids, history: int) -> jax.Array:
    """The last `history` inputs of the last document, as `causal_convolution` returns them, from few rows only."""
    batch, time = arrays[0].shape[:2]
    if tail is None:
        tail = jnp.zeros((batch, history, heads.features), arrays[0].dtype)
    if segment_ids is None:
        last = by_head.joined_inputs([x[:, max(time - history, 0) :] for x in arrays], heads)
        return jnp.concatenate([tail, last], axis=1)[:, last.shape[1] :]
    first, last = first_valid(segment_ids), last_valid(segment_ids)
    index = last[:, None] - jnp.arange(history - 1, -1, -1, dtype=jnp.int32)[None]
    clipped = jnp.clip(index, 0, time - 1)
    found = by_head.joined_inputs([_taken(x, clipped) for x in arrays], heads)
    own = segment_at(segment_ids, last)
    inside = (index >= 0) & (jnp.take_along_axis(segment_ids, clipped, axis=1) == own[:, None])
    # Before the first document lies the tail: its index `history` would be the first valid token.
    before = history + index - first[:, None]
    from_tail = jnp.take_along_axis(tail, jnp.clip(before, 0, history - 1)[..., None], axis=1)
    continues = (index < first[:, None]) & (own == segment_at(segment_ids, first))[:, None]
    found = jnp.where(inside[..., None], found, jnp.where(continues[..., None], from_tail, jnp.zeros_like(found)))
    return jnp.where((last >= 0)[:, None, None], found, tail)


def tail_gradient(heads: Heads, arrays, weights, tail, flags, cotangents):
    """From the few tokens that see the tail: the first of each row's first document."""
    history, time = tail.shape[1], arrays[0].shape[1]
    index = jnp.arange(history, dtype=jnp.int32)[None]
    if flags is not None:
        flags = flags & (FLAG_AHEAD - 1)
        index = index + jnp.argmax(flags == FLAG_FIRST, axis=1).astype(jnp.int32)[:, None]
    index = jnp.broadcast_to(index, (tail.shape[0], history))
    clipped = jnp.clip(index, 0, time - 1)
    sees = index < time
    if flags is not None:
        here = jnp.take_along_axis(flags, clipped, axis=1)
        breaks = jnp.where(jnp.arange(history)[None] == 0, here != FLAG_FIRST, here != FLAG_CONTINUES)
        sees &= jnp.cumsum(breaks, axis=1) == 0
    x = by_head.joined_inputs([_taken(x, clipped) for x in arrays], heads)
    x = jnp.where(sees[..., None], x, jnp.zeros_like(x))
    weight = jnp.concatenate(weights, axis=1)
    do = [jnp.where(sees[..., None, None], _taken(c, clipped), 0).astype(jnp.float32) for c in cotangents]

    def outputs(tail):
        return reference_outputs(
            jnp.concatenate([tail.astype(jnp.float32), x.astype(jnp.float32)], axis=1), weight, heads
        )

    return jax.vjp(outputs, tail)[1](tuple(do))[0]


def reference_outputs(buffer, weight, heads: Heads):
    """q, k, v [B, T, heads, size] of [B, W - 1 + T, F] inputs with the history in front, in the buffer's dtype."""
    y = jax.nn.silu(convolve_buffer(buffer, weight.astype(buffer.dtype)))
    parts = jnp.split(y, np.cumsum(heads.parts)[:-1], axis=2)
    sizes = (heads.key_size, heads.key_size, heads.value_size)
    q, k, v = (part.reshape(*part.shape[:2], -1, size) for part, size in zip(parts, sizes, strict=True))

    def normalized(x):
        return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + NORM_EPSILON)

    return normalized(q), normalized(k), v


def _taken(x: Array, tokens: Int[Array, "B n"]) -> Array:
    """x [B, T, ...] at these tokens."""
    return jnp.take_along_axis(x, tokens.reshape(*tokens.shape, *(1,) * (x.ndim - 2)), axis=1)
