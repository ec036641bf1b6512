"""Ulysses: one all-to-all from sequence shards to head shards, attention over whole sequences, and back.

Over two mesh axes, (ring, ulysses): the all-to-all runs over the inner axis, and the ring over the
outer one, whose shards are the coarser form of the same layout. Three all-to-alls forward (query, KV,
out), three backward, and one all-gather of the int32 bounds.

Source: Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509; Fang and Zhao, USP, arXiv 2405.07719.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax._mesh import Axis
from ring_jax.context.ring import ring
from ring_jax.context.shard import Shard, axis_to_seq, seq_to_axis
from ring_jax.flash.block import Block, attention_block
from ring_jax.flash.kv import seq_axis
from ring_jax.flash.operands import Bounds, Partial


def ulysses(
    block: Block, shard: Shard, query: jax.Array, kv: jax.Array, bounds: Bounds, carry: Partial | None
) -> Partial:
    """(out in `Block.out_dtype`, float32 lse) of the local queries; bounds are of global key positions."""
    return _ulysses(block, shard, None, query, kv, bounds, carry)


def ring_ulysses(
    block: Block, shard: Shard, query: jax.Array, kv: jax.Array, bounds: Bounds, carry: Partial | None
) -> Partial:
    """Ulysses over the inner of two mesh axes, ring over the outer."""
    assert isinstance(shard.axis, tuple)
    outer, inner = shard.axis
    outer_ranks = lax.axis_size(outer)
    inner_ranks = shard.ranks // outer_ranks
    ring_shard = Shard(outer, outer_ranks, shard.layout.coarsen(inner_ranks), shard.length)
    return _ulysses(block, Shard(inner, inner_ranks, shard.layout, 0), ring_shard, query, kv, bounds, carry)


def _ulysses(
    block: Block,
    heads: Shard,
    ring_shard: Shard | None,
    query: jax.Array,
    kv: jax.Array,
    bounds: Bounds,
    carry: Partial | None,
) -> Partial:
    check_heads(heads.axis, heads.ranks, query.shape[2], kv.shape[-2])
    to_heads = lambda x: seq_to_axis(x, heads, 2)  # noqa: E731
    to_seq = lambda x: axis_to_seq(x, heads, 2)  # noqa: E731
    # Bounds are per query of the whole sequence now: int32, so gathering them is small.
    gathered = lax.all_gather(jnp.stack(bounds), heads.axis, axis=2, tiled=True)
    bounds = Bounds(*heads.layout.restore(gathered, 2, heads.ranks))
    kv = seq_to_axis(kv, heads, kv.ndim - 2, seq_axis(kv))
    carry = None if carry is None else (to_heads(carry[0]), to_heads(carry[1]))
    attend = attention_block if ring_shard is None else ring
    out, lse = attend(block, ring_shard, to_heads(query), kv, bounds, carry)
    return to_seq(out.astype(block.out_dtype(query))), to_seq(lse)


def check_heads(axis: Axis, ranks: int, query_heads: int, kv_heads: int) -> None:
    """Raises ValueError where heads cannot be split over the ranks."""
    if query_heads % ranks or kv_heads % ranks:
        raise ValueError(
            f"strategy 'ulysses' splits heads over mesh axis {axis!r} of size {ranks}, which does not divide {query_heads} query heads "
            f"and {kv_heads} key-value heads. Use strategy='ring', or two axes with 'ring_ulysses' and a smaller inner one."
        )
