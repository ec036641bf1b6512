"""RMS norms that are made within the product that they are for."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ring_jax.gdn.checks import widened


@dataclasses.dataclass(frozen=True, eq=False)
class Normed:
    """x / rms(x) * (1 + weight), not made yet: a product of few rows makes it on the way."""

    x: Float[Array, "*shape D"]
    weight: Float[Array, " D"]
    epsilon: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    def array(self) -> jax.Array:
        """In float32, rounded to x's dtype."""
        wide = widened(self.x)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        scale = 1 + self.weight.astype(wide.dtype)
        return (wide * scale.reshape((1,) * (wide.ndim - 1) + scale.shape)).astype(self.x.dtype)


def made(x: jax.Array | Normed) -> jax.Array:
    """x itself, with its norm if it has one."""
    return x.array() if isinstance(x, Normed) else x
