"""Flash-attention backward on Hopper in Pallas Mosaic GPU: two kernels of seven matrix products, bitwise repeatable.

The faster form of one kernel and five products is in `backward_fused`.

    S = scale Q K^T (soft-capped),  P = exp(S - LSE),  dV = P^T dO,  dP = dO V^T,  dS = P (dP - delta),
    dQ = scale dS K,  dK = scale dS^T Q

Algorithm: FlashAttention-2 (arXiv 2307.08691), section 3.1.2, with the warp specialisation of FlashAttention-3
(arXiv 2407.08608). LSE is the final one of the whole attention, perhaps over several KV blocks, and
delta = rowsum(dO . O) - dLSE (the paper's D). The plain form is `flash.reference.backward`.

- `dkv`: a program owns one KV tile of one KV head and walks over the query tiles of every query head of the group, so
  dK and dV stay in registers and GQA needs no additions in memory; where programs are few, two share a tile and its heads
  and add to zeros. It works on transposed tiles S^T [keys, queries]: P^T and dS^T then are left operands in registers.
- `dq`: a program owns one query tile of one query head and walks over the KV tiles.

One warpgroup feeds shared memory by TMA, two compute. Where dK and dV do not fit one warpgroup's registers (H + Hv >
256) the compute warpgroups of `dkv` split by role instead of by rows: one makes P and dV, the other dS and dK.

Tiles outside the interval of keys that their rows see are never visited; only tiles on its edge are masked.
"""

import dataclasses
import math

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax

from ring_jax.flash import packed
from ring_jax.flash.hopper import backward_fused
from ring_jax.flash.hopper.backward_common import (
    LOG2E,
    ROWS,
    WGS,
    BackwardConfig,
    Problem,
    default_config,
    keys_of_a_program,
)
from ring_jax.flash.hopper.backward_dkv import dkv as dkv_kernel
from ring_jax.flash.hopper.backward_dq import dq as dq_kernel
from ring_jax.mosaic import compat, in_place

# Thread blocks that keep the 132 multiprocessors of an H200 evenly busy, and that come near to giving each one.
_PROGRAMS, _ONE_EACH = 3 * 132, 128


