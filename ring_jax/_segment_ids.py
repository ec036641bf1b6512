"""Integers that masks are made from: counts of each row, borders, and segment ids in natural order."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from ring_jax._checks import INT32, as_integers, concrete, to_int32

Integers = list[int] | list[list[int]]  # the short way to write what belongs into an array


def per_row(name: str, n: Any) -> Array:
    """A count >= 0 as int32 [1] or [B], saturated: NumPy while it is known, so that masks made at import touch no device."""
    if type(n) is int and n >= 0:  # the usual offset, in every eager call
        return np.full(1, min(n, INT32.max), np.int32)  # type: ignore[return-value]
    n = as_integers(name, n, "() | B")
    n = n if isinstance(n, jax.Array) else np.asarray(n)
    known = concrete(n)
    if known is not None and np.any(known < 0):
        raise ValueError(f"{name} must be >= 0, got {known}")
    return to_int32(n.reshape(-1))


def rows(name: str, x: Any) -> Array:
    """Integers [n] or [B, n] as [1 or B, n], of the dtype that they have."""
    x = as_integers(name, x, "n | B n")
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    return x[None] if x.ndim == 1 else x


def known_segment_ids(ids: Any) -> Array:
    out = rows("segment_ids", ids)
    check_segment_ids(out)
    # Ids are only compared: traced ones keep a wider dtype, in which no two of them become one.
    return to_int32(out) if concrete(out) is not None else out


def check_segment_ids(ids: Any) -> None:
    """Raises ValueError where integer ids [B, S] are known and do not fit into int32, or come back after another document."""
    known = concrete(ids)
    if known is None or not known.size:
        return
    low, high = int(known.min()), int(known.max())
    if low < INT32.min or high > INT32.max:
        raise ValueError(f"segment_ids must fit into int32, got values from {low} to {high}: number the documents anew")
    for row in known:
        row = row[row >= 0]
        runs = row[np.append(True, row[1:] != row[:-1])] if len(row) else row
        values, counts = np.unique(runs, return_counts=True)
        if np.any(counts > 1):
            raise ValueError(
                f"segment_ids: segment id {values[counts > 1][0]} is used by two separate runs, its tokens would see two intervals: "
                "give every document one contiguous run of its own id."
            )


def contiguous_segments(segment_ids: "Integers | Int[Array, 'B S']") -> "Bool[Array, ' B']":
    """Whether no id of a row comes back after another document, for ids that are traced.

    Where ids are known, an id that comes back is an error. Under jit it silently begins one more document; this says so there:

        loss = jnp.where(contiguous_segments(ids).all(), loss, jnp.nan)
        checkify.check(contiguous_segments(ids).all(), "a segment id is used by two documents")

    Args:
        segment_ids: integers [B, S] in natural order, negative for padding.

    Returns:
        bool [B].

    Example:
        >>> contiguous_segments(np.array([[5, 5, -1, 2], [0, 1, 0, 1]])).tolist()
        [True, False]
    """
    ids = jnp.asarray(rows("segment_ids", segment_ids))
    index = lax.broadcasted_iota(jnp.int32, ids.shape, 1)
    last = lax.cummax(jnp.where(ids >= 0, index, -1), axis=1)  # index of the last valid token so far
    before = jnp.pad(last, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    previous = jnp.take_along_axis(ids, jnp.maximum(before, 0), axis=1)
    starts = (ids >= 0) & ((before < 0) | (previous != ids))
    found = jnp.sort(jnp.where(starts, ids, jnp.full_like(ids, -1)), axis=1)
    return ~((found[:, 1:] == found[:, :-1]) & (found[:, 1:] >= 0)).any(axis=1)


def borders(name: str, cu: Any) -> Array:
    out = to_int32(rows(name, cu))
    known = concrete(out)
    if out.shape[-1] < 2:
        raise ValueError(f"{name} needs at least two borders [start, end], got shape {out.shape}")
    if known is not None and np.any(np.diff(known, axis=-1) < 0):
        raise ValueError(f"{name} must not descend, got {known}")
    return out
