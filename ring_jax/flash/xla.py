"""Flash attention in plain XLA: blockwise, O(S x block) memory, any device, tiles skipped by their bounds.

Forward: for each tile of queries, a loop over just the key tiles that some row of it sees, with the
online softmax of FlashAttention-2 (Dao, arXiv 2307.08691); m is the running maximum, l the running sum.
Backward: the same two loops, from the final LSE; P is recomputed, dK and dV accumulate in float32.

The loops' trip counts depend on the bounds, so skipping is exact for every mask. It costs nothing on a
CPU; on a GPU the host waits at each loop's end, which is one reason why GPUs have kernels of their own.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from ring_jax._vma import pcast_to, varying_axes
from ring_jax.flash.kv import pack, seq_axis, unpack, value_size
from ring_jax.flash.merge import partial_dtype
from ring_jax.flash.operands import BlockOptions, Bounds, Gradients, Partial, RowGradients

_BLOCK_Q = 512
_BLOCK_K = 512


def _precision(dtype: DTypeLike) -> lax.Precision:
    # float32 inputs deserve float32 products (GPUs would use TF32); 16-bit inputs are exact in one pass.
    return lax.Precision.HIGHEST if jnp.finfo(dtype).bits >= 32 else lax.Precision.DEFAULT


def _tiles(x: jax.Array, block: int, axis: int = 1) -> jax.Array:
    """[B, T, ...] -> [T/block, B, block, ...], padded with zeros."""
    pad = -x.shape[axis] % block
    x = jnp.pad(x, [(0, pad if a == axis else 0) for a in range(x.ndim)])
    x = x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _untile(x: jax.Array, length: int) -> jax.Array:
    """Inverse of `_tiles` for axis 1."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _pad_keys(kv: jax.Array, block: int) -> jax.Array:
    axis = seq_axis(kv)
    return jnp.pad(kv, [(0, -kv.shape[axis] % block if a == axis else 0) for a in range(kv.ndim)])


def _key_tiles(bounds: Bounds, block: int, length: int) -> tuple[jax.Array, jax.Array]:
    """[first, last) key tile that any non-empty row of a query tile sees."""
    some = bounds.start < bounds.end
    first = jnp.min(jnp.where(some, bounds.start, length)) // block
    last = (jnp.max(jnp.where(some, bounds.end, 0)) + block - 1) // block
    return first, last


