"""Small helpers that errors and checks share."""

import jax
import numpy as np


def concrete(x) -> "np.ndarray | None":
    """`x` as NumPy where its value is known now (not traced, on this host), else None."""
    if x is None or isinstance(x, jax.core.Tracer):
        return None
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return None
    return np.asarray(x)
