"""Documents and padding inside one array, as a recurrence sees them.

Segment ids are int [B, T], one contiguous run for each document; negative ids are padding, which may lie before,
between and after documents. Padding ends a document, as another id does: what has the same id behind it is another one
(`ring_jax.documents` reads ids so, too). A recurrent state runs through padding untouched and starts from zero where a
document begins. What enters from before the array (initial state, convolution tail) belongs to the first document in it,
unless the caller says otherwise: between one call and the next the id decides, not padding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ring_jax._checks import static_length, to_int32

PADDING = -1  # the id that we give to positions that hold nothing


def valid_tokens(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Which tokens are not padding."""
    return segment_ids >= 0


def document_index(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The number of document borders at or before each token, in order: 0 for the first document and for padding
    before it. Padding after a document counts as that document.

    Example:
        >>> import numpy as np
        >>> document_index(np.array([[-1, 7, 7, -1, 7, 2, 2, -1]])).tolist()
        [[0, 0, 0, 0, 1, 2, 2, 2]]
    """
    segment_ids = jnp.asarray(segment_ids)
    valid = valid_tokens(segment_ids).astype(jnp.int32)
    seen = jax.lax.cummax(jnp.pad(valid, ((0, 0), (1, 0)))[:, :-1], axis=1) > 0  # a valid token before
    begins = jnp.concatenate(
        [jnp.zeros_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    starts = valid_tokens(segment_ids) & seen & begins
    return jnp.cumsum(starts, axis=1, dtype=jnp.int32)


def beyond(segment_ids: jax.Array | None, seq_len: int, batch: int, time: int) -> "Int[Array, 'B T'] | None":
    """Segment ids in natural order (None: all of one document) with padding from `seq_len` on."""
    if static_length("seq_len", seq_len, time) == time:
        return segment_ids
    ids = jnp.zeros((batch, time), jnp.int32) if segment_ids is None else jnp.asarray(segment_ids)
    return jnp.where((jnp.arange(time, dtype=jnp.int32) < seq_len)[None], ids, jnp.full_like(ids, PADDING))


def runs(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Segment ids with a number of its own for each document, PADDING on padding: what to compare tokens by."""
    return jnp.where(valid_tokens(segment_ids), document_index(segment_ids), PADDING)


def first_valid(segment_ids: Int[Array, "B T"]) -> Int[Array, "B"]:
    """Index of the first token that is not padding, T where there is none."""
    valid = valid_tokens(segment_ids)
    first = jnp.argmax(valid, axis=1).astype(jnp.int32)
    return jnp.where(valid.any(axis=1), first, segment_ids.shape[1])


def last_valid(segment_ids: Int[Array, "B T"]) -> Int[Array, "B"]:
    """Index of the last token that is not padding, -1 where there is none."""
    valid = valid_tokens(segment_ids)
    last = segment_ids.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1).astype(jnp.int32)
    return jnp.where(valid.any(axis=1), last, -1)


def segment_at(segment_ids: Int[Array, "B T"], index: Int[Array, "B"]) -> Int[Array, "B"]:
    """The segment id at one index of each row, PADDING where the index lies outside."""
    time = segment_ids.shape[1]
    inside = (index >= 0) & (index < time)
    found = jnp.take_along_axis(segment_ids, jnp.clip(index, 0, max(time - 1, 0))[:, None], axis=1)[:, 0]
    return jnp.where(inside, to_int32(found), PADDING)


def carried(initial: Float[Array, "B ..."], previous: Int[Array, "B"], following: Int[Array, "B"]) -> jax.Array:
    """`initial` where the document that it comes from goes on, else zero.

    Args:
        initial: states or tails that enter an array, batch first.
        previous: segment id of the last valid token before the array, negative where unknown: it goes on then.
        following: segment id of the first valid token in the array, negative where there is none.
    """
    goes_on = (previous < 0) | (following < 0) | (previous == following)
    return jnp.where(goes_on.reshape((-1,) + (1,) * (initial.ndim - 1)), initial, jnp.zeros_like(initial))


def blank_padding(segment_ids: Int[Array, "B T"] | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`arrays` ([B, T, ...]) with zeros on padding, whatever lies there now (NaN too)."""
    if segment_ids is None:
        return arrays
    valid = valid_tokens(segment_ids)

    def blank(x: jax.Array) -> jax.Array:
        return jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - 2)), x, jnp.zeros_like(x))

    return tuple(blank(x) for x in arrays)
