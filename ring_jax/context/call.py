"""One call of `ring_attention`: what is static in it, and what one rank does."""

import dataclasses

import jax
import jax.numpy as jnp

from ring_jax._vma import pcast_to, varying_axes
from ring_jax.context.shard import Shard
from ring_jax.context.strategies import STRATEGIES, StrategyName, choose
from ring_jax.flash.backends import FixedMask, Implementation
from ring_jax.flash.kv import pack
from ring_jax.flash.merge import partial_dtype
from ring_jax.flash.operands import BlockOptions, Bounds, Partial
from ring_jax.mask import MaskAndOffset, ResolvedMask


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of one call. Hashable, so that eager calls hit jit's cache.

    Attributes:
        queries, keys: where both sequences lie.
        q_len, kv_len: their real lengths.
        strategy: a name, or "auto". implementation: a name, or None for the best that runs.
        options: of the block.
        fixed_mask: "full" or "causal" where the whole call's mask is known to be that, over sequences without padding.
        returns_partial: whether out stays float32 (float64), to be resumed or merged.
    """

    queries: Shard
    keys: Shard
    q_len: int
    kv_len: int
    strategy: StrategyName
    implementation: Implementation | None
    options: BlockOptions
    fixed_mask: FixedMask | None
    returns_partial: bool

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: ResolvedMask | MaskAndOffset,
        sinks: jax.Array | None,
        carry: Partial | None,
    ) -> Partial:
        """On local shards, inside a shard_map that is manual over the context axis.

        mask is a `ResolvedMask`, or a `Mask` with the queries' offset; sinks float [N] or None.
        """
        B, T, N, _ = query.shape
        kv = pack(key, value)
        bounds = self._bounds(mask, B, T)
        # Replicated inputs become varying before the custom VJP: their psum is the transpose of this cast.
        axes = varying_axes(query, kv, bounds, sinks, carry, self.queries.rank())
        query, kv, bounds, sinks, carry = pcast_to((query, kv, bounds, sinks, carry), axes)
        dtype = partial_dtype(query.dtype)
        if sinks is not None:  # where a softmax starts that has seen the sinks, which have no value
            lse = jnp.broadcast_to(sinks.astype(dtype), (B, T, N))
            carry = pcast_to(jnp.zeros((B, T, N, value.shape[-1]), dtype), axes), lse
        if 0 in (B, T, N, key.shape[1]):
            nothing = jnp.zeros((B, T, N, value.shape[-1]), dtype), jnp.full((B, T, N), -jnp.inf, dtype)
            out, lse = carry or pcast_to(nothing, axes)
            return out if self.returns_partial else out.astype(query.dtype), lse
        choice = choose(self.strategy, self.implementation, self.keys, query, kv, self.options, self.fixed_mask)
        block = dataclasses.replace(choice.block, float_out=self.returns_partial)
        return STRATEGIES[choice.strategy](block, self.keys, query, kv, bounds, carry)

    def _bounds(self, mask: ResolvedMask | MaskAndOffset, B: int, T: int) -> Bounds:
        """Global key bounds of the local queries, [B, T] each."""
        if isinstance(mask, ResolvedMask):
            bounds = Bounds(mask.start, mask.end)
            if bounds.start.shape[1] != T or bounds.start.shape[0] not in (1, B):
                raise ValueError(
                    f"the resolved mask has local shape {bounds.start.shape}, the queries are [{B}, {T}]: resolve it with this "
                    "seq_len and batch"
                )
        else:
            bounds = self.queries.bounds(mask[0], self.q_len, self.kv_len, mask[1])
        return Bounds(*(jnp.broadcast_to(x, (B, T)) for x in bounds))
