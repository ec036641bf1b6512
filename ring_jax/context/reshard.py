"""Layouts are mesh resharding: moving a sequence between layouts, as few collectives as it takes.

    contiguous <-> two-chunk zigzag    two permutes of half a shard each
    contiguous <-> any other layout    one all-to-all, padded to the largest exchange between two ranks
    other pairs                        through contiguous

Written as manual collectives inside shard_map; sharding constraints alone made XLA add gathers.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ring_jax._mesh import Axis
from ring_jax.layout import Contiguous, Index, Layout, Zigzag


def relayout(x: jax.Array, source: Layout, target: Layout, axis_name: Axis, ranks: int, seq_axis: int) -> jax.Array:
    """Local shard of a sequence in layout `source` to the local shard in layout `target`. Bit-exact."""
    if source == target or ranks == 1:
        return x
    if source != Contiguous() and target != Contiguous():
        x = relayout(x, source, Contiguous(), axis_name, ranks, seq_axis)
        return relayout(x, Contiguous(), target, axis_name, ranks, seq_axis)
    other = target if source == Contiguous() else source
    move = _half_shards if other == Zigzag() else _exchange
    return move(x, other, axis_name, ranks, seq_axis, source == Contiguous())


def _half_shards(
    x: jax.Array, zigzag: Layout, axis_name: Axis, ranks: int, seq_axis: int, to_zigzag: bool
) -> jax.Array:
    """Contiguous rank r holds chunks 2r, 2r+1; zigzag rank r holds r and 2C-1-r. Each rank holds one even and one
    odd chunk in either layout, so the even chunks make one permutation and the odd chunks another."""
    size = x.shape[seq_axis] // 2
    first, second = (lax.slice_in_dim(x, i * size, (i + 1) * size, axis=seq_axis) for i in range(2))
    owner = [int(zigzag.rank_of(chunk, 2 * ranks, ranks)) for chunk in range(2 * ranks)]
    routes = [[(r, owner[2 * r + parity]) for r in range(ranks)] for parity in range(2)]
    even_first = lax.axis_index(axis_name) % 2 == 0
    if to_zigzag:
        even, odd = (lax.ppermute(half, axis_name, route) for half, route in zip((first, second), routes, strict=True))
        halves = jnp.where(even_first, even, odd), jnp.where(even_first, odd, even)
    else:
        even, odd = jnp.where(even_first, first, second), jnp.where(even_first, second, first)
        back = [[(dst, src) for src, dst in route] for route in routes]
        halves = tuple(lax.ppermute(half, axis_name, route) for half, route in zip((even, odd), back, strict=True))
    return jnp.concatenate(halves, axis=seq_axis)


def _exchange(
    x: jax.Array, other: Layout, axis_name: Axis, ranks: int, seq_axis: int, from_contiguous: bool
) -> jax.Array:
    """Contiguous rank r and rank s of `other` share the positions other.local[low:high) of s, with low, high =
    count_below(r L), count_below((r+1) L): ascending on both sides, so no indices need to travel."""
    x = jnp.moveaxis(x, seq_axis, 0)
    local = x.shape[0]
    length = local * ranks
    borders = np.stack([other.count_below(r * local, np.arange(ranks), length, ranks) for r in range(ranks + 1)])
    width = int(np.max(borders[1:] - borders[:-1]))  # the most that two ranks exchange
    slot = jnp.arange(width, dtype=jnp.int32)[None, :]

    def shared(contiguous_rank: Index, other_rank: Index) -> tuple[jax.Array, ...]:
        """Local indices of the shared positions on either side; `local` (out of range) where there are fewer."""
        low, high = (other.count_below((contiguous_rank + i) * local, other_rank, length, ranks) for i in range(2))
        in_other = low + slot
        in_contiguous = other.position(in_other, other_rank, length, ranks) - contiguous_rank * local
        return tuple(jnp.where(in_other < high, index, local) for index in (in_contiguous, in_other))

    rank, peer = lax.axis_index(axis_name), jnp.arange(ranks, dtype=jnp.int32)[:, None]
    if from_contiguous:
        send, receive = shared(rank, peer)[0], shared(peer, rank)[1]
    else:
        send, receive = shared(peer, rank)[1], shared(rank, peer)[0]
    packets = jnp.take(x, send, axis=0, mode="fill", fill_value=0)
    packets = lax.all_to_all(packets, axis_name, 0, 0, tiled=True)
    x = jnp.zeros_like(x).at[receive].set(packets, mode="drop")
    return jnp.moveaxis(x, 0, seq_axis)
