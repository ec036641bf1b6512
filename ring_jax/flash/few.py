"""Attention of a few queries: with nothing to be tiled, reading the keys once is all the time there is, and products are plain.

Source: Flash-Decoding, Dao et al. 2023, whose split over keys is here the caller's parts.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int

from ring_jax._checks import to_int32


def attend_few(
    query: Float[Array, "B T N H"],
    kv: Float[Array, "2 B S K H"],
    visible: Int[Array, " B"],
    *,
    scale: float | None = None,
) -> tuple[Float32[Array, "B T N H"], Float32[Array, "B T N"]]:
    """Attention of a few queries to the first `visible` keys of each row.

    Args:
        query: [B, T, N, H], N a multiple of K.
        kv: keys and values, packed; those beyond `visible` may hold anything finite.
        visible: int [B].
        scale: of the logits; default H ** -0.5.

    Returns:
        (out, lse), float32, natural log: a partial result as `ring_jax.flash_attention` gives it; 0 and -inf where
        no key is visible.
    """
    return attend_parts(query, [(kv[0], kv[1], visible)], scale=scale)


def attend_parts(
    query: Float[Array, "B T N H"],
    parts: Sequence[tuple[Float[Array, "B _ K H"], Float[Array, "B _ K H"], Int[Array, " B"] | Bool[Array, "B _"]]],
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
) -> tuple[Float32[Array, "B T N H"], Float32[Array, "B T N"]]:
    """As `attend_few`, for several (keys, values, how many of them are visible, or which): one softmax over all of them, so that
    no array is joined to another or copied. What is small, the logits, is joined instead.

    Each product takes the keys of all heads as one matrix [S, K H], with queries that are zero but in their own head: a
    product for each head would be a strided one, whose slice of a larger array XLA copies first. The multiplications by
    zero cost nothing beside reading the keys. A barrier gives each product a query of its own: XLA joins the other
    operands of products that share one.
    """
    (B, T, N, H), K = query.shape, parts[0][0].shape[2]
    scale = H**-0.5 if scale is None else scale
    own = (jnp.arange(N)[:, None] // (N // K) == jnp.arange(K)[None, :])[None, None, ..., None]  # [1, 1, N, K, 1]
    q = jnp.where(own, query[:, :, :, None], jnp.zeros((), query.dtype)).reshape(B, T * N, K * H)
    queries = [q, *(lax.optimization_barrier((q, i))[0] for i in range(1, len(parts)))]
    flat = lambda x: x.reshape(*x.shape[:2], K * H)  # noqa: E731
    pieces = [_product("BMD,BSD->BMS", q, flat(key)) for q, (key, _, _) in zip(queries, parts, strict=True)]
    logits = _joined(lax.optimization_barrier(pieces)) * scale  # no product inside of the joining
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    seen = _joined([_seen(visible, key.shape[1]) for key, _, visible in parts])
    logits = jnp.where(seen[:, None], logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
    finite = jnp.where(jnp.isneginf(top), 0, top)
    weights = jnp.exp(logits - finite)
    total = jnp.sum(weights, axis=-1)
    ends = list(itertools.accumulate(key.shape[1] for key, _, _ in parts[:-1]))
    split = jnp.split(weights, ends, axis=-1)
    outs = [
        _product("BMS,BSD->BMD", w.astype(value.dtype), flat(value))
        for w, (_, value, _) in zip(split, parts, strict=True)
    ]
    out = sum(outs[1:], outs[0]).reshape(B, T, N, K, H)
    out = jnp.sum(jnp.where(own, out, 0), axis=3)
    total = total.reshape(B, T, N)
    out = out / jnp.where(total == 0, 1, total)[..., None]
    return out, jnp.log(total) + finite.reshape(B, T, N)


def _seen(visible: Any, keys: int) -> jax.Array:
    """bool [B, keys], from that or from how many each row sees."""
    if visible.dtype == jnp.bool_:
        return visible
    return jnp.arange(keys, dtype=jnp.int32)[None] < to_int32(visible)[:, None]


def _joined(parts: Any) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _product(letters: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum summed in float32; float32 operands are not rounded to TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(letters, a, b, precision=precision, preferred_element_type=jnp.float32)
