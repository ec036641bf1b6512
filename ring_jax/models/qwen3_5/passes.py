"""One pass of the model, inside the shard_map (or without a mesh): over prompts, or a decoded token.

Tokens are laid out once, a scan walks the groups of layers (in decode a loop), and what the layers leave becomes the cache.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ring_jax import _repr, gdn
from ring_jax._checks import to_int32
from ring_jax._mesh import axis_names
from ring_jax._vma import pcast_to
from ring_jax.gdn import segments
from ring_jax.mask import Mask, causal, documents
from ring_jax.mask import lengths as lengths_mask
from ring_jax.models.qwen3_5.cache import Cache, append, put
from ring_jax.models.qwen3_5.config import FULL, LINEAR
from ring_jax.models.qwen3_5.layers import norm
from ring_jax.models.qwen3_5.local import Local, Prompt, Step
from ring_jax.moe import RouterStats

if TYPE_CHECKING:
    from ring_jax.models.qwen3_5.modeling import Qwen3_5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a call returns.

    Fields:
        logits: float32, [B, S, V] of all positions, [B, V] of each row's last one, or None.
        cache: to decode from, if it was asked for.
        hidden: [layers, B, S, D], what each layer hands on (before the final norm), if it was asked for.
        stats: of the routers, summed over tokens and layers, if it was asked for.
    """

    logits: Float[Array, "B S V"] | Float[Array, "B V"] | None
    cache: Cache | None = None
    hidden: Float[Array, "layers B S D"] | None = None
    stats: RouterStats | None = None
    __repr__ = _repr.of_fields


@dataclasses.dataclass(frozen=True)
class Ask:
    """What a pass over prompts is asked for; static."""

    logits: str
    cache_room: int | None
    hidden: bool
    stats: bool
    seq_len: int
    chunk: int = 0


