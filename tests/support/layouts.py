"""Layouts that several tests walk over."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import ring_jax

LAYOUTS = {
    "contiguous": ring_jax.Contiguous(),
    "zigzag": ring_jax.Zigzag(),
    "striped": ring_jax.Striped(),
    "zigzag 4": ring_jax.Zigzag(4),
}


@dataclasses.dataclass(frozen=True)
class Backwards:
    """A layout as a user would bring it, with the methods of `ring_jax.Layout` and no others: rank r holds shard C-1-r."""

    def padded_length(self, seq_len, ranks):
        return -(-seq_len // (2 * ranks)) * 2 * ranks

    def block_size(self, length, ranks):
        assert length % ranks == 0
        return max(length // ranks, 1)

    def position(self, index, rank, length, ranks):
        return (ranks - 1 - rank) * (length // ranks) + index

    def rank_of(self, position, length, ranks):
        return ranks - 1 - position // self.block_size(length, ranks)

    def count_below(self, g, rank, length, ranks):
        here = g - self.position(0, rank, length, ranks)
        return (jnp if isinstance(here, jax.Array) else np).clip(here, 0, length // ranks)

    def positions(self, rank, length, ranks):
        return self.position(np.arange(length // ranks, dtype=np.int32), rank, length, ranks)

    def coarsen(self, factor):
        return self

    def restore(self, x, axis, ranks):
        axis %= x.ndim
        cut = x.reshape(*x.shape[:axis], ranks, x.shape[axis] // ranks, *x.shape[axis + 1 :])
        return cut[(slice(None),) * axis + (slice(None, None, -1),)].reshape(x.shape)

    scatter = restore
