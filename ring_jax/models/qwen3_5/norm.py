"""RMS norms of the model, made at once or within the product that they are for."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ring_jax.gdn.checks import widened
from ring_jax.models.qwen3_5.config import Config


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


def norm(x: jax.Array, weight: Any, config: Config) -> jax.Array:
    return Normed(x, weight[...], config.norm_epsilon).array()
