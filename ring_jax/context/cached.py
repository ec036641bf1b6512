"""Attention of new tokens to keys that came before all of them: no causal edge, so these keys may lie in any layout.

A chunk of a prompt attends to what is cached here, and resumes from the partial on its own keys:

    partial = attend_cached(query, old_key, old_value, lengths, context=cp, layout=of_the_old_keys)
    out = ring_attention(query, key, value, is_causal=True, context=cp, carry=partial)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ring_jax.context.call import Call
from ring_jax.context.parallel import ContextParallel
from ring_jax.context.shard import Shard
from ring_jax.flash.backends import Implementation
from ring_jax.flash.operands import BlockOptions
from ring_jax.layout import Layout
from ring_jax.mask import ResolvedMask


def attend_cached(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    lengths: Int[Array, " B"],
    *,
    context: ContextParallel,
    layout: Layout,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    carry: tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """(out, lse), float32, of a rank's queries over the first `lengths` cached keys of each row; inside a shard_map.

    Keys or queries travel, whichever is fewer bytes, unless `context.strategy` names `ring`, `pass_q` or `all_gather`.

    Args:
        query: [B, T, N, H], this rank's queries of a chunk, in any order.
        key, value: this rank's shards of a sequence of C S positions in `layout`; beyond `lengths` anything finite.
        lengths: int [B], how many of the sequence's first positions each row holds.
        carry: a partial over other keys, to resume from.
    """
    batch, time = query.shape[:2]
    ranks = context.ranks()
    keys = Shard(context.axis, ranks, layout, _whole(key.shape[1], ranks, layout))
    queries = Shard(context.axis, ranks, context.layout, time * ranks)
    strategy = context.strategy if context.strategy in ("ring", "pass_q", "all_gather") else "auto"
    options = BlockOptions.of_call(query.shape[-1], scale, logits_soft_cap, None)
    end = jnp.broadcast_to(lengths.astype(jnp.int32)[:, None], (batch, time))
    seen = ResolvedMask(jnp.zeros_like(end), end, layout, queries.length, keys.length)
    call = Call(queries, keys, queries.length, keys.length, strategy, implementation, options, None, True)
    return call(query, key, value, seen, None, carry)


def count_here(lengths: Int[Array, " B"], local: int, context: ContextParallel, layout: Layout) -> jax.Array:
    """How many of each row's first `lengths` keys lie on this rank, which has `local` places: int32 [B]; inside a shard_map."""
    ranks = context.ranks()
    rank = jax.lax.axis_index(context.axis)
    return layout.count_below(lengths.astype(jnp.int32), rank, _whole(local, ranks, layout), ranks)


def _whole(local: int, ranks: int, layout: Layout) -> int:
    """The length of a sequence with `local` places a rank; a striped one, whose formulas do not read it, may have room for less
    than `to_layout` pads to."""
    return layout.padded_length(local * ranks, ranks)