def _logits(
    q_btkgh: jax.Array,
    k_bskh: jax.Array,
    bounds: Bounds,
    offset: jax.Array | int,
    options: BlockOptions,
    acc_dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """Scaled, capped logits [B, K, G, T, S] of one tile and their visibility."""
    s = jnp.einsum(
        "btkgh,bskh->bkgts", q_btkgh, k_bskh, precision=_precision(q_btkgh.dtype), preferred_element_type=acc_dtype
    )
    s = s * options.scale
    if (cap := options.logits_soft_cap) is not None:
        s = cap * jnp.tanh(s / cap)
    index = offset + jnp.arange(k_bskh.shape[1], dtype=jnp.int32)[None, None]
    visible = (index >= bounds.start[..., None]) & (index < bounds.end[..., None])
    return s, visible[:, None, None]


def _rows(x_btn: jax.Array, K: int) -> jax.Array:
    """[B, T, N] -> [B, K, G, T, 1], to stand beside logits."""
    B, T, N = x_btn.shape
    return jnp.moveaxis(x_btn.reshape(B, T, K, N // K), 1, 3)[..., None]


def _split_heads(x_btnh: jax.Array, K: int) -> jax.Array:
    B, T, N, H = x_btnh.shape
    return x_btnh.reshape(B, T, K, N // K, H)


def _merge_heads(x_bkgth: jax.Array) -> jax.Array:
    B, K, G, T, H = x_bkgth.shape
    return jnp.moveaxis(x_bkgth, 3, 1).reshape(B, T, K * G, H)


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
    B, T, N, H = query.shape
    K, Hv = kv.shape[-2], value_size(kv, H)
    S, acc_dtype = kv.shape[seq_axis(kv)], partial_dtype(query.dtype)
    bq, bk = min(_BLOCK_Q, T), min(_BLOCK_K, S)
    kv = _pad_keys(kv, bk)
    axes = varying_axes(query, kv, bounds, carry)
    einsum = functools.partial(jnp.einsum, precision=_precision(kv.dtype), preferred_element_type=acc_dtype)
    if carry is None:
        carry = (jnp.zeros((B, T, N, Hv), acc_dtype), jnp.full((B, T, N), -jnp.inf, acc_dtype))

    def q_tile(_: None, tile: tuple[jax.Array, Bounds, Partial]) -> tuple[None, Partial]:
        q, bounds, (out_in, lse_in) = tile
        q_btkgh = _split_heads(q, K)
        empty = jnp.isneginf(lse_in)
        m = _rows(lse_in, K)
        l = _rows(jnp.where(empty, 0, 1).astype(acc_dtype), K)
        acc = jnp.moveaxis(_split_heads(out_in, K), 1, 3)

        def k_tile(
            j: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            m, l, acc = state
            k, v = unpack(lax.dynamic_slice_in_dim(kv, j * bk, bk, seq_axis(kv)), H)
            s, visible = _logits(q_btkgh, k, bounds, j * bk, options, acc_dtype)
            s = jnp.where(visible, s, -jnp.inf)
            m_new = jnp.maximum(m, jnp.max(s, axis=-1, keepdims=True))
            m_safe = jnp.where(jnp.isneginf(m_new), 0, m_new)
            p, shrink = jnp.exp(s - m_safe), jnp.exp(m - m_safe)
            pv = einsum("bkgts,bskh->bkgth", p.astype(v.dtype), v)
            return m_new, l * shrink + jnp.sum(p, axis=-1, keepdims=True), acc * shrink + pv

        first, last = _key_tiles(bounds, bk, S)
        m, l, acc = lax.fori_loop(first, last, k_tile, pcast_to((m, l, acc), axes))
        none = l == 0
        out = jnp.where(none, 0, acc / jnp.where(none, 1, l))
        lse = jnp.where(none, -jnp.inf, m + jnp.log(jnp.where(none, 1, l)))
        return None, (_merge_heads(out).astype(out_dtype or acc_dtype), _merge_heads(lse)[..., 0])

    tiles = jax.tree.map(functools.partial(_tiles, block=bq), (query, bounds, carry))
    _, (out, lse) = lax.scan(q_tile, None, tiles)
    return _untile(out, T), _untile(lse, T)


def backward(query: jax.Array, kv: jax.Array, bounds: Bounds, rows: RowGradients, options: BlockOptions) -> Gradients:
    """Gradients of one block from the final LSE and delta = rowsum(dO . O) - dLSE; see `flash.backends`."""
    B, T, N, H = query.shape
    K = kv.shape[-2]
    S = kv.shape[seq_axis(kv)]
    acc_dtype = partial_dtype(query.dtype)
    bq, bk = min(_BLOCK_Q, T), min(_BLOCK_K, S)
    kv_padded = _pad_keys(kv, bk)
    axis = seq_axis(kv)
    axes = varying_axes(query, kv, bounds, rows)
    einsum = functools.partial(jnp.einsum, precision=_precision(query.dtype), preferred_element_type=acc_dtype)

    def q_tile(dkv: jax.Array, tile: tuple[jax.Array, Bounds, RowGradients]) -> tuple[jax.Array, jax.Array]:
        q, bounds, (lse, delta, do) = tile
        q_btkgh, do_btkgh = _split_heads(q, K), _split_heads(do.astype(q.dtype), K)
        lse, delta = _rows(jnp.where(jnp.isneginf(lse), 0, lse), K), _rows(delta, K)

        def k_tile(j: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            dq, dkv = state
            k, v = unpack(lax.dynamic_slice_in_dim(kv_padded, j * bk, bk, axis), H)
            s, visible = _logits(q_btkgh, k, bounds, j * bk, options, acc_dtype)
            p = jnp.where(visible, jnp.exp(jnp.where(visible, s - lse, 0)), 0)
            ds = p * (einsum("btkgh,bskh->bkgts", do_btkgh, v) - delta)
            if (cap := options.logits_soft_cap) is not None:
                ds = ds * (1 - (s / cap) ** 2)
            ds = (ds * options.scale).astype(q.dtype)
            dq = dq + einsum("bkgts,bskh->bkgth", ds, k)
            dk = einsum("bkgts,btkgh->bskh", ds, q_btkgh)
            dv = einsum("bkgts,btkgh->bskh", p.astype(q.dtype), do_btkgh)
            old = lax.dynamic_slice_in_dim(dkv, j * bk, bk, axis)
            return dq, lax.dynamic_update_slice_in_dim(dkv, old + pack(dk, dv), j * bk, axis)

        first, last = _key_tiles(bounds, bk, S)
        dq = pcast_to(jnp.zeros((B, K, N // K, q.shape[1], H), acc_dtype), axes)
        dq, dkv = lax.fori_loop(first, last, k_tile, (dq, dkv))
        return dkv, _merge_heads(dq)

    tiles = jax.tree.map(functools.partial(_tiles, block=bq), (query, bounds, rows))
    dkv, dq = lax.scan(q_tile, pcast_to(jnp.zeros(kv_padded.shape, acc_dtype), axes), tiles)
    return _untile(dq, T), lax.slice_in_dim(dkv, 0, S, axis=axis)
