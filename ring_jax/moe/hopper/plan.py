"""The rows of a grouped product: assignments sorted by expert, and the tiles that they are cut into.

A token with k experts is k assignments, numbered token * k + choice. The table of tiles is made on the device; its length
holds any routing (`blocks.capacity`), and the kernels walk over as many tiles as the routing needs.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ring_jax.moe.blocks import capacity


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Tiles of the assignments to the experts here.

    Args:
        order: int32 [A], the assignment of each row; those to no expert here come last.
        tokens: int32 [A], the token of each row.
        groups: int32 [E, 2], first row of each expert and the row after its last.
        tiles: int32 [capacity, 4], expert, first row and number of rows of each tile (and a zero).
        count: int32 [1], number of tiles; they come first.
        rows: the most that a tile has.
    """

    order: jax.Array
    tokens: jax.Array
    groups: jax.Array
    tiles: jax.Array
    count: jax.Array
    rows: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, experts: jax.Array, count: int, rows: int) -> "Plan":
        """From int32 [T, k] experts: 0 ... count - 1 are here, anything else is elsewhere."""
        tokens, per_token = experts.shape
        flat = experts.reshape(-1)
        here = (flat >= 0) & (flat < count)
        expert, order = _sorted(jnp.where(here, flat, jnp.full_like(flat, count)), count)
        ends = jnp.searchsorted(expert, jnp.arange(count, dtype=jnp.int32), side="right", method="scan_unrolled")
        ends = ends.astype(jnp.int32)
        starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
        last = jnp.cumsum(-(-(ends - starts) // rows), dtype=jnp.int32)
        tile = jnp.arange(capacity(tokens, per_token, count, rows), dtype=jnp.int32)
        owner = jnp.searchsorted(last, tile, side="right", method="scan_unrolled").astype(jnp.int32)
        owner = jnp.minimum(owner, count - 1)
        before = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])
        first = jnp.minimum(starts[owner] + (tile - before[owner]) * rows, ends[owner])
        tiles = jnp.stack([owner, first, jnp.minimum(ends[owner] - first, rows), jnp.zeros_like(first)], axis=1)
        groups = jnp.stack([starts, ends], axis=1)
        # A token that names an expert twice (as after NaN) must not lead the kernels beyond the table.
        return cls(order, order // per_token, groups, tiles, jnp.minimum(last[-1:], tile.size), rows)

    @classmethod
    def of_rows(cls, count: int, rows: int) -> "Plan":
        """Of so many rows of one expert, in order: constants."""
        first = np.arange(0, count, rows, dtype=np.int32)
        tiles = np.stack([np.zeros_like(first), first, np.minimum(count - first, rows), np.zeros_like(first)], axis=1)
        order, groups, tiles, number = (
            jnp.asarray(np.asarray(a, np.int32)) for a in (np.arange(count), [[0, count]], tiles, [len(tiles)])
        )
        return cls(order, order, groups, tiles, number, rows)

    @classmethod
    def of_one_token(cls, experts: jax.Array, count: int, rows: int) -> "Plan":
        """The same for int32 [1, k] distinct experts, for products by rows only: a tile each, and nothing to sort."""
        flat = experts.reshape(-1)
        here = (flat >= 0) & (flat < count)
        # Constants, which cost no kernel.
        place = np.arange(flat.size, dtype=np.int32)
        order, tokens, none = (jnp.asarray(a) for a in (place, np.zeros_like(place), np.zeros((count, 2), np.int32)))
        tiles = jnp.stack([jnp.clip(flat, 0, count - 1), order, here.astype(jnp.int32), tokens], axis=1)
        return cls(order, tokens, none, tiles, jnp.asarray(np.array([flat.size], np.int32)), rows)


def _sorted(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Ascending keys 0 ... count, and where each comes from; equal keys keep their order."""
    index = jnp.arange(key.size, dtype=jnp.int32)
    bits = max(key.size - 1, 1).bit_length()
    if bits + count.bit_length() > 32:
        return lax.sort((key, index), num_keys=1, is_stable=True)
    # Both in one word: sorting words alone is several times faster than pairs, and no two are equal.
    packed = lax.sort((key.astype(jnp.uint32) << bits) | index.astype(jnp.uint32), is_stable=False)
    return (packed >> bits).astype(jnp.int32), (packed & ((1 << bits) - 1)).astype(jnp.int32)
