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
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax

from ring_jax._arrays import LOG2E, pad_to, round_up
from ring_jax._hardware import HOPPER
from ring_jax._vma import pcast_to, varying_axes
from ring_jax.flash.hopper import backward_fused
from ring_jax.flash.hopper.backward_common import (
    ROWS,
    WGS,
    BackwardConfig,
    Problem,
    default_config,
    keys_of_a_program,
)
from ring_jax.flash.hopper.backward_dkv import dkv as dkv_kernel
from ring_jax.flash.hopper.backward_dq import dq as dq_kernel
from ring_jax.flash.kv import HeadSlice, check_heads, fold_segments, value_size
from ring_jax.flash.operands import BlockOptions, Bounds, Gradients, RowGradients
from ring_jax.mosaic import compat, in_place

# Thread blocks that keep all multiprocessors evenly busy.
_PROGRAMS = 3 * HOPPER.multiprocessors
_HEAD_MULTIPLE = 64  # what TMA and wgmma take


def backward(
    query: jax.Array,
    kv: jax.Array,
    bounds: Bounds,
    rows: RowGradients,
    options: BlockOptions,
    *,
    dq: jax.Array | None = None,
    heads: HeadSlice | None = None,
    config: BackwardConfig | None = None,
) -> Gradients:
    """Gradients of one attention block from the final LSE; the contract of `flash.backends`.

    Args:
        query: [B, T, N, H] bfloat16 or float16, head sizes from 1 to 256 (padded to multiples of 64, which costs copies).
        kv: packed [2, B, S, K, H], or flat [B, S, K, H + Hv] where the value's head size differs.
        bounds: int32 [B, T]; row t sees the keys start <= s < end; non-decreasing along T. Or [P, B, T] of keys
            in P segments, which kv has as an axis before all others: a row sees an interval of each segment.
        rows: lse and delta float32 [B, T, N], dout [B, T, N, Hv].
        options: scale, soft cap, and whether gradients must repeat bit by bit. The fused form, which does not repeat, needs
            jax 0.11.
        dq: [B, T, N, H] float32 to add to, the sum over a ring's hops so far.
        heads: which KV heads `kv` holds, where those are not all: only the query heads that share them get gradients, dq
            of the others is 0 (or what it was).
        config: tile sizes; None takes `default_config`. A `fused` one is followed where the fused form can run
            (`backward_fused.unsupported_reason`) and deterministic is not True.

    Returns:
        dq [B, T, N, H] and dkv like kv, both float32. Rows that see nothing get zeros (or what they had in dq).

    Raises:
        ValueError: the config does not fit; heads that are not all there.
    """
    check_heads(kv, heads)
    # `plgpu.kernel` forgets over which manual mesh axes its outputs vary.
    axes = varying_axes(query, kv, bounds, rows, dq)
    shapes = query.shape, kv.shape, rows.dout.shape[-1]
    with jax.enable_x64(False):  # kernels compute indices in int32
        problem, operands, bounds, dq = _prepare(query, kv, bounds, rows, options, dq, heads, config)
        dq, dkv = _launch(problem, operands, bounds, dq, some_heads=heads is not None)
        dq, dkv = _cut(problem, dq, dkv, *shapes)
    return pcast_to((dq, dkv), axes)


class _Operands(NamedTuple):
    """Arrays as the kernels read them, beside their tables."""

    query: jax.Array
    kv: jax.Array
    dout: jax.Array
    stats: jax.Array
    bounds: jax.Array


