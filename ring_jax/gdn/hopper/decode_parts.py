"""Register layouts of the decode kernel, and functions of scalars that it needs more exactly than the GPU gives them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax.gdn.recurrent import SLOW
from ring_jax.mosaic import compat

_WARPS, _LANES, _VECTOR = 4, 32, 4


def state_layout(columns: int) -> Any:
    """[dk, columns]: a warp owns a quarter of the columns, 16 bytes a thread, and spreads the rows over its other lanes."""
    of_warp = columns // _WARPS
    rows = _LANES * _VECTOR // of_warp
    return compat.tiled_layout(((rows, columns), (rows, of_warp), (1, _VECTOR)), (-5,), (-4, -3))


def expm1(g: jax.Array) -> jax.Array:
    """exp(g) - 1 for scalars SLOW < g <= 0, by its series."""
    total = jnp.float32(1.0)
    for i in range(10, 1, -1):
        total = 1.0 + total * g * (1.0 / i)
    return total * g


def softplus(x: jax.Array) -> jax.Array:
    """log(1 + exp(x)) of a scalar: max(x, 0) + 2 artanh(e / (2 + e)), e = exp(-|x|)."""
    e = jnp.exp(-jnp.abs(x))
    z = e / (2.0 + e)
    square, total = z * z, jnp.float32(0.0)
    for i in range(17, 0, -2):
        total = total * square + 1.0 / i
    return lax.max(x, 0.0) + 2.0 * z * total


assert math.isclose(SLOW, -0.5)  # how far the series of expm1 was cut for