def unsupported_reason(query, kv, *, heads=None, **_) -> str | None:
    """Why `backward` cannot run on these shapes and dtypes, or None. Says nothing of the device."""
    if query.dtype not in (jnp.bfloat16, jnp.float16) or kv.dtype != query.dtype:
        return (
            f"the Hopper backward takes bfloat16 or float16 query and KV of one dtype, got {query.dtype} and {kv.dtype}"
        )
    H = query.shape[-1]
    Hv = packed.value_size(kv, H)
    if H % 64 or Hv % 64 or not (64 <= H <= 256 and 64 <= Hv <= 256):
        return f"the Hopper backward takes head sizes 64, 128, 192 and 256, got {H} and {Hv}: pad them with zeros"
    if query.shape[2] % (kv_heads := heads.total if heads else kv.shape[-2]):
        return f"{query.shape[2]} query heads cannot share {kv_heads} KV heads"
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
    dq: jax.Array | None = None,
    *,
    scale: float,
    logits_soft_cap: float | None = None,
    deterministic: bool | None = None,
    heads: packed.Heads | None = None,
    config: BackwardConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of one attention block from the final LSE.

    Args:
        query: [B, T, N, H] bfloat16 or float16.
        kv: packed [2, B, S, K, H], or flat [B, S, K, H + Hv] where the value's head size differs.
        key_start, key_end: int32 [B, T]; row t sees the keys start <= s < end; non-decreasing along T. Or [P, B, T] of keys
            in P parts, which kv has as an axis before all others: a row sees an interval of each part.
        lse: [B, T, N] float32, natural logarithm; -inf on rows that see nothing.
        delta: [B, T, N] float32, rowsum(dO . O) - dLSE.
        dout: [B, T, N, Hv], the query's dtype.
        dq: [B, T, N, H] float32 to add to, the sum over a ring's hops so far.
        scale: factor of the logits.
        logits_soft_cap: cap, for cap * tanh(logits / cap).
        deterministic: True for gradients that repeat bit by bit, False for the fastest, None for those that repeat
            unless that costs more than 10%. The fused form, which does not repeat, needs jax 0.11.
        heads: which KV heads `kv` holds, where those are not all: only the query heads that share them get gradients, dq
            of the others is 0 (or what it was).
        config: tile sizes; None takes `default_config`. A `fused` one is followed where the fused form can run
            (`backward_fused.unsupported_reason`) and deterministic is not True.

    Returns:
        dq [B, T, N, H] and dkv like kv, both float32. Rows that see nothing get zeros (or what they had in dq).

    Raises:
        NotImplementedError: see `unsupported_reason`.
        ValueError: the config does not fit; heads that are not all there.
    """
    packed.check_heads(kv, heads)
    kv_shape = kv.shape
    kv, bounds, parts = packed.fold_parts(kv, (key_start, key_end))
    # For kernels, bounds and tables each part is as many batch entries.
    key_start, key_end = (x.reshape(-1, query.shape[1]) for x in bounds)
    if (reason := unsupported_reason(query, kv, heads=heads)) is not None:
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
    first, total = heads or (0, K)
    group = N // total
    problem = Problem(B, T, S, K * group, K, H, Hv, kv.ndim == 4, dtype, float(scale), logits_soft_cap, config, parts)
    fused = config.fused and not deterministic and backward_fused.unsupported_reason(H, Hv, config.block_q_dkv) is None
    problem = dataclasses.replace(problem, split=_split(problem, fused), first_head=first * group)
    rows = _prepare_rows(problem, key_start, key_end, lse, delta)
    operands = (query, kv.reshape(-1, S, K, kv.shape[-1]), dout.astype(dtype), *rows)
    table = _dkv_table(problem, key_start, key_end)
    if dq is not None:
        dq = _to_eight(dq, 1)
    elif fused or heads is not None:
        dq = jnp.zeros(query.shape, jnp.float32)
    if fused:
        dq, into = _zeros_to_share(problem, operands[1], dq)
        dq, dkv = backward_fused.fused(problem, *operands, table, dq, into)
    else:
        table_dq = _dq_table(problem, key_start, key_end)
        operands_dq = (*operands, table_dq if parts == 1 else _dq_visits(problem, table_dq))
        if _adds_in_memory():
            dq = dq_kernel(problem, *operands_dq, dq)
        else:
            part = dq_kernel(problem, *operands_dq)
            if heads is None:
                dq = part if dq is None else dq + part
            else:  # of the others it is undefined
                mine = slice(problem.first_head, problem.first_head + problem.N)
                dq = dq.at[:, :, mine].add(part[:, :, mine])  # type: ignore[union-attr]
        dq, into = _zeros_to_share(problem, operands[1], dq)
        dkv = dkv_kernel(problem, *operands, table, into)
    dkv = lax.slice_in_dim(dkv.reshape(kv.shape), 0, kv_length, axis=kv.ndim - 3)
    return lax.slice_in_dim(dq, 0, length, axis=1), dkv.reshape(kv_shape)


def halves_suffice(query, kv) -> bool:
    """Whether half of the KV heads of one block are programs enough for the multiprocessors."""
    batch, _, heads, H = query.shape
    kv_len, kv_heads = kv.shape[-3:-1]
    tiles = pl.cdiv(kv_len, keys_of_a_program(H, packed.value_size(kv, H)))
    return batch * (kv_heads // 2) * _splits(heads // kv_heads, fused=False)[-1] * tiles >= _ONE_EACH


def _adds_in_memory() -> bool:
    """Refs came with jax 0.11, and TMA reductions have no interpreter."""
    return in_place.AVAILABLE and not compat.interpreting()


def _split(problem, fused: bool) -> int:
    """Among how many programs to split the query heads of a KV tile.

    One program that walks over all of them is long: short shards would leave multiprocessors without work, or wait for
    the longest. Sums of two addends on zeros repeat bit by bit, those of more do not.
    """
    if not _adds_in_memory():
        return 1
    tiles = pl.cdiv(problem.S, keys_of_a_program(problem.H, problem.Hv))
    programs = problem.K * problem.B * tiles * max(1, problem.parts - 1)  # of a ring's parts, a rank's own is empty
    splits = _splits(problem.G, fused)
    return next((n for n in splits if programs * n >= _PROGRAMS), splits[-1])


def _splits(group: int, fused: bool) -> list[int]:
    return [n for n in range(1, group + 1) if group % n == 0 and (fused or n <= 2)]


def _zeros_to_share(problem, kv, dq):
    """(dq, what programs that share a KV tile add to, or None). The zeros come after dq, which differs from call to call: zeros
    that calls have in common would be made once and copied for each."""
    if problem.split == 1:
        return dq, None
    dq, zero = lax.optimization_barrier((dq, jnp.float32(0)))
    return dq, jnp.broadcast_to(zero, kv.shape)


# What is cheap and done once, in XLA.


def _to_eight(x, axis, mode="constant"):
    """TMA reads tiles of 8 rows: pads a length that does not divide (nothing is copied where it does)."""
    pad = -x.shape[axis] % 8
    return jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)], mode=mode) if pad else x


def _prepare_rows(problem, key_start, key_end, lse, delta):
    """Per-row values as TMA wants them: sequence last, padded to whole tiles.

    Returns stats [B, N, 2, T'] float32 (LSE in base 2, delta) and bounds [P B, 2, T'] int32. A row without any key in the
    whole attention, and padding, gets LSE = +inf: its P = exp2(S - LSE) is 0 without a mask. The stats do not depend on
    the bounds, so that the hops of a ring share them.
    """
    # Otherwise XLA fuses the caller's reduction over heads into this transposition, which then takes a millisecond.
    lse, delta = lax.optimization_barrier((lse, delta))
    live = lse != -jnp.inf  # so that a NaN stays one
    stats = jnp.stack([jnp.where(live, lse * LOG2E, jnp.inf), jnp.where(live, delta, 0.0)], axis=1)  # [B, 2, T, N]
    pad = -problem.T % math.lcm(WGS * ROWS, problem.config.warpgroups_dq * ROWS)  # both kernels read whole tiles
    stats = lax.pad(stats.transpose(0, 3, 1, 2), jnp.float32(jnp.inf), [(0, 0, 0)] * 3 + [(0, pad, 0)])
    stats = stats.at[:, :, 1, problem.T :].set(0.0) if pad else stats
    bounds = jnp.pad(jnp.stack([key_start, key_end], axis=1), [(0, 0), (0, 0), (0, pad)])
    return stats, bounds


def _edges(key_start, key_end, tile):
    """Bounds of the first and the last row of every tile of rows: four arrays [P B, tiles]. Bounds do not decrease along
    the rows, so these are the extremes of the tile, and a tile costs no reduction."""
    length = key_start.shape[1]
    pad = [(0, 0), (0, -length % tile)]
    start, end = (jnp.pad(x, pad, mode="edge") for x in (key_start, key_end))
    return start[:, ::tile], start[:, tile - 1 :: tile], end[:, ::tile], end[:, tile - 1 :: tile]


def _dq_table(problem, key_start, key_end):
    """[P B, query tiles, 4] int32: the KV tiles [first, last) that a query tile visits, and [u, v) that need no mask."""
    block = problem.config.block_kv_dq
    first_start, last_start, first_end, last_end = _edges(key_start, key_end, problem.config.warpgroups_dq * ROWS)
    first = first_start // block
    last = jnp.where(last_end > first_start, pl.cdiv(last_end, block), first)
    u = jnp.clip(pl.cdiv(last_start, block), first, last)
    v = jnp.clip(first_end // block, u, last)
    return jnp.stack([first, last, u, v], axis=-1).astype(jnp.int32)


def _dq_visits(problem, table):
    """[B, query tiles, 1 + P, 5] int32 of keys in parts: KV tiles and visits in all, then of each visit its row of the
    `_dq_table` and its part. A query tile visits the parts of which it sees keys."""
    P = problem.parts
    table = table.reshape(P, problem.B, -1, 4)
    count = table[..., 1] - table[..., 0]
    part = jnp.arange(P, dtype=jnp.int32)
    rows = jnp.concatenate([table, jnp.broadcast_to(part[:, None, None, None], (*count.shape, 1))], axis=-1)
    visited = count > 0
    place = jnp.where(visited, jnp.cumsum(visited, axis=0, dtype=jnp.int32) - 1, P)
    here = place == part[:, None, None, None]  # [visit, part, B, tiles]
    rows = jnp.sum(jnp.where(here[..., None], rows, 0), axis=1)
    totals = jnp.stack([jnp.sum(count, axis=0), jnp.sum(visited, axis=0, dtype=jnp.int32)], axis=-1)
    totals = jnp.pad(totals, [(0, 0), (0, 0), (0, 3)])
    return jnp.moveaxis(jnp.concatenate([totals[None], rows]), 0, 2)


def _dkv_table(problem, key_start, key_end):
    """[P B, KV tiles, 4] int32, of the query tiles: how many end before a KV tile, start before its end, do not reach its
    end, start before it. `backward_common.span_of` makes of them what the kernel visits. One reduction in all."""
    block = keys_of_a_program(problem.H, problem.Hv)
    first_start, last_start, first_end, last_end = _edges(key_start, key_end, problem.config.block_q_dkv)
    edges = jnp.stack([last_end, first_start, first_end, last_start], axis=-1)
    low = np.arange(pl.cdiv(problem.S, block), dtype=np.int32) * block
    limits = np.stack([low + 1, low + block, low + block, low + 1], axis=-1)
    return jnp.sum(edges[:, None] < limits[None, :, None], axis=2, dtype=jnp.int32)