def _prepare(
    query: jax.Array,
    kv: jax.Array,
    bounds: Bounds,
    rows: RowGradients,
    options: BlockOptions,
    dq: jax.Array | None,
    heads: HeadSlice | None,
    config: BackwardConfig | None,
) -> tuple[Problem, tuple[jax.Array, ...], Bounds, jax.Array | None]:
    """(what is static, the kernels' operands, bounds, dq): segments folded into the batch, sizes padded to what TMA and wgmma
    take."""
    kv, bounds, segments = fold_segments(kv, bounds)
    # For kernels, bounds and tables each segment is as many batch entries.
    start, end = (x.reshape(-1, query.shape[1]) for x in bounds)
    length, (H, Hv) = query.shape[1], (query.shape[-1], value_size(kv, query.shape[-1]))
    kv = _pad_kv(kv, H, Hv)
    H, Hv = round_up(H, _HEAD_MULTIPLE), round_up(Hv, _HEAD_MULTIPLE)
    T = round_up(length, 8)  # TMA reads tiles of 8 rows
    query, dout = pad_to(pad_to(query, -1, H), 1, T), pad_to(pad_to(rows.dout, -1, Hv), 1, T)
    lse, delta = pad_to(rows.lse, 1, T), pad_to(rows.delta, 1, T)
    start, end = pad_to(start, 1, T, "edge"), pad_to(end, 1, T, "edge")
    kv = pad_to(kv, -3, round_up(kv.shape[-3], 8))
    # A padded row sees nothing.
    start = jnp.where(jnp.arange(T) < length, start, end) if T != length else start
    config = config or default_config(H, Hv, deterministic=options.deterministic)
    config.check(H, Hv)
    (B, _, N, _), (S, K) = query.shape, kv.shape[-3:-1]
    first, total = heads or (0, K)
    group, dtype = N // total, jnp.dtype(query.dtype)
    problem = Problem(B, T, S, K * group, K, H, Hv, kv.ndim == 4, dtype, options, config, segments)
    fused = config.fused and not options.deterministic
    fused = fused and backward_fused.unsupported_reason(H, Hv, config.block_q_dkv) is None
    problem = dataclasses.replace(problem, fused=fused, split=_split(problem, fused), first_head=first * group)
    stats_and_bounds = _prepare_rows(problem, start, end, lse, delta)
    dq = None if dq is None else pad_to(pad_to(dq, -1, H), 1, T)
    operands = _Operands(query, kv.reshape(-1, S, K, kv.shape[-1]), dout.astype(dtype), *stats_and_bounds)
    return problem, operands, Bounds(start, end), dq


def _launch(
    problem: Problem, operands: _Operands, bounds: Bounds, dq: jax.Array | None, *, some_heads: bool
) -> Gradients:
    """(dq, dkv) of padded sizes. With `some_heads` dq also holds heads that are not worked on here."""
    table = _dkv_table(problem, *bounds)
    if dq is None and (problem.fused or some_heads):
        dq = jnp.zeros(operands.query.shape, jnp.float32)
    if problem.fused:
        dq, into = _zeros_to_share(problem, operands.kv, dq)
        return backward_fused.fused(problem, *operands, table, dq, into)
    table_dq = _dq_table(problem, *bounds)
    operands_dq = (*operands, table_dq if problem.segments == 1 else _dq_visits(problem, table_dq))
    if _adds_in_memory():
        dq = dq_kernel(problem, *operands_dq, dq)
    else:
        part = dq_kernel(problem, *operands_dq)
        if some_heads:  # of the others it is undefined
            assert dq is not None
            mine = slice(problem.first_head, problem.first_head + problem.N)
            dq = dq.at[:, :, mine].add(part[:, :, mine])
        else:
            dq = part if dq is None else dq + part
    dq, into = _zeros_to_share(problem, operands.kv, dq)
    return dq, dkv_kernel(problem, *operands, table, into)


def _cut(
    problem: Problem, dq: jax.Array, dkv: jax.Array, query_shape: tuple[int, ...], kv_shape: tuple[int, ...], Hv: int
) -> Gradients:
    """dq and dkv without padding, in the shapes that the caller knows."""
    H, S = query_shape[-1], kv_shape[-3]
    dkv = dkv[:, :S]
    if (H, Hv) != (problem.H, problem.Hv):
        if problem.flat:
            dkv = jnp.concatenate([dkv[..., :H], dkv[..., problem.H : problem.H + Hv]], axis=-1)
        else:
            dkv = dkv[..., :H]
    return dq[:, : query_shape[1], :, :H], dkv.reshape(kv_shape)


def _pad_kv(kv: jax.Array, H: int, Hv: int) -> jax.Array:
    """kv with head sizes that are multiples of 64."""
    if kv.ndim == 5:
        return pad_to(kv, -1, round_up(H, _HEAD_MULTIPLE))
    if H % _HEAD_MULTIPLE == 0 and Hv % _HEAD_MULTIPLE == 0:
        return kv
    return jnp.concatenate(
        [pad_to(x, -1, round_up(x.shape[-1], _HEAD_MULTIPLE)) for x in (kv[..., :H], kv[..., H:])], -1
    )


def _adds_in_memory() -> bool:
    """Refs came with jax 0.11, and TMA reductions have no interpreter."""
    return in_place.AVAILABLE and not compat.interpreting()


def _split(problem: Problem, fused: bool) -> int:
    """Among how many programs to split the query heads of a KV tile.

    One program that walks over all of them is long: short shards would leave multiprocessors without work, or wait for
    the longest. Sums of two addends on zeros repeat bit by bit, those of more do not.
    """
    if not _adds_in_memory():
        return 1
    tiles = pl.cdiv(problem.S, keys_of_a_program(problem.H, problem.Hv))
    programs = (
        problem.K * problem.B * tiles * max(1, problem.segments - 1)
    )  # of a ring's segments, a rank's own is empty
    possible = splits(problem.G, fused)
    return next((n for n in possible if programs * n >= _PROGRAMS), possible[-1])


