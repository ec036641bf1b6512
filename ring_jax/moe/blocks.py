"""Assignments of tokens to experts, sorted by expert and cut into blocks of rows that share one expert.

A token with k experts is k assignments, numbered token * k + choice. Sorted by expert, the assignments of one expert
are a run; every run is cut into blocks of `size` rows, the last one padded. The number of blocks depends on the
routing, but never exceeds `capacity`, so tables of that length hold any skew.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Rows of a block: from 8, below which a product is bound by reading the weights, to 128, where it is bound by
# arithmetic; to 512 where experts have many rows, since a block also costs copies of weights and gradients.
_SMALLEST, _USUAL, _LARGEST = 8, 128, 512


class Chunk(NamedTuple):
    """Some consecutive blocks. Padding rows have an assignment and a token beyond the last, no two of them alike."""

    experts: jax.Array  # int32 [c]
    assignments: jax.Array  # int32 [c, size]
    tokens: jax.Array  # int32 [c, size]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of all assignments to the experts here.

    Args:
        order: int32 [A + size], assignments sorted by expert, those to no expert here last, then padding.
        experts, first, rows: int32 [capacity], expert, first place in `order` and number of rows of each block.
        count: int32 [], number of blocks that have rows; they come first.
        size: rows of a block. per_token: k.
    """

    order: jax.Array
    experts: jax.Array
    first: jax.Array
    rows: jax.Array
    count: jax.Array
    size: int = dataclasses.field(metadata={"static": True})
    per_token: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, experts: jax.Array, count: int, size: int, multiple: int = 1) -> "Blocks":
        """From int32 [T, k] experts, 0 ... count - 1 here, anything else elsewhere; capacity is rounded up to `multiple`."""
        tokens, per_token = experts.shape
        flat = experts.reshape(-1)
        here = (flat >= 0) & (flat < count)
        key = jnp.where(here, flat, jnp.full_like(flat, count))
        key, order = lax.sort((key, jnp.arange(flat.size, dtype=jnp.int32)), num_keys=1, is_stable=True)
        ends = _position(key, jnp.arange(count, dtype=jnp.int32))
        starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
        last_block = jnp.cumsum(-(-(ends - starts) // size), dtype=jnp.int32)
        length = -(-capacity(tokens, per_token, count, size) // multiple) * multiple
        block = jnp.arange(length, dtype=jnp.int32)
        expert = jnp.minimum(_position(last_block, block), count - 1)
        before = jnp.concatenate([jnp.zeros_like(last_block[:1]), last_block[:-1]])
        first = jnp.minimum(starts[expert] + (block - before[expert]) * size, ends[expert])
        rows = jnp.minimum(ends[expert] - first, size)
        order = jnp.pad(order, (0, size))
        return cls(order, expert, first, rows, last_block[-1], size, per_token)

    def chunk(self, index: jax.Array, length: int, tokens: int) -> Chunk:
        """Blocks index * length ... of tokens 0 ... `tokens` - 1."""
        experts, first, rows = (
            lax.dynamic_slice_in_dim(x, index * length, length) for x in (self.experts, self.first, self.rows)
        )
        row = jnp.arange(self.size, dtype=jnp.int32)[None, :]
        assignments = self.order.at[first[:, None] + row].get(mode="promise_in_bounds")
        real = row < rows[:, None]
        return Chunk(
            experts,
            jnp.where(real, assignments, tokens * self.per_token + row),
            jnp.where(real, assignments // self.per_token, tokens + row),
        )


def block_size(tokens: int, per_token: int, experts: int) -> int:
    """Rows of a block: about the mean number of tokens of an expert, or a quarter of it where that is much.

    Args:
        tokens: that the assignments come from. A token goes to an expert at most once, so no block needs more.
        per_token: k. experts: those that all the assignments spread over (not only the ones here).
    """
    mean = max(-(-tokens * per_token // experts), 1)
    up = 1 << (mean - 1).bit_length()
    size = min(max(up, _SMALLEST), max(_USUAL, min(up // 4, _LARGEST)))
    return min(max(tokens, 1), size)


def capacity(tokens: int, per_token: int, experts: int, size: int) -> int:
    """The most blocks that any routing of `tokens` tokens to `experts` experts can need."""
    assignments = tokens * min(per_token, experts)
    touched = min(experts, assignments)
    return touched + (assignments - touched) // size


def _position(ascending: jax.Array, values: jax.Array) -> jax.Array:
    """How many of `ascending` are <= each of `values`."""
    return jnp.searchsorted(ascending, values, side="right", method="scan_unrolled").astype(jnp.int32)
