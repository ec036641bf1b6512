"""Which query tile a thread block works on next, and which key tiles that one visits in which order."""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from ring_jax.flash.mosaic_config import ForwardConfig


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and options, all static."""

    batch: int
    query_len: int
    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    packed: bool  # kv is [2 B, S, K, H]; else [B, S, K, H + Hv]
    carry: bool
    scale: float
    logits_soft_cap: float | None
    heads_per_section: int
    config: ForwardConfig

    @property
    def query_tiles(self) -> int:
        return pl.cdiv(self.query_len, self.config.block_q)

    @property
    def items(self) -> int:
        return self.batch * self.heads * self.query_tiles

    @property
    def blocks(self) -> int:
        return min(self.config.multiprocessors, self.items) if self.config.persistent else self.items


def work_item(problem: Problem, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(batch, head, first query row) of a work item: sections of heads whose KV fits L2, in each the last rows first.

    Under causal masks the last rows have the most work, and long work must not start late.
    """
    section, inside = jnp.divmod(index, problem.heads_per_section * problem.query_tiles)
    tile, head = jnp.divmod(inside, problem.heads_per_section)
    batch, head = jnp.divmod(section * problem.heads_per_section + head, problem.heads)
    row = (problem.query_tiles - 1 - tile) * problem.config.block_q
    # The last tile slides back into bounds. It recomputes rows of its neighbour, to the same bits.
    return batch, head, jnp.minimum(row, problem.query_len - problem.config.block_q)


@dataclasses.dataclass(frozen=True)
class Steps:
    """The key tiles of one query tile, in the order in which they are visited: masked ones first."""

    total: jax.Array
    masked: jax.Array
    left: jax.Array  # masked tiles at the left edge
    first_tile: jax.Array
    first_unmasked: jax.Array
    first_right: jax.Array

    def tile(self, step: jax.Array | int) -> jax.Array:
        right = self.first_right + step - self.left
        unmasked = self.first_unmasked + step - self.masked
        return jnp.where(step < self.left, self.first_tile + step, jnp.where(step < self.masked, right, unmasked))


def steps_of(problem: Problem, start_ref: Any, end_ref: Any, batch: jax.Array, row: jax.Array) -> Steps:
    block = problem.config.block_kv
    last_row = row + problem.config.block_q - 1
    low, low_max = start_ref[batch, row], start_ref[batch, last_row]
    high_min, high = end_ref[batch, row], end_ref[batch, last_row]
    first = lax.div(low, block)
    last = jnp.where(high > low, pl.cdiv(high, block), first)
    first_unmasked = jnp.clip(pl.cdiv(low_max, block), first, last)
    first_right = jnp.clip(lax.div(high_min, block), first_unmasked, last)
    left = first_unmasked - first
    return Steps(last - first, left + last - first_right, left, first, first_unmasked, first_right)
