"""Packed KV: keys and values as the one array that the ring rotates.

Equal head sizes: kv [2, B, S, K, H], kv[0] keys, kv[1] values. Head sizes that differ: flat
[B, S, K, H + Hv]. Backends read either as it lies; gradients are packed the same way.
"""

import jax
import jax.numpy as jnp


def pack(key: jax.Array, value: jax.Array) -> jax.Array:
    """Key [B, S, K, H] and value [B, S, K, Hv] as one array."""
    if key.shape == value.shape:
        return jnp.stack([key, value])
    return jnp.concatenate([key, value], axis=-1)


def unpack(kv: jax.Array, head_size: int) -> tuple[jax.Array, jax.Array]:
    """(key, value) of a packed array; `head_size` is the key's."""
    if kv.ndim == 5:
        return kv[0], kv[1]
    return kv[..., :head_size], kv[..., head_size:]


def seq_axis(kv: jax.Array) -> int:
    """The axis of S."""
    return kv.ndim - 3


def value_size(kv: jax.Array, head_size: int) -> int:
    """Hv."""
    return kv.shape[-1] if kv.ndim == 5 else kv.shape[-1] - head_size
