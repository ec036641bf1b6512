"""Packed KV: keys and values as the one array that the ring rotates.

Equal head sizes: kv [2, B, S, K, H], kv[0] keys, kv[1] values. Head sizes that differ: flat
[B, S, K, H + Hv]. Backends read either as it lies; gradients are packed the same way.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Heads(NamedTuple):
    """Which KV heads an array holds, where it does not hold all that the queries share: from `first` on, of `total`."""

    first: int
    total: int


def check_heads(kv: jax.Array, heads: Heads | None) -> None:
    """Raises ValueError where kv has more heads than there are from `heads.first` on."""
    if heads is not None and not 0 <= heads.first <= heads.total - kv.shape[-2]:
        raise ValueError(f"kv has {kv.shape[-2]} heads from {heads.first} on, of {heads.total} in all: too many")


def halve_heads(kv: jax.Array) -> list[tuple[Heads | None, jax.Array]]:
    """kv in two arrays, each of about half of the heads."""
    total = kv.shape[-2]
    return [(Heads(a, total), kv[..., a:b, :]) for a, b in ((0, total // 2), (total // 2, total))]


def pack(key: jax.Array, value: jax.Array) -> jax.Array:
    """Key [B, S, K, H] and value [B, S, K, Hv] as one array."""
    if key.shape == value.shape:
        return jnp.stack([key, value])
    return jnp.concatenate([key, value], axis=-1)


def pack_like(key: jax.Array, value: jax.Array) -> jax.ShapeDtypeStruct:
    """Shape and dtype of `pack(key, value)`, computing nothing."""
    if key.shape == value.shape:
        return jax.ShapeDtypeStruct((2, *key.shape), key.dtype)
    return jax.ShapeDtypeStruct((*key.shape[:-1], key.shape[-1] + value.shape[-1]), key.dtype)


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


def fold_parts(kv: jax.Array, bounds: Sequence[jax.Array]) -> tuple[jax.Array, tuple[jax.Array, ...], int]:
    """(kv, bounds, P) of keys in P parts with the parts inside another axis of kv: [2 P, B, S, K, H] or [P B, S, K, H + Hv].

    Bounds [B, T] are those of keys in one piece: all stays as it is. For P = 1, too, bounds come back as [B, T].
    """
    if bounds[0].ndim == 2:
        return kv, tuple(bounds), 1
    parts = bounds[0].shape[0]
    if kv.ndim not in (5, 6) or kv.shape[0] != parts or parts == 0:
        raise ValueError(
            f"bounds {bounds[0].shape} of keys in parts need kv [P, 2, B, S, K, H] or [P, B, S, K, H + Hv], got {kv.shape}"
        )
    kv = kv.reshape(-1, *kv.shape[2:])
    return kv, tuple(x[0] for x in bounds) if parts == 1 else tuple(bounds), parts
