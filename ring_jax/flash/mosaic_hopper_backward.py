"""Flash-attention backward on Hopper in Pallas Mosaic GPU: two kernels, seven matrix products, bitwise repeatable.

    S = scale Q K^T (soft-capped),  P = exp(S - LSE),  dV = P^T dO,  dP = dO V^T,  dS = P (dP - delta),
    dQ = scale dS K,  dK = scale dS^T Q

Algorithm: FlashAttention-2 (arXiv 2307.08691), section 3.1.2, with the warp specialisation of FlashAttention-3
(arXiv 2407.08608). LSE is the final one of the whole attention, perhaps over several KV blocks, and
delta = rowsum(dO . O) - dLSE (the paper's D). The plain form is `flash.reference.backward`.

- `dkv`: a program owns one KV tile of one KV head and walks over the query tiles of every query head of the group, so
  dK and dV stay in registers and GQA needs no atomics. It works on transposed tiles S^T [keys, queries]: P^T and dS^T
  then are left operands in registers.
- `dq`: a program owns one query tile of one query head and walks over the KV tiles.

One warpgroup feeds shared memory by TMA, two compute. Where dK and dV do not fit one warpgroup's registers (H + Hv >
256) the compute warpgroups of `dkv` split by role instead of by rows: one makes P and dV, the other dS and dK.

Tiles outside the interval of keys that their rows see are never visited; only tiles on its edge are masked.
"""

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from ring_jax.flash import mosaic_backward_fused, packed
from ring_jax.flash.mosaic_backward_common import (
    LOG2E,
    ROWS,
    WGS,
    BackwardConfig,
    Problem,
    default_config,
    splits_by_role,
)
from ring_jax.flash.mosaic_backward_dkv import dkv as dkv_kernel
from ring_jax.flash.mosaic_backward_dq import dq as dq_kernel


def unsupported_reason(query, kv, *, logits_soft_cap=None, **_) -> str | None:
    """Why `backward` cannot run on these shapes and dtypes, or None. Says nothing of the device."""
    if query.dtype not in (jnp.bfloat16, jnp.float16) or kv.dtype != query.dtype:
        return (
            f"the Hopper backward takes bfloat16 or float16 query and KV of one dtype, got {query.dtype} and {kv.dtype}"
        )
    H = query.shape[-1]
    Hv = packed.value_size(kv, H)
    if H % 64 or Hv % 64 or not (64 <= H <= 256 and 64 <= Hv <= 256):
        return f"the Hopper backward takes head sizes 64, 128, 192 and 256, got {H} and {Hv}: pad them with zeros"
    if query.shape[2] % kv.shape[-2]:
        return f"{query.shape[2]} query heads cannot share {kv.shape[-2]} KV heads"
    if 0 in query.shape or 0 in kv.shape:
        return "the Hopper backward takes no empty arrays"
    return None