def forward(params, tokens, lengths, segment_ids, labels, graph, ask: Ask) -> Output:
    """A pass over the prompts whose tokens are here, contiguous [B, S / C]; results in natural order again."""
    del labels
    model = nnx.merge(graph, nnx.State(params))
    here, x, left = encode(model, tokens, lengths, segment_ids, ask)
    logits = cache = hidden = None
    if ask.logits == "all":
        logits = _logits(model, here, _natural(x, here))
    elif ask.logits == "last":
        last = jnp.full(tokens.shape[:1], ask.seq_len - 1, jnp.int32) if lengths is None else lengths - 1
        at_last = here.order[None] == last[:, None]
        x = jnp.sum(jnp.where(at_last[..., None], x, jnp.zeros_like(x)), axis=1)
        logits = here.whole_vocabulary(_logits(model, here, here.sum_context(x)))
    if ask.cache_room is not None:
        ranks = 1 if model.sharding is None else model.sharding.context.ranks()
        prompt = left.keys.reshape(-1, *left.keys.shape[3:])
        new = jnp.zeros((*prompt.shape[:2], -(-ask.cache_room // ranks), *prompt.shape[3:]), prompt.dtype)
        lengths = jnp.full(tokens.shape[0], ask.seq_len, jnp.int32) if lengths is None else to_int32(lengths)
        (lengths,) = pcast_to((lengths,), here.token_axes(rows_only=True))
        new = pcast_to(new, here.token_axes() + axis_names(here.tensor))
        cache = Cache(prompt, new, left.states, lengths, jnp.zeros((), jnp.int32))
    if ask.hidden:
        hidden = _natural(left.hidden, here, seq_axis=2)
    return Output(logits, cache, hidden, left.stats)


def decode(params, tokens, cache: Cache, graph):
    """One token for each row, on this rank's shards of the cache: logits, and what of the cache is new. The prompt's keys
    are not handed through: that would copy them at every step.

    A plain loop over the layers, where `_walk` scans: each product then reads its own slice of the stacked weights where it
    lies, while a scan copies every weight before its product; with one token there is nothing else to do but read weights.
    XLA lets a product read a slice of a parameter only, so layers read the new tokens' keys as they came in, and the token's
    own are written at the end. States are written layer by layer, each in place where the cache is donated.
    """
    model = nnx.merge(graph, nnx.State(params))
    sharding, shard, rank, ranks = model.sharding, None, 0, 1
    if sharding is not None:
        ranks = sharding.context.ranks()
        shard = sharding.context.shard(cache.prompt_kv.shape[2] * ranks)
        rank = shard.rank()
    here = Step(sharding, cache.positions[:, None], shard, cache.lengths, cache.count)
    x = _embed(model, here, tokens[:, None])
    own: list[Array] = []
    states = cache.gdn
    graph, groups = nnx.split(model.groups)
    stacked = nnx.to_pure_dict(groups)
    for g in range(model.config.groups):
        layers = nnx.merge(graph, nnx.State(jax.tree.map(lambda w, g=g: w[g], stacked))).layers
        n = 0
        for layer in layers:
            if layer.kind == FULL:
                held = cache.prompt_kv[len(own)], cache.prompt_kv[len(own) + 1]
                later = cache.new_kv[len(own)], cache.new_kv[len(own) + 1]
                x, kv, _ = layer(x, (held, later), here, None, None)
                own += kv
                continue
            at = g, n
            x, left, _ = layer(x, jax.tree.map(lambda c, at=at: c[at], states), here, gdn.OneDevice(), None)
            state, tail = put(states.state, at, left.state), put(states.tail, at, left.tail)
            states, n = dataclasses.replace(states, state=state, tail=tail), n + 1
    # The barrier keeps the write behind the last layer's reading: it would have to go to a copy otherwise.
    x, kv = jax.lax.optimization_barrier((x, jnp.stack(own)))
    new = append(cache, kv, rank, ranks)
    return here.whole_vocabulary(_logits(model, here, x[:, 0])), new, states


def encode(model: Qwen3_5, tokens, lengths, segment_ids, ask: Ask):
    """(how the tokens lie, the last layer's output [B, T here, D] in layout order, what the layers leave)."""
    tokens, here = _lay_out(model, tokens, lengths, segment_ids, ask)
    if here.valid is not None:  # padding may hold any id
        tokens = jnp.where(here.valid, tokens, jnp.zeros_like(tokens))
    x, left = _walk(model, _embed(model, here, tokens), here, hidden=ask.hidden, stats=ask.stats)
    return here, x, left


def _lay_out(model: Qwen3_5, tokens, lengths, segment_ids, ask: Ask):
    """The tokens in the order of the layout, and all that depends on it: once for all layers."""
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
        order, resolved, padded = shard.positions(), context.resolve(mask, ask.seq_len), shard.length != ask.seq_len
        start = resolved.start
    positions, ids = order, None
    if segment_ids is not None:
        ids = to_int32(jnp.take(segment_ids, order, axis=1))
        positions = jnp.maximum(order[None] - start, 0)  # each document begins at 0
    elif lengths is not None or padded:
        limit = jnp.full((batch, 1), ask.seq_len, jnp.int32) if lengths is None else lengths[:, None]
        ids = jnp.where(order[None] < limit, 0, segments.PADDING)
    split = _partition(model, Local(sharding), tokens, ids)
    return tokens, Prompt(sharding, positions, order, resolved, ids, split, model.implementation)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Left:
    """What the layers leave behind, stacked over groups: packed keys and values, GDN caches, hidden states
    [layers, B, T, D], router statistics of all."""

    keys: Array
    states: gdn.GDNCache
    hidden: Array | None
    stats: RouterStats | None


def _walk(model: Qwen3_5, x, here: Prompt, *, hidden: bool, stats: bool):
    """All layers, over prompts."""
    config = model.config
    graph, groups = nnx.split(model.groups)

    def group(x, values):
        layers = nnx.merge(graph, nnx.State(values)).layers
        keys, states, hiddens, sums = [], [], [], []
        for kind, run in itertools.groupby(layers, key=lambda layer: layer.kind):
            linear, valid, of_run = kind == LINEAR, here.valid, []
            if linear:
                x, valid = here.partition.enter(x), _valid(here.partition.segment_ids)
            for layer in run:
                x, left, routed = layer(x, None, here, here.partition, valid)
                states += [here.partition.leave_rows(left)] if linear else []
                keys += [] if linear else [left]
                of_run += [x] if hidden else []
                sums += [here.sum_context(routed)] if stats else []
            if linear:
                x, of_run = here.partition.leave((x, of_run))
            hiddens += of_run
        stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
        return x, Left(
            jnp.stack(keys),
            jax.tree.map(stack, *states),
            jnp.stack(hiddens) if hidden else None,
            jax.tree.map(lambda *s: sum(s[1:], s[0]), *sums) if stats else None,
        )

    body = group
    if model.remat is not None:
        saved = ("ring_jax_out", "ring_jax_lse") if model.remat == "attention" else ()
        body = jax.checkpoint(group, policy=jax.checkpoint_policies.save_only_these_names(*saved), prevent_cse=False)
    x, left = jax.lax.scan(body, x, nnx.to_pure_dict(groups))
    hiddens = None if left.hidden is None else left.hidden.reshape(config.num_layers, *left.hidden.shape[2:])
    total = None if left.stats is None else here.sum_rows(jax.tree.map(lambda s: s.sum(axis=0), left.stats))
    return x, Left(left.keys, left.states, hiddens, total)


def _valid(segment_ids):
    return None if segment_ids is None else segment_ids >= 0


def _partition(model: Qwen3_5, here: Local, x, ids) -> gdn.Partition:
    """How GDN layers split the tokens of x [B, T here, ...]."""
    config, sharding = model.config, model.sharding
    if sharding is None:
        return gdn.partition(None, x, segment_ids=ids)
    kinds = config.layer_types[: config.period]
    runs = [len(list(run)) for kind, run in itertools.groupby(kinds) if kind == LINEAR]
    heads = config.linear.share(here.tensor_ranks)
    itemsize = jnp.dtype(model.dtype).itemsize
    shape = gdn.GDNShape(0, 0, heads, config.hidden_size, config.conv_width, max(runs, default=1), itemsize)
    return gdn.partition(sharding.context, x, strategy=sharding.way, shape=shape, segment_ids=ids)


def _embed(model: Qwen3_5, here: Any, tokens):
    x = here.rows(model.embed[...], tokens, model.config.hidden_size).astype(model.dtype)
    # A gather clips, and an id that no vocabulary has would look like a trained one.
    known = (tokens >= 0) & (tokens < model.config.vocab_size)
    x, known = pcast_to((x, known), here.token_axes())
    return jnp.where(known[..., None], x, jnp.nan)


def head(model: Qwen3_5):
    return model.embed[...].T if model.lm_head is None else model.lm_head[...]


def _logits(model: Qwen3_5, here: Local, x):
    return here.product(norm(x, model.final_norm, model.config), head(model), jnp.float32)


def _natural(x, here: Local, seq_axis: int = 1):
    return x if here.sharding is None else here.sharding.context.from_layout(x, seq_axis=seq_axis)
