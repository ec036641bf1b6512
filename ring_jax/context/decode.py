"""Decode: a few new queries, the same on all ranks, against keys that lie spread over a mesh axis.

Each rank attends to the keys that it has; the partial results meet once, weighted by their LSEs:

    out = sum_r w_r out_r / sum_r w_r,   w_r = exp(lse_r - max_r lse_r)

Two small collectives however long the keys are and however many ranks there are. With so few queries nothing is to be
tiled: reading the keys once is all the time there is, so the products are plain einsums.

Source: vLLM RFC 37995 (decode context parallelism); Flash-Decoding, Dao et al. 2023, for the split over keys.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from ring_jax._vma import pcast_to
from ring_jax.context.shard import Axis, axis_names


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
    return attend_parts(query, [(kv, visible)], scale=scale)


def attend_parts(
    query: Float[Array, "B T N H"],
    parts: Sequence[tuple[Float[Array, "2 B _ K H"], Int[Array, " B"]]],
    *,
    scale: float | None = None,
) -> tuple[Float32[Array, "B T N H"], Float32[Array, "B T N"]]:
    """As `attend_few`, for keys in several arrays, each with its count of visible keys: one softmax over all of them, so
    that no array is joined to another or copied. What is small, the logits, is joined instead."""
    (B, T, N, H), K = query.shape, parts[0][0].shape[3]
    scale = H**-0.5 if scale is None else scale
    q = query.reshape(B, T, K, N // K, H)
    sizes = [kv.shape[2] for kv, _ in parts]
    logits = _joined([_product("BTKGH,BSKH->BKGTS", q, kv[0]) for kv, _ in parts]) * scale
    seen = _joined([jnp.arange(kv.shape[2], dtype=jnp.int32) < visible[:, None] for kv, visible in parts])
    logits = jnp.where(seen[:, None, None, None], logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
    finite = jnp.where(jnp.isneginf(top), 0, top)
    weights = jnp.exp(logits - finite)
    total = jnp.sum(weights, axis=-1)
    split = jnp.split(weights, [sum(sizes[:i]) for i in range(1, len(sizes))], axis=-1)
    outs = [_product("BKGTS,BSKH->BTKGH", w.astype(kv.dtype), kv[1]) for w, (kv, _) in zip(split, parts, strict=True)]
    out = sum(outs[1:], outs[0])
    total = jnp.moveaxis(total, 3, 1)  # [B, T, K, G]
    out = out / jnp.where(total == 0, 1, total)[..., None]
    lse = jnp.log(total) + jnp.moveaxis(finite[..., 0], 3, 1)
    return out.reshape(B, T, N, H), lse.reshape(B, T, N)


def _joined(parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def merge_ranks(
    out: Float32[Array, "B T N H"], lse: Float32[Array, "B T N"], axis: Axis
) -> tuple[Float32[Array, "B T N H"], Float32[Array, "B T N"]]:
    """The partial results of all ranks of `axis` as one, the same on all of them; inside a shard_map."""
    axes = axis_names(axis)
    out, lse = pcast_to((out, lse), axes)
    top = lax.pmax(lse, axes)
    finite = jnp.where(jnp.isneginf(top), 0, top)
    weight = jnp.exp(lse - finite)[..., None]
    packed = lax.psum(jnp.concatenate([out * weight, weight], axis=-1), axes)
    total = packed[..., -1]
    return packed[..., :-1] / jnp.where(total == 0, 1, total)[..., None], finite + jnp.log(total)


def _product(letters: str, a, b) -> jax.Array:
    """An einsum summed in float32; float32 operands are not rounded to TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(letters, a, b, precision=precision, preferred_element_type=jnp.float32)
