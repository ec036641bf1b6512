"""The short depthwise causal convolution in front of the gated delta rule.

    y_t = sum_j w_j x_{t - (W-1) + j},   j = 0 ... W-1,

where a token sees earlier tokens of its own document only. What a later call needs is the *tail*: the last W - 1
inputs of the last document, zeros where it is shorter. Zeros before a document are what a convolution starts from, so
a tail of zeros is no tail. Padding (negative segment ids) before and between documents is skipped: a tail that enters
stands right before the first valid token.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ring_jax._checks import Sizes, check_array
from ring_jax.gdn.checks import check_segments, state_dtype
from ring_jax.gdn.segments import PADDING, blank_padding, first_valid, last_valid, runs, segment_at


def causal_convolution(
    x: Float[Array, "B T F"],
    weight: Float[Array, "W F"],
    *,
    tail: Float[Array, "B W-1 F"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T F"], Float[Array, "B W-1 F"]]:
    """Depthwise causal convolution over time, without bias, that can be cut anywhere.

    Args:
        x: inputs, any floating dtype. Sums are formed in float32 (float64 for float64).
        weight: `weight[j]` multiplies the input W - 1 - j tokens back (a checkpoint's `conv1d.weight` [F, 1, W]
            is its transpose).
        tail: the last W - 1 inputs before x, zeros by default; it continues the first document of each row.
        segment_ids: ids of packed documents, negative for padding, as in `gated_delta_rule`.

    Returns:
        y in x's dtype (zeros on padding), and the tail after the last valid token.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> y, tail = causal_convolution(jnp.arange(1.0, 6.0).reshape(1, 5, 1), jnp.ones((3, 1)))
        >>> y[0, :, 0].tolist(), tail[0, :, 0].tolist()
        ([1.0, 3.0, 6.0, 9.0, 12.0], [4.0, 5.0])
    """
    check_convolution(x, weight, tail, segment_ids)
    batch, time, features = x.shape
    history = weight.shape[0] - 1
    if tail is None:
        tail = jnp.zeros((batch, history, features), x.dtype)
    if segment_ids is None:
        buffer = jnp.concatenate([tail, x], axis=1)
        return convolve_buffer(buffer, weight), buffer[:, time:]
    (x,) = blank_padding(segment_ids, x)
    first, last = first_valid(segment_ids), last_valid(segment_ids)
    buffer, ids = jnp.concatenate([jnp.zeros_like(tail), x], axis=1), pad_ids(segment_ids, history)
    buffer, ids = insert_tail(buffer, ids, tail, first, segment_at(segment_ids, first))
    ids = runs(ids)
    y = convolve_buffer(buffer, weight, ids, segment_ids)
    return y, jnp.where((last >= 0)[:, None, None], tail_at(buffer, ids, last + history, history), tail)


def check_convolution(x: Any, weight: Any, tail: Any, segment_ids: Any) -> None:
    """Raises unless the operands of one convolution fit together."""
    sizes = Sizes()
    check_array("x", x, "B T F", sizes)
    check_array("weight", weight, "W F", sizes, advice="a checkpoint's conv1d.weight [F, 1, W] is weight[:, 0].T")
    if sizes["W"] < 1:
        raise ValueError(f"weight must have at least one tap, got shape {weight.shape}")
    if tail is not None:
        sizes["W-1"] = sizes["W"] - 1
        check_array("tail", tail, "B W-1 F", sizes, advice="the last W - 1 inputs")
        if tail.dtype != x.dtype:
            raise ValueError(f"tail must have x's dtype {x.dtype}, got {tail.dtype}: it holds inputs")
    check_segments(segment_ids, *x.shape[:2])


def convolve_buffer(buffer: Array, weight: Array, ids: Array | None = None, segment_ids: Array | None = None) -> Array:
    """y [B, T, F] from [B, W-1+T, F] inputs with the history in front; `ids` [B, W-1+T] are their `runs`, and
    `segment_ids` [B, T] say which outputs are padding (where a tail may stand in the buffer)."""
    width = weight.shape[0]
    time = buffer.shape[1] - width + 1
    total: Array | None = None
    dtype = state_dtype(buffer, weight)
    for j in range(width):
        term = buffer[:, j : j + time].astype(dtype) * weight[j].astype(dtype)[None, None]
        if ids is not None:
            assert segment_ids is not None
            same = (ids[:, j : j + time] == ids[:, width - 1 :]) & (segment_ids >= 0)
            term = jnp.where(same[..., None], term, 0)
        total = term if total is None else total + term
    assert total is not None
    return total.astype(buffer.dtype)


def pad_ids(segment_ids: Array, history: int) -> Array:
    """Segment ids [B, history + T] with nothing in front."""
    return jnp.pad(segment_ids, ((0, 0), (history, 0)), constant_values=PADDING)


def insert_tail(buffer: Array, ids: Array, tail: Array, position: Array, segment: Array) -> tuple[Array, Array]:
    """Writes a tail right before the first valid token.

    Args:
        buffer, ids: inputs [B, W-1+T, F] and their segment ids.
        tail: [B, W-1, F].
        position: int [B], the time of the first valid token (time 0 is buffer index W-1); times outside are skipped.
        segment: int [B], the document that the tail belongs to, PADDING for none.
    """
    history = tail.shape[1]
    index = jnp.arange(buffer.shape[1], dtype=jnp.int32)
    for i in range(history):
        here = index[None] == (position[:, None] + i)
        buffer = jnp.where(here[..., None], tail[:, i : i + 1], buffer)
        ids = jnp.where(here, segment[:, None], ids)
    return buffer, ids


def tail_at(buffer: Array, ids: Array, last: Array, history: int) -> Array:
    """The `history` inputs up to buffer index `last` [B], zeros where they belong to another document; `ids` are `runs`."""
    index = last[:, None] - jnp.arange(history - 1, -1, -1, dtype=jnp.int32)[None]
    clipped = jnp.clip(index, 0, buffer.shape[1] - 1)
    found = jnp.take_along_axis(buffer, clipped[..., None], axis=1)
    found_ids = jnp.take_along_axis(ids, clipped, axis=1)
    own = jnp.take_along_axis(ids, jnp.clip(last, 0, buffer.shape[1] - 1)[:, None], axis=1)
    return jnp.where(((index >= 0) & (found_ids == own))[..., None], found, jnp.zeros_like(found))
