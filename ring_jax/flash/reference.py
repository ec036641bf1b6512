"""Attention as the formula says: materialised, float32 (float64 for float64 inputs), no tricks.

    S = scale Q K^T,  P = softmax over the visible keys and the carry,  O = P V

This is the oracle for every other backend. `forward` is plain JAX, so autodiff through it gives
reference gradients too; `backward` is the block rule that a ring needs, from the final LSE.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ring_jax.flash.kv import pack, unpack
from ring_jax.flash.merge import merge_partials, partial_dtype
from ring_jax.flash.operands import BlockOptions, Bounds, Gradients, Partial, RowGradients

_HIGHEST = jax.lax.Precision.HIGHEST


def _logits(query: jax.Array, key: jax.Array, bounds: Bounds, options: BlockOptions) -> tuple[jax.Array, jax.Array]:
    """Masked logits [B, K, G, T, S], and what the soft cap's derivative needs."""
    dtype = partial_dtype(query.dtype)
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    q_btkgh = query.reshape(B, T, K, N // K, H).astype(dtype)
    logits = jnp.einsum("btkgh,bskh->bkgts", q_btkgh, key.astype(dtype), precision=_HIGHEST) * options.scale
    if (cap := options.logits_soft_cap) is not None:
        logits = cap * jnp.tanh(logits / cap)
    index = jnp.arange(S, dtype=jnp.int32)[None, None]
    visible = (index >= bounds.start[..., None]) & (index < bounds.end[..., None])
    return logits, visible[:, None, None]


def _heads_last(x_bkgt: jax.Array) -> jax.Array:
    B, K, G, T = x_bkgt.shape
    return jnp.moveaxis(x_bkgt, 3, 1).reshape(B, T, K * G)


def forward(
    query: jax.Array,
    kv: jax.Array,
    bounds: Bounds,
    carry: Partial | None,
    options: BlockOptions,
    *,
    out_dtype: DTypeLike | None = None,
) -> Partial:
    """One block, see `ring_jax.flash_attention`. kv is packed."""
    key, value = unpack(kv, query.shape[-1])
    logits, visible = _logits(query, key, bounds, options)
    some = jnp.any(visible, axis=-1, keepdims=True)
    logits = jnp.where(visible, logits, jnp.finfo(logits.dtype).min)
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    # Same-precision products: probabilities meet V in V's dtype, as in every flash kernel.
    p_bkgts = jnp.where(visible, jnp.exp(logits - jnp.where(some, lse, 0)), 0).astype(value.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", p_bkgts, value, precision=_HIGHEST, preferred_element_type=logits.dtype)
    out = out.reshape(*query.shape[:3], value.shape[-1])
    lse = _heads_last(jnp.where(some, lse, -jnp.inf)[..., 0])
    if carry is not None:
        out, lse = merge_partials(*carry, out, lse)
    return out.astype(out_dtype or out.dtype), lse


def backward(query: jax.Array, kv: jax.Array, bounds: Bounds, rows: RowGradients, options: BlockOptions) -> Gradients:
    """Gradients of one block from the final LSE and delta = rowsum(dO . O) - dLSE; see `flash.backends`."""
    key, value = unpack(kv, query.shape[-1])
    s, visible = _logits(query, key, bounds, options)
    B, T, N, H = query.shape
    K = key.shape[2]

    def rows_of(x_btn: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_btn.reshape(B, T, K, N // K), 1, 3)[..., None]

    lse, delta = rows_of(rows.lse), rows_of(rows.delta)
    p = jnp.where(visible, jnp.exp(s - jnp.where(jnp.isneginf(lse), 0, lse)), 0)
    do_btkgh = rows.dout.reshape(B, T, K, N // K, -1).astype(s.dtype)
    dv = jnp.einsum("bkgts,btkgh->bskh", p, do_btkgh, precision=_HIGHEST)
    ds = p * (jnp.einsum("btkgh,bskh->bkgts", do_btkgh, value.astype(s.dtype), precision=_HIGHEST) - delta)
    if (cap := options.logits_soft_cap) is not None:
        ds = ds * (1 - (s / cap) ** 2)
    q_btkgh = query.reshape(B, T, K, N // K, H).astype(s.dtype)
    dq = options.scale * jnp.einsum("bkgts,bskh->btkgh", ds, key.astype(s.dtype), precision=_HIGHEST)
    dk = options.scale * jnp.einsum("bkgts,btkgh->bskh", ds, q_btkgh, precision=_HIGHEST)
    return dq.reshape(query.shape), pack(dk, dv)
