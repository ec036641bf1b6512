"""Projections of a GDN layer as one product leaves them: [..., K, P], for each key head q, k, then v, z, b and a of the value heads
that share it, then zeros; `Heads.of_key_head` has their sizes, `Heads.stride` is P. A weight [D, K, P] is cut alike."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ring_jax._arrays import Shaped
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


def given(parts: Sequence[Shaped], leading: int = 2) -> bool:
    """Whether q, k and v come by key heads, `leading` axes before these, and not as one or three arrays [..., features]."""
    return parts[0].ndim == leading + 2


def joined(parts: Sequence[Float[Array, "... _"]]) -> Float[Array, "... _"]:
    """Arrays side by side; one alone as it is."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def joined_inputs(parts: Sequence[Float[Array, "..."]], heads: Heads, leading: int = 2) -> Float[Array, "... F"]:
    """Inputs of the convolution q | k | v from projections as it takes them, see `given`."""
    return inputs(parts[0], heads) if given(parts, leading) else joined(parts)


def _parts(x: jax.Array, heads: Heads) -> list[jax.Array]:
    """q, k, v, z, b and a, each [..., K, size]."""
    return jnp.split(x, list(itertools.accumulate(heads.of_key_head)), axis=-1)[:-1]


def _joined(parts: list[jax.Array]) -> jax.Array:
    return jnp.concatenate([part.reshape(*part.shape[:-2], -1) for part in parts], axis=-1)
