"""Small array helpers that several parts share."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

# For kernels, whose exponentials are powers of two.
LOG2E = math.log2(math.e)

# What has a shape and a dtype, and perhaps no values.
Shaped = jax.Array | jax.ShapeDtypeStruct


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is >= n."""
    return -(-n // multiple) * multiple


def pad_to(x: jax.Array, axis: int, size: int, mode: str = "constant") -> jax.Array:
    """`x` with `axis` padded at its end to `size`, by zeros or as `jnp.pad`'s mode says; x itself where it has that size."""
    axis %= x.ndim
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[a] if a == axis else 0) for a in range(x.ndim)], mode=mode)


def rounded_to(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x with the mantissa and exponent of a narrower dtype, in its own. A cast there and back XLA may leave out: it allows more
    bits than asked for."""
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)


def on_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """A whole array on this host, also one that lies over several processes: all of them must ask for it."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)
