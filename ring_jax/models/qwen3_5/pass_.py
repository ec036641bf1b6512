"""One pass of the model over new tokens after a past: prefill (no past), a chunk, and a decode step are values of it.

Many tokens are laid out over the context ranks: full attention is two blocks resumed one after the other, the cached keys, which
have no causal edge, and the chunk itself. One token a row is the same on all context ranks: each attends to the keys that it has, and
partial results meet. GDN layers start where the past ended, under either.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from ring_jax import gdn
from ring_jax._checks import to_int32
from ring_jax._vma import pcast_to
from ring_jax.context import ring_attention
from ring_jax.flash.api import rounded_attention
from ring_jax.gdn import segments
from ring_jax.mask import Mask, ResolvedMask, causal, documents
from ring_jax.mask import lengths as lengths_mask
from ring_jax.models.qwen3_5.collectives import Collectives
from ring_jax.models.qwen3_5.config import LINEAR
from ring_jax.models.qwen3_5.past import Past
from ring_jax.models.qwen3_5.structure import Structure


@dataclasses.dataclass(frozen=True, eq=False)
class Pass(Collectives):
    """How the new tokens of a pass lie on one rank, and what they attend to.

    Fields:
        positions: int32 [T here] or [B, T here], for RoPE.
        order: int32 [T here], places among the new tokens.
        mask: what full attention sees of the new tokens, resolved once for all layers: without a mesh a pair of key bounds [B, T];
            None for one token a row, the same on all context ranks.
        segment_ids: int32 [B, T here] in layout order, negative for padding; None where every token is real.
        partition: how GDN layers split the tokens here, made once for all of them.
        past: what came before; None for nothing.
        implementation: of the flash block.
    """

    positions: jax.Array
    order: jax.Array
    mask: ResolvedMask | tuple[jax.Array, jax.Array] | None
    segment_ids: jax.Array | None
    partition: gdn.Partition
    past: Past | None
    implementation: str | None

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, layer: Any) -> jax.Array:
        """Attention of the new tokens here to the past and to each other, in the query's dtype."""
        if self.mask is None:
            assert self.past is not None
            return self.past.decode(query, key, value, layer, self.sharding)
        options: Any = {"implementation": self.implementation}
        if self.past is not None:
            options["carry"] = self.past.attend(query, layer, self.sharding, self.implementation)
        if self.sharding is None:
            assert isinstance(self.mask, tuple)
            out: Any = rounded_attention(query, key, value, *self.mask, **options)
        else:
            assert isinstance(self.mask, ResolvedMask)
            out = ring_attention(query, key, value, mask=self.mask, context=self.sharding.context, **options)
        return out.astype(query.dtype)

    @property
    def valid(self) -> jax.Array | None:
        """Which tokens here are real, bool [B, T here]; None where all are."""
        return None if self.segment_ids is None else self.segment_ids >= 0

    @property
    def same_tokens(self) -> bool:
        """Whether all context ranks have the same tokens."""
        return self.mask is None

    def token_axes(self, *, rows_only: bool = False) -> tuple[str, ...]:
        return super().token_axes(rows_only=rows_only or self.same_tokens)


def lay_out(
    model: Structure,
    tokens: jax.Array,
    lengths: jax.Array | None,
    segment_ids: jax.Array | None,
    past: Past | None,
    seq_len: int,
) -> tuple[jax.Array, Pass]:
    """The tokens in the order of the layout, and all that depends on it: once for all layers.

    Args:
        tokens: [B, S / C], contiguous. lengths: int32 [B] real tokens of each row, or None. segment_ids: [B, S] or None.
        seq_len: S without the layout's padding.
    """
    sharding, (batch, length) = model.sharding, tokens.shape
    mask: Mask = causal()
    if lengths is not None:
        mask &= lengths_mask(lengths, lengths)
    if segment_ids is not None:
        mask &= documents(segment_ids=segment_ids)
    if sharding is None:
        order = jnp.arange(length, dtype=jnp.int32)
        start, end = mask.interval(order, q_len=length, kv_len=length)
        resolved: Any = tuple(jnp.broadcast_to(x, tokens.shape) for x in (start, end))
        padded = False
    else:
        context = sharding.context
        tokens = context.to_layout(tokens)
        shard = context.shard(length * context.ranks())
        order, resolved, padded = shard.positions(), context.resolve(mask, seq_len), shard.length != seq_len
        start = resolved.start
    positions, ids = order, None
    if segment_ids is not None:
        ids = to_int32(jnp.take(segment_ids, order, axis=1))
        positions = jnp.maximum(order[None] - start, 0)  # each document begins at 0
    elif lengths is not None or padded:
        limit = jnp.full((batch, 1), seq_len, jnp.int32) if lengths is None else lengths[:, None]
        ids = jnp.where(order[None] < limit, 0, segments.PADDING)
    if past is not None:
        positions = past.lengths[:, None] + order[None]
    split = _partition(model, tokens, ids)
    return tokens, Pass(sharding, positions, order, resolved, ids, split, past, model.implementation)


def same_tokens(model: Structure, tokens: jax.Array, lengths: jax.Array | None, past: Past) -> Pass:
    """A pass over one token a row [B, 1], which all context ranks have."""
    ids = None if lengths is None else jnp.where(lengths[:, None] > 0, 0, segments.PADDING)
    order, split = jnp.zeros(1, jnp.int32), gdn.OneDevice(ids)
    return Pass(model.sharding, past.lengths[:, None], order, None, ids, split, past, model.implementation)


def _partition(model: Structure, x: jax.Array, ids: jax.Array | None) -> gdn.Partition:
    """How GDN layers split the tokens of x [B, T here, ...]."""
    config, sharding = model.config, model.sharding
    if sharding is None:
        return gdn.partition(None, x, segment_ids=ids)
    kinds = config.layer_types[: config.period]
    runs = [len(list(run)) for kind, run in itertools.groupby(kinds) if kind == LINEAR]
    heads = config.linear.share(Collectives(sharding).tensor_ranks)
    itemsize = jnp.dtype(model.dtype).itemsize
    shape = gdn.GDNShape(0, 0, heads, config.hidden_size, config.conv_width, max(runs, default=1), itemsize)
    return gdn.partition(sharding.context, x, strategy=sharding.gdn_strategy, shape=shape, segment_ids=ids)


def embed(model: Structure, params: Any, here: Pass, tokens: jax.Array) -> jax.Array:
    """[B, T here, D], NaN for ids that the vocabulary does not have: a gather clips, and such an id would look like a trained one."""
    if here.valid is not None:  # padding may hold any id
        tokens = jnp.where(here.valid, tokens, jnp.zeros_like(tokens))
    x = here.rows(params["embed"], tokens, model.config.hidden_size).astype(model.dtype)
    known = (tokens >= 0) & (tokens < model.config.vocab_size)
    x, known = pcast_to((x, known), here.token_axes())
    return jnp.where(known[..., None], x, jnp.nan)
