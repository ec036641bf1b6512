"""What prefill leaves for decode: keys and values, GDN states, and how far each row is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ring_jax import _html, _repr
from ring_jax.gdn import GDNCache
from ring_jax.layout import Layout, Striped
from ring_jax.models.qwen3_5.past import Chunk, Chunks, gdn_specs
from ring_jax.models.qwen3_5.sharding import Sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The state of a batch of texts. Keys lie where prefill computed them; nothing moves between prefill and decode.

    Keys and values of all full-attention layers are one array, along whose first axis, M = 2 x layers, those of layer n are
    2n and 2n + 1: XLA lets a product read a slice of an argument where it lies if it is cut along the first axis only.

    Fields:
        prompt_kv: keys and values of the prompt, in the order of the context's layout and sharded like it.
        new_kv: those of decoded tokens; the one at position lengths + j lies on context rank j mod C, slot j // C.
        gdn: states and convolution tails, the same on all context ranks; leading axes: G groups of layers, then the GDN
            layers of a group.
        lengths: tokens of each row's prompt. count: tokens decoded since.
    """

    prompt_kv: Float[Array, "M B S K H"]
    new_kv: Float[Array, "M B R K H"]
    gdn: GDNCache
    lengths: Int[Array, " B"]
    count: Int[Array, ""]
    __repr__, _repr_html_ = _repr.of_fields, _html.of_arrays

    @property
    def room(self) -> int:
        """How many tokens can be decoded in all."""
        return self.new_kv.shape[2]

    @property
    def prompt(self) -> Float[Array, "G L 2 B S K H"]:
        """Keys and values of the prompt by group, full-attention layer of the group, and kind."""
        return self.prompt_kv.reshape(self.gdn.state.shape[0], -1, 2, *self.prompt_kv.shape[1:])

    def past(self, layout: Layout) -> Chunks:
        """The cache as the past of a pass, whose prompt lies in `layout`."""
        counts = jnp.broadcast_to(self.count, self.lengths.shape)
        chunks = Chunk(self.prompt_kv, self.lengths, layout), Chunk(self.new_kv, counts, Striped())
        return Chunks(chunks, self.gdn, self.positions)

    @property
    def positions(self) -> jax.Array:
        """Position of each row's next token, int32 [B]."""
        return self.lengths + self.count


def cache_specs(sharding: Sharding) -> Any:
    """PartitionSpecs of a `Cache`."""
    keys, row = P(None, sharding.batch, sharding.sequence, sharding.tensor), P(sharding.batch)
    return Cache(keys, keys, gdn_specs(sharding), row, P())  # type: ignore[arg-type]


def append(cache: Cache, kv: Float[Array, "M B 1 K H"], rank: Any, ranks: int) -> Array:
    """`cache.new_kv` one token later; on this rank's shards."""
    slot = cache.count // ranks
    at = tuple(slot if axis == 2 else jnp.zeros_like(slot) for axis in range(5))  # Python zeros may be wider
    here = (cache.count % ranks == rank) & (slot < cache.new_kv.shape[2])  # beyond the room nothing is overwritten
    old = jax.lax.dynamic_slice(cache.new_kv, at, kv.shape)
    return jax.lax.dynamic_update_slice(cache.new_kv, jnp.where(here, kv, old), at)


def put(stacked: Array, at: tuple[int, int], value: Array) -> Array:
    """`stacked` [G, L, ...] with the value of layer `at` replaced: in place where the array is not read again."""
    return jax.lax.dynamic_update_slice(stacked, value[None, None].astype(stacked.dtype), (*at, *(0,) * value.ndim))
