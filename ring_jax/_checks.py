"""Small helpers that errors and checks share."""

import operator

import jax
import numpy as np


def concrete(x) -> "np.ndarray | None":
    """`x` as NumPy where its value is known now (not traced, on this host), else None."""
    if x is None or isinstance(x, jax.core.Tracer):
        return None
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return None
    return np.asarray(x)


def static_length(name: str, value) -> int:
    """`value` as a Python int; lengths decide shapes and loops, so they must be known at trace time."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(
            f"{name} must be an integer known at trace time, got {value!r}; lengths that are traced or differ between rows go into "
            "query_seq_lengths and key_value_seq_lengths"
        ) from None