def backward(
    query: jax.Array,
    kv: jax.Array,
    key_start: jax.Array,
    key_end: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
    *,
    scale: float,
    logits_soft_cap: float | None = None,
    deterministic: bool = True,
    config: BackwardConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of one attention block from the final LSE.

    Args:
        query: [B, T, N, H] bfloat16 or float16.
        kv: packed [2, B, S, K, H], or flat [B, S, K, H + Hv] where the value's head size differs.
        key_start, key_end: int32 [B, T]; row t sees the keys start <= s < end; non-decreasing along T.
        lse: [B, T, N] float32, natural logarithm; -inf on rows that see nothing.
        delta: [B, T, N] float32, rowsum(dO . O) - dLSE.
        dout: [B, T, N, Hv], the query's dtype.
        scale: factor of the logits.
        logits_soft_cap: cap, for cap * tanh(logits / cap).
        deterministic: gradients repeat bit by bit. False allows the fused form, where the config asks for it and Refs
            lower: not inside a shard_map that checks varying axes, not before jax 0.11.
        config: tile sizes; None takes `default_config`.

    Returns:
        dq [B, T, N, H] and dkv like kv, both float32. Rows that see nothing get zeros.

    Raises:
        NotImplementedError: see `unsupported_reason`.
        ValueError: the config does not fit.
    """
    if (reason := unsupported_reason(query, kv)) is not None:
        raise NotImplementedError(reason)
    length, kv_length = query.shape[1], kv.shape[-3]
    query, lse, delta, dout = (_to_eight(x, 1) for x in (query, lse, delta, dout))
    key_start, key_end = (_to_eight(x, 1, mode="edge") for x in (key_start, key_end))
    kv = _to_eight(kv, kv.ndim - 3)
    B, T, N, H = query.shape
    S, K = kv.shape[-3:-1]
    Hv = packed.value_size(kv, H)
    config = config or default_config(H, Hv, deterministic=deterministic)
    config.check(H, Hv)
    dtype = jnp.dtype(query.dtype)
    # A padded row sees nothing.
    key_start = jnp.where(jnp.arange(T) < length, key_start, key_end) if T != length else key_start
    problem = Problem(B, T, S, N, K, H, Hv, kv.ndim == 4, dtype, float(scale), logits_soft_cap, config)
    rows = _prepare_rows(problem, key_start, key_end, lse, delta)
    operands = (query, kv.reshape(-1, S, K, kv.shape[-1]), dout.astype(dtype), *rows)
    table = _dkv_table(problem, key_start, key_end)
    if (
        config.fused
        and not deterministic
        and mosaic_backward_fused.unsupported_reason(query, H, Hv, config.block_q_dkv) is None
    ):
        dq, dkv = mosaic_backward_fused.fused(problem, *operands, table)
    else:
        dq = dq_kernel(problem, *operands, _dq_table(problem, key_start, key_end))
        dkv = dkv_kernel(problem, *operands, table)
    dkv = lax.slice_in_dim(dkv.reshape(kv.shape), 0, kv_length, axis=kv.ndim - 3)
    return lax.slice_in_dim(dq, 0, length, axis=1), dkv


# What is cheap and done once, in XLA.


def _to_eight(x, axis, mode="constant"):
    """TMA reads tiles of 8 rows: pads a length that does not divide (nothing is copied where it does)."""
    pad = -x.shape[axis] % 8
    return jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)], mode=mode) if pad else x


def _prepare_rows(problem, key_start, key_end, lse, delta):
    """Per-row values as TMA wants them: sequence last, padded to whole tiles.

    Returns stats [B, N, 2, T'] float32 (LSE in base 2, delta) and bounds [B, 2, T'] int32. A row without any key in the
    whole attention, and padding, gets LSE = +inf: its P = exp2(S - LSE) is 0 without a mask. The stats do not depend on
    the bounds, so that the hops of a ring share them.
    """
    # Otherwise XLA fuses the caller's reduction over heads into this transposition, which then takes a millisecond.
    lse, delta = lax.optimization_barrier((lse, delta))
    live = lse > -jnp.inf
    stats = jnp.stack([jnp.where(live, lse * LOG2E, jnp.inf), jnp.where(live, delta, 0.0)], axis=1)  # [B, 2, T, N]
    pad = -problem.T % 128
    stats = lax.pad(stats.transpose(0, 3, 1, 2), jnp.float32(jnp.inf), [(0, 0, 0)] * 3 + [(0, pad, 0)])
    stats = stats.at[:, :, 1, problem.T :].set(0.0) if pad else stats
    bounds = jnp.pad(jnp.stack([key_start, key_end], axis=1), [(0, 0), (0, 0), (0, pad)])
    return stats, bounds


def _row_tiles(problem, key_start, key_end, tile):
    """Extremes of the bounds over the rows of each query tile, five arrays [B, tiles].

    Min start and max end of the rows that see a key here, which is what a tile must visit; whether there is one; max
    start and min end of all rows, which no key tile lies between where some row sees nothing: that row needs the mask.
    """
    pad = [(0, 0), (0, -problem.T % tile)]
    rows = (problem.B, -1, tile)
    start, end = (jnp.pad(x, pad).reshape(rows) for x in (key_start, key_end))
    exists = jnp.pad(jnp.ones((1, problem.T), bool), pad).reshape(1, -1, tile)
    live = start < end
    none = problem.S
    return (
        jnp.min(jnp.where(live, start, none), axis=-1),
        jnp.max(jnp.where(live, end, 0), axis=-1),
        jnp.any(live, axis=-1),
        jnp.max(jnp.where(exists, start, 0), axis=-1),
        jnp.min(jnp.where(exists, end, none), axis=-1),
    )


def _dq_table(problem, key_start, key_end):
    """[B, query tiles, 4] int32: the KV tiles [first, last) that a query tile visits, and [u, v) that need no mask."""
    block = problem.config.block_kv_dq
    min_start, max_end, live, max_start, min_end = _row_tiles(problem, key_start, key_end, WGS * ROWS)
    last = jnp.where(live, pl.cdiv(max_end, block), 0)
    first = jnp.minimum(min_start // block, last)
    u = jnp.clip(pl.cdiv(max_start, block), first, last)
    v = jnp.clip(min_end // block, u, last)
    return jnp.stack([first, last, u, v], axis=-1).astype(jnp.int32)


def _dkv_table(problem, key_start, key_end):
    """[B, KV tiles, 4] int32: the query tiles [first, last) that a KV tile visits, and [u, v) that need no mask."""
    block = ROWS if splits_by_role(problem.H, problem.Hv) else WGS * ROWS
    extremes = _row_tiles(problem, key_start, key_end, problem.config.block_q_dkv)
    min_start, max_end, live, max_start, min_end = (x[:, None, :] for x in extremes)
    tiles = live.shape[-1]
    low = (jnp.arange(pl.cdiv(problem.S, block), dtype=jnp.int32) * block)[None, :, None]
    index = jnp.arange(tiles, dtype=jnp.int32)
    meets = live & (min_start < low + block) & (max_end > low)
    first = jnp.min(jnp.where(meets, index, tiles), axis=-1)
    last = jnp.max(jnp.where(meets, index + 1, 0), axis=-1)
    first = jnp.minimum(first, last)
    inside = (index >= first[..., None]) & (index < last[..., None])
    full = inside & (max_start <= low) & (min_end >= low + block)
    u = jnp.minimum(jnp.min(jnp.where(full, index, tiles), axis=-1), last)
    v = jnp.min(jnp.where(inside & ~full & (index >= u[..., None]), index, last[..., None]), axis=-1)
    return jnp.stack([first, last, u, jnp.maximum(u, v)], axis=-1).astype(jnp.int32)