def splits(group: int, fused: bool) -> list[int]:
    """Among how many programs the query heads of a group can be split."""
    return [n for n in range(1, group + 1) if group % n == 0 and (fused or n <= 2)]


def _zeros_to_share(problem: Problem, kv: jax.Array, dq: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """(dq, zeros for dkv where several programs add to one KV tile, else None).

    The zeros depend on dq on purpose: XLA would otherwise make one constant for all calls, and copy it before each.
    """
    if problem.split == 1:
        return dq, None
    dq, zero = lax.optimization_barrier((dq, jnp.float32(0)))
    return dq, jnp.broadcast_to(zero, kv.shape)


# What is cheap and done once, in XLA.


def _prepare_rows(
    problem: Problem, key_start: jax.Array, key_end: jax.Array, lse: jax.Array, delta: jax.Array
) -> Gradients:
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


def _edges(key_start: jax.Array, key_end: jax.Array, tile: int) -> tuple[jax.Array, ...]:
    """Bounds of the first and the last row of every tile of rows: four arrays [P B, tiles]. Bounds do not decrease along
    the rows, so these are the extremes of the tile, and a tile costs no reduction."""
    length = key_start.shape[1]
    pad = [(0, 0), (0, -length % tile)]
    start, end = (jnp.pad(x, pad, mode="edge") for x in (key_start, key_end))
    return start[:, ::tile], start[:, tile - 1 :: tile], end[:, ::tile], end[:, tile - 1 :: tile]


def _dq_table(problem: Problem, key_start: jax.Array, key_end: jax.Array) -> jax.Array:
    """[P B, query tiles, 4] int32: the KV tiles [first, last) that a query tile visits, and [u, v) that need no mask."""
    block = problem.config.block_kv_dq
    first_start, last_start, first_end, last_end = _edges(key_start, key_end, problem.config.warpgroups_dq * ROWS)
    first = first_start // block
    last = jnp.where(last_end > first_start, pl.cdiv(last_end, block), first)
    u = jnp.clip(pl.cdiv(last_start, block), first, last)
    v = jnp.clip(first_end // block, u, last)
    return jnp.stack([first, last, u, v], axis=-1).astype(jnp.int32)


def _dq_visits(problem: Problem, table: jax.Array) -> jax.Array:
    """[B, query tiles, 1 + P, 5] int32 of keys in segments: KV tiles and visits in all, then of each visit its row of the
    `_dq_table` and its segment. A query tile visits the segments of which it sees keys."""
    P = problem.segments
    table = table.reshape(P, problem.B, -1, 4)
    count = table[..., 1] - table[..., 0]
    segment = jnp.arange(P, dtype=jnp.int32)
    rows = jnp.concatenate([table, jnp.broadcast_to(segment[:, None, None, None], (*count.shape, 1))], axis=-1)
    visited = count > 0
    place = jnp.where(visited, jnp.cumsum(visited, axis=0, dtype=jnp.int32) - 1, P)
    here = place[None] == segment[:, None, None, None]  # [visit, segment, B, tiles]
    rows = jnp.sum(jnp.where(here[..., None], rows[None], 0), axis=1)
    totals = jnp.stack([jnp.sum(count, axis=0), jnp.sum(visited, axis=0, dtype=jnp.int32)], axis=-1)
    totals = jnp.pad(totals, [(0, 0), (0, 0), (0, 3)])
    return jnp.moveaxis(jnp.concatenate([totals[None], rows]), 0, 2)


def _dkv_table(problem: Problem, key_start: jax.Array, key_end: jax.Array) -> jax.Array:
    """[P B, KV tiles, 4] int32: four counts of query tiles for each KV tile, in one reduction.

    A query tile sees keys between its rows' bounds. Counted are those
    - whose last row ends at or before the KV tile's first key: the first query tile to visit;
    - whose first row starts before the KV tile's end: the query tile to stop at;
    - whose first row ends before the KV tile's end: the first to need no mask;
    - whose last row starts at or before the KV tile's first key: where masks are needed again.
    `backward_common.span_of` puts them in order.
    """
    block = keys_of_a_program(problem.H, problem.Hv)
    first_start, last_start, first_end, last_end = _edges(key_start, key_end, problem.config.block_q_dkv)
    edges = jnp.stack([last_end, first_start, first_end, last_start], axis=-1)
    low = np.arange(pl.cdiv(problem.S, block), dtype=np.int32) * block
    limits = np.stack([low + 1, low + block, low + block, low + 1], axis=-1)
    return jnp.sum(edges[:, None] < limits[None, :, None], axis=2, dtype=jnp.int32)
