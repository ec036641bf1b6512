"""What came before the tokens of a pass: cached keys, GDN states, and how far each row is."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int

from ring_jax import _repr
from ring_jax._checks import check_instance
from ring_jax.context.cached import attend_cached, count_here
from ring_jax.context.decode import merge_ranks
from ring_jax.flash import flash_attention
from ring_jax.flash.few import attend_parts
from ring_jax.gdn import GDNCache
from ring_jax.layout import Layout
from ring_jax.models.qwen3_5.sharding import Sharding

Partial = tuple[Float32[Array, "B T N H"], Float32[Array, "B T N"]]


class Past(Protocol):
    """What a pass asks of what came before; a pytree, whose arrays are this rank's parts inside the model's shard_map.

    `layer` counts full-attention layers: a Python int in decode, traced in a scan over groups of layers.
    """

    @property
    def gdn(self) -> GDNCache:
        """States and convolution tails where the past ended, the same on all context ranks: leading axes are the G groups of
        layers, then the GDN layers of a group."""
        ...

    @property
    def lengths(self) -> Int[Array, " B"]:
        """Tokens of each row's past, and so the position of its next one."""
        ...

    def specs(self, sharding: Sharding) -> Any:
        """A PartitionSpec for every array of the past, in its own tree."""
        ...

    def attend(self, query: Array, layer: Any, sharding: Sharding | None, implementation: str | None) -> Partial:
        """Float32 (out, lse) of the queries of a chunk, each rank's own, over all cached keys of one layer."""
        ...

    def decode(self, query: Array, key: Array, value: Array, layer: int, sharding: Sharding | None) -> Array:
        """Attention of one new token a row, the same on all context ranks, to all cached keys and itself: [B, 1, N, H]."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """Keys and values of all full-attention layers, of tokens that one pass computed, where it computed them.

    Fields:
        kv: the keys of layer n are entry 2n of the first axis, its values 2n + 1; M = 2 x layers.
        counts: how many of the S places each row fills, from the first on.
        layout: of S over the context ranks.
    """

    kv: Float[Array, "M B S K H"]
    counts: Int[Array, " B"]
    layout: Layout = dataclasses.field(metadata={"static": True})
    __repr__ = _repr.of_fields

    def read(self, layer: Any) -> tuple[Array, Array]:
        """(keys, values) of one layer, [B, S here, K, H] each."""
        if isinstance(layer, int):  # a slice along the first axis, which products read where it lies
            return self.kv[2 * layer], self.kv[2 * layer + 1]
        pair = lax.dynamic_slice_in_dim(self.kv, 2 * layer, 2)
        return pair[0], pair[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunks:
    """A past whose keys lie in one array for each pass: nothing moves between passes, whatever the cuts and the rows' lengths.

    What a pass leaves (`Output.new`) is one of a single chunk; `then` puts it behind those before.

    Fields:
        chunks: in the order of the text. gdn, lengths: as in `Past`.

    Example:
        >>> from ring_jax.data import passkey
        >>> from ring_jax.models.qwen3_5 import Qwen3_5
        >>> model = Qwen3_5.from_pretrained(passkey.MODEL)
        >>> first = model(jnp.asarray([[72, 101, 108]]), return_new=True).new
        >>> out = model(jnp.asarray([[108, 111]]), past=first, return_new=True)
        >>> first.then(out.new).lengths.tolist()
        [5]
    """

    chunks: tuple[Chunk, ...]
    gdn: GDNCache
    lengths: Int[Array, " B"]
    __repr__ = _repr.of_fields

    def then(self, new: Chunks) -> Chunks:
        """This past with what a pass after it left."""
        check_instance("new", new, Chunks, "what a pass left, as model(..., return_new=True).new")
        return Chunks((*self.chunks, *new.chunks), new.gdn, new.lengths)

    def specs(self, sharding: Sharding) -> Any:
        """See `Past`."""
        row: Any = P(sharding.batch)
        keys: Any = P(None, sharding.batch, sharding.sequence, sharding.tensor)
        chunks: Any = tuple(dataclasses.replace(c, kv=keys, counts=row) for c in self.chunks)
        return Chunks(chunks, gdn_specs(sharding), row)

    def attend(self, query: Array, layer: Any, sharding: Sharding | None, implementation: str | None) -> Partial:
        """See `Past`."""
        partial: Any = None
        for chunk in self.chunks:
            key, value = chunk.read(layer)
            options: Any = {"carry": partial, "implementation": implementation}
            if sharding is None:
                end = jnp.broadcast_to(chunk.counts[:, None], query.shape[:2])
                partial = flash_attention(query, key, value, jnp.zeros_like(end), end, **options)
            else:
                options |= {"context": sharding.context, "layout": chunk.layout}
                partial = attend_cached(query, key, value, chunk.counts, **options)
        return partial

    def decode(self, query: Array, key: Array, value: Array, layer: int, sharding: Sharding | None) -> Array:
        """See `Past`. The first rank counts the token's own key, so that it sees itself once."""
        context = None if sharding is None else sharding.context
        parts = []
        for chunk in self.chunks:
            counts = chunk.counts
            if context is not None:
                counts = count_here(counts, chunk.kv.shape[2], context, chunk.layout)
            parts.append((*chunk.read(layer), counts))
        own = True if context is None else lax.axis_index(context.axis) == 0
        itself = jnp.broadcast_to(jnp.asarray(own, jnp.int32), self.lengths.shape)
        out, lse = attend_parts(query, [*parts, (key, value, itself)])
        if context is not None:
            out, _ = merge_ranks(out, lse, context.axis)
        return out.astype(query.dtype)


def gdn_specs(sharding: Sharding) -> Any:
    """PartitionSpecs of the GDN states of all layers: the same on all context ranks."""
    batch, tensor = sharding.batch, sharding.tensor
    return GDNCache(P(None, None, batch, tensor), P(None, None, batch, None, tensor), P(None, None, batch))  # type: ignore[arg-type]
