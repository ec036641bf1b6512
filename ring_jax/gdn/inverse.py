"""The inverse of I + N for strictly lower triangular N, by matrix products only.

Diagonal blocks of 8 by the (finite) Neumann product (I - N)(I + N^2)(I + N^4); then blocks are joined in pairs,

    [[A, 0], [L, D]]^-1 = [[A^-1, 0], [-D^-1 L A^-1, D^-1]],

doubling 8 -> 16 -> 32 -> 64. The Neumann product alone would need N^32, whose entries grow like binomials where
neighbouring keys are alike (10^18 for equal keys) and cancel; up to N^4 they stay below 35.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

BASE = 8


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


@jax.custom_jvp
def unit_lower_inverse(strict: Float[Array, "*batch L L"]) -> Float[Array, "*batch L L"]:
    """(I + strict)^-1, float32 or float64.

    Args:
        strict: strictly lower triangular (entries on and above the diagonal must be zero), L = 8 * 2^n.

    Returns:
        The inverse, unit lower triangular.

    Example:
        >>> import jax.numpy as jnp
        >>> unit_lower_inverse(jnp.zeros((8, 8)).at[1, 0].set(3.0))[1, 0].item()
        -3.0
    """
    size = strict.shape[-1]
    n = _diagonal_blocks(strict, BASE)
    square = _matmul(n, n)
    x = jnp.eye(BASE, dtype=n.dtype).reshape((1,) * (n.ndim - 2) + (BASE, BASE)) - n
    x = x + _matmul(x, square)
    x = x + _matmul(x, _matmul(square, square))
    block = BASE
    while block < size:
        low = _diagonal_blocks(strict, 2 * block)[..., block:, :block]
        first, second = x[..., 0::2, :, :], x[..., 1::2, :, :]
        low = -_matmul(_matmul(second, low), first)
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        x = jnp.concatenate([top, jnp.concatenate([low, second], axis=-1)], axis=-2)
        block *= 2
    return x[..., 0, :, :]


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    inverse = unit_lower_inverse(*primals)
    return inverse, -_matmul(_matmul(inverse, tangents[0]), inverse)


def _diagonal_blocks(x: jax.Array, block: int) -> jax.Array:
    """[..., L, L] to [..., L / block, block, block]."""
    starts = range(0, x.shape[-1], block)
    return jnp.stack([x[..., i : i + block, i : i + block] for i in starts], axis=-3)
