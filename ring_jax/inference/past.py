"""A past whose keys lie in pages: what the engine hands to the model's pass."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ring_jax import _repr
from ring_jax.context.cached import attend_cached
from ring_jax.context.paged import Placement, decode_attention
from ring_jax.flash import flash_attention
from ring_jax.flash.paged import gather_pages
from ring_jax.gdn import GDNCache
from ring_jax.layout import Striped
from ring_jax.models.qwen3_5.past import gdn_specs
from ring_jax.models.qwen3_5.sharding import Sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedPast:
    """A `ring_jax.models.qwen3_5.past.Past`: position t of row r is slot t mod (C p) of page table[r, t // (C p)].

    Fields:
        pages: of all full-attention layers, sharded over the context axis along the slots.
        table: page ids, at least as many as hold the past. lengths: tokens of each row's past.
        gdn: states where the past ended.
        placement: of the pages over the context ranks.
    """

    pages: Float[Array, "L 2 P Cp K H"]
    table: Int[Array, "B n"]
    lengths: Int[Array, " B"]
    gdn: GDNCache
    placement: Placement = dataclasses.field(metadata={"static": True})
    __repr__ = _repr.of_fields

    def specs(self, sharding: Sharding) -> Any:
        """See `Past`."""
        row = P(sharding.batch)
        keys: Any = P(None, None, None, sharding.sequence, sharding.tensor)
        return PagedPast(keys, row, row, gdn_specs(sharding), self.placement)  # type: ignore[arg-type]

    def attend(
        self, query: Array, layer: Any, sharding: Sharding | None, implementation: str | None
    ) -> tuple[Array, Array]:
        """See `Past`. Pages are gathered: beside the chunk's own attention that is little. Which way they or the queries travel
        depends on the width of the table alone, so on the position."""
        kv = gather_pages(self.pages, self.table, layer)
        rank: Any = 0 if sharding is None else lax.axis_index(sharding.sequence)
        here = self.placement.local_length(self.lengths, rank)
        seen = jnp.arange(kv.shape[2], dtype=jnp.int32)[None] < here[:, None]
        kv = jnp.where(seen[None, ..., None, None], kv, jnp.zeros((), kv.dtype))  # what others left; 0 x NaN is NaN
        if sharding is None:
            end = jnp.broadcast_to(self.lengths[:, None], query.shape[:2])
            block: Any = implementation
            return flash_attention(query, kv[0], kv[1], jnp.zeros_like(end), end, implementation=block)
        layout = Striped(self.placement.page)
        options: Any = {"context": sharding.context, "layout": layout, "implementation": implementation}
        return attend_cached(query, kv[0], kv[1], self.lengths, **options)

    def decode(self, query: Array, key: Array, value: Array, layer: int, sharding: Sharding | None) -> Array:
        """See `Past`."""
        axis = None if sharding is None else sharding.sequence
        return decode_attention(
            query, key, value, self.pages, self.table, self.lengths, layer=layer, placement=self.placement, axis=axis
        )
