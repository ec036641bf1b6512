"""Projections of a GDN layer as one product leaves them: [..., K, P], for each key head q, k, then v, z, b and a of the value heads
that share it, then zeros; `Heads.of_key_head` has their sizes, `Heads.stride` is P. A weight [D, K, P] is cut alike."""

import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ring_jax.gdn.heads import Heads


def split(x: Float[Array, "... _"], heads: Heads) -> Float[Array, "... K P"]:
    """What a product gives, or the columns of its weight, by key heads."""
    return x.reshape(*x.shape[:-1], heads.key_heads, heads.stride)


def inputs(x: Float[Array, "... K P"], heads: Heads) -> Float[Array, "... F"]:
    """q | k | v, each of all heads: inputs of the convolution."""
    return _joined(_parts(x, heads)[:3])


def gate(x: Float[Array, "... K P"], heads: Heads) -> Float[Array, "... K r dv"]:
    """z of all value heads, r for each key head: with N for K r, XLA reads it in no fusion of a norm."""
    return _parts(x, heads)[3].reshape(*x.shape[:-1], heads.shared, heads.value_size)


def strength_and_decay(x: Float[Array, "... K P"], heads: Heads) -> Float[Array, "... _"]:
    """b | a, each of all value heads."""
    return _joined(_parts(x, heads)[4:])


def _parts(x: jax.Array, heads: Heads) -> list[jax.Array]:
    """q, k, v, z, b and a, each [..., K, size]."""
    return jnp.split(x, list(itertools.accumulate(heads.of_key_head)), axis=-1)[:-1]


def _joined(parts: list[jax.Array]) -> jax.Array:
    return jnp.concatenate([part.reshape(*part.shape[:-2], -1) for part in parts], axis=-1)
