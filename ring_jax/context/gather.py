"""All-gather attention: every rank gathers all of KV at once and attends in two calls.

    start gathering KV;  the rank's own keys, which need no transfer;  resume on those of all other ranks, in rank order

On a balanced layout that is balanced work without hops. Costs O(S) memory for KV on every rank. One all-gather forward;
backward one again (KV is not kept) and one reduce-scatter of float32 dKV, which hides behind the gradients of the rank's own
keys. Where half of the heads is enough work for a block (`Backend.can_split_heads`) the own keys come at both ends, so that the
gather hides, too; and where shards are so short that it outlasts a rank's own keys, halves of the heads are gathered one after
the other: the second travels while the first is worked on.

Source: Llama 3, arXiv 2407.21783, section 3.3.2.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax import _hardware
from ring_jax.context.shard import Shard
from ring_jax.flash.block import Block, differentiable
from ring_jax.flash.kv import HeadSlice, halve_heads, seq_axis
from ring_jax.flash.operands import Bounds, Gradients, Partial, RowGradients

T = TypeVar("T")
Slices = list[tuple[HeadSlice | None, jax.Array]]  # of kv by heads; None: all of them


def _others(shard: Shard, bounds: Bounds) -> Bounds:
    """Bounds on the keys of every rank, [C, B, T] each; those on the rank's own are empty."""
    sources = jnp.arange(shard.ranks, dtype=bounds.start.dtype)[:, None, None]
    bounds = shard.local_bounds(Bounds(*(x[None] for x in bounds)), sources)
    return Bounds(*(jnp.where(sources == shard.rank(), 0, x) for x in bounds))


def _in_one_call(block: Block, shard: Shard) -> bool:
    """A backend that knows the mask to be full reads no bounds, and minds neither order nor segments."""
    return shard.ranks == 1 or block.backend.fixed_mask == "full"


def _gathers_in_halves(block: Block, shard: Shard, query: jax.Array, kv: jax.Array) -> bool:
    """Whether to gather halves of the heads, one after the other: where all of them take longer than attention to the rank's
    own keys (of which a causal mask leaves half)."""
    B, T, N, _ = query.shape
    S, K, width = kv.shape[-3:]
    elements = (2 if kv.ndim == 5 else 1) * width  # of one key and its value
    gathered_bytes = (shard.ranks - 1) * B * S * K * elements * kv.dtype.itemsize
    own_flops = 2 * B * T * S * N * elements / 2
    gpu = _hardware.HOPPER
    slow = gathered_bytes / gpu.gather_bytes_per_s > own_flops / gpu.attention_rate(query.shape[-1])
    return slow and block.backend.can_split_heads(query, kv)


def _slices(in_halves: bool, kv: jax.Array) -> Slices:
    return halve_heads(kv) if in_halves else [(None, kv)]


def _gather(shard: Shard, slices: Slices, own: Callable[[], T]) -> tuple[list[jax.Array], T]:
    """(what the ranks have of each slice, own()): the first slice travels beside own(), the others start after it."""
    gathered, result = [shard.gather(slices[0][1])], own()
    for _, kv in slices[1:]:
        # Or XLA would join the two gathers, or begin neither behind own().
        kv, gathered, result = lax.optimization_barrier((kv, gathered, result))
        gathered.append(shard.gather(kv))
    return gathered, result


def _forward(
    block: Block, shard: Shard, query: jax.Array, kv: jax.Array, bounds: Bounds, carry: Partial | None
) -> Partial:
    forward, options = block.backend.forward, block.options
    own = shard.local_bounds(bounds, shard.rank())
    if _in_one_call(block, shard):
        return forward(query, shard.gather(kv, seq_axis(kv)), own, carry, options, out_dtype=block.out_dtype(query))
    slices = _slices(_gathers_in_halves(block, shard, query, kv), kv)
    gathered, carry = _gather(shard, slices, lambda: forward(query, kv, own, carry, options))
    others = _others(shard, bounds)
    result: Partial | None = None
    for (heads, _), kv in zip(slices, gathered, strict=True):
        result = forward(query, kv, others, carry, options, out_dtype=block.out_dtype(query), heads=heads, into=result)
    assert result is not None
    return result


def _gradients(
    block: Block, shard: Shard, query: jax.Array, kv: jax.Array, bounds: Bounds, rows: RowGradients
) -> Gradients:
    """dq and dkv, float32. The rank's own keys come at both ends if they can be halved, else last: to sum what belongs to the
    others takes twice as long as to gather their keys."""
    backward, options = block.backend.backward, block.options
    own = shard.local_bounds(bounds, shard.rank())
    if _in_one_call(block, shard):
        dq, dkv = backward(query, shard.gather(kv, seq_axis(kv)), own, rows, options)
        return dq, shard.sum_scatter(dkv, seq_axis(kv))
    others = _others(shard, bounds)
    *early, late = _slices(block.backend.can_split_heads(query, kv), kv)

    def own_keys(dq: jax.Array | None, slices: Slices) -> tuple[Any, list[jax.Array]]:
        found = []
        for heads, kv in slices:
            dq, dkv = backward(query, kv, own, rows, options, dq=dq, heads=heads)
            found.append(dkv)
        return dq, found

    slices = _slices(_gathers_in_halves(block, shard, query, kv), kv)
    gathered, (dq, dkv_early) = _gather(shard, slices, lambda: own_keys(None, early))
    home: list[jax.Array] = []
    for (heads, _), kv in zip(slices, gathered, strict=True):
        dq, dkv = backward(query, kv, others, rows, options, dq=dq, heads=heads)
        if home:  # see `_gather`
            dkv, home = lax.optimization_barrier((dkv, home))
        home.append(shard.sum_scatter(dkv))
    dq, dkv_late = own_keys(dq, [late])
    return dq, jnp.concatenate(home, axis=-2) + jnp.concatenate(dkv_early + dkv_late, axis=-2)


# (out in `Block.out_dtype`, float32 lse) of the local queries; bounds are of global key positions.
all_gather = differentiable(_forward, _gradients, tie="kv")
