"""All layers of one pass, inside the shard_map (or without a mesh), and what comes of it.

A scan walks the groups of layers; over one token a row a loop does, in which each product reads its own slice of the stacked weights
where it lies: a scan copies every weight before its product, and with one token there is nothing else to do but read weights.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ring_jax import _repr, gdn
from ring_jax._checks import to_int32
from ring_jax._mesh import axis_names
from ring_jax._vma import pcast_to
from ring_jax.layout import Contiguous, Layout, Striped
from ring_jax.models.qwen3_5.cache import Cache, append, put
from ring_jax.models.qwen3_5.config import FULL, LINEAR
from ring_jax.models.qwen3_5.in_place import StatesInPlace
from ring_jax.models.qwen3_5.pass_ import Pass, embed, lay_out, same_tokens
from ring_jax.models.qwen3_5.past import Chunk, Chunks, Past
from ring_jax.models.qwen3_5.structure import Structure, head
from ring_jax.moe import RouterStats
from ring_jax.nn.norm import Normed

States = gdn.GDNCache  # of the layers of one group, or of all


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a call returns.

    Fields:
        logits: float32, [B, S, V] of all positions, [B, V] of each row's last one, or None.
        cache: to decode from, if it was asked for.
        hidden: [layers, B, S, D], what each layer hands on (before the final norm), if it was asked for.
        stats: of the routers, summed over tokens and layers, if it was asked for.
        new: what the pass leaves for those after it, if it was asked for: its own keys where it computed them, and the states and
            lengths after its last tokens. A past by itself where the pass had none.
    """

    logits: Float[Array, "B S V"] | Float[Array, "B V"] | None
    cache: Cache | None = None
    hidden: Float[Array, "layers B S D"] | None = None
    stats: RouterStats | None = None
    new: Chunks | None = None
    __repr__ = _repr.of_fields


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What of an `Output` a call asks for; static."""

    logits: str = "none"
    cache_room: int | None = None
    hidden: bool = False
    stats: bool = False
    new: bool = False

    @property
    def last_only(self) -> bool:
        """Whether nothing is asked for token by token."""
        return self.logits != "all" and not self.hidden and not self.stats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerOutputs:
    """What the layers leave behind: keys and values [M, B, T here, K, H], GDN states [G, layers of a group, ...], hidden states
    [layers, B, T here, D], router statistics of all."""

    keys: Array
    states: States
    hidden: Array | None
    stats: RouterStats | None


@dataclasses.dataclass(frozen=True)
class Forward:
    """A pass over the new tokens that are here, contiguous [B, S / C]; results in natural order again. Hashable."""

    model: Structure
    wanted: Wanted
    seq_len: int  # S without the layout's padding
    same: bool  # whether it is one token a row after a past, the same on all context ranks

    def __repr__(self) -> str:  # jax's messages show it
        return f"forward of {self.model!r}"

    def __call__(
        self,
        params: Any,
        tokens: jax.Array,
        lengths: jax.Array | None,
        segment_ids: jax.Array | None,
        past: Past | None,
    ) -> Output:
        model, wanted = self.model, self.wanted
        if self.same:
            assert past is not None
            here = same_tokens(model, tokens, lengths, past)
            x, left = loop_layers(model, params, embed(model, params, here, tokens), here)
        else:
            tokens, here = lay_out(model, tokens, lengths, segment_ids, past, self.seq_len)
            x, left = scan_layers(model, params, embed(model, params, here, tokens), here, wanted)
        new = _new(model, here, left, lengths, self.seq_len, wanted)
        return Output(
            _logits_of(self, params, here, x, lengths),
            None if wanted.cache_room is None else _cache(here, new, wanted.cache_room),
            _natural(left.hidden, here, seq_axis=2) if wanted.hidden else None,
            left.stats,
            new if wanted.new else None,
        )


@dataclasses.dataclass(frozen=True)
class Decode:
    """One token for each row, on this rank's shards of the cache: logits, and what of the cache is new. The prompt's keys
    are not handed through: that would copy them at every step. Hashable."""

    model: Structure

    def __repr__(self) -> str:
        return f"decode of {self.model!r}"

    def __call__(self, params: Any, tokens: jax.Array, cache: Cache) -> Any:
        model: Structure = self.model
        rank: Any = 0
        ranks, layout = 1, cast(Layout, Contiguous())
        if model.sharding is not None:
            context = model.sharding.context
            layout, ranks = context.layout, context.ranks()
            rank = jax.lax.axis_index(context.axis)
        here = same_tokens(model, tokens[:, None], None, cache.past(layout))
        x, left = loop_layers(model, params, embed(model, params, here, tokens[:, None]), here)
        new = append(cache, left.keys, rank, ranks)
        return here.whole_vocabulary(next_logits(model, params, here, x[:, 0])), new, left.states


def scan_layers(model: Structure, params: Any, x: jax.Array, here: Pass, wanted: Wanted) -> tuple[Array, LayerOutputs]:
    """All layers, group by group: a program has the size of one group whatever the depth."""
    config = model.config

    def group(x: Array, operands: Any) -> tuple[Array, LayerOutputs]:
        values, number, states = operands
        found: list[States] = []

        def read(n: int) -> States | None:
            return None if states is None else jax.tree.map(lambda c: c[n], states)

        layers = model.layers(values)
        x, keys, *rest = _run_layers(layers, x, here, read, lambda n, state: found.append(state), number, wanted)
        return x, LayerOutputs(jnp.stack(keys), jax.tree.map(lambda *s: jnp.stack(s), *found), *rest)

    body = group
    if model.remat is not None:
        saved = ("ring_jax_out", "ring_jax_lse") if model.remat == "attention" else ()
        body = jax.checkpoint(group, policy=jax.checkpoint_policies.save_only_these_names(*saved), prevent_cse=False)
    states = None if here.past is None else here.past.gdn
    x, left = jax.lax.scan(body, x, (params["groups"], jnp.arange(config.groups, dtype=jnp.int32), states))
    keys = left.keys.reshape(-1, *left.keys.shape[2:])
    hidden = None if left.hidden is None else left.hidden.reshape(config.num_layers, *left.hidden.shape[2:])
    total = None if left.stats is None else here.sum_rows(jax.tree.map(lambda s: s.sum(axis=0), left.stats))
    return x, LayerOutputs(keys, left.states, hidden, total)


def loop_layers(model: Structure, params: Any, x: jax.Array, here: Pass) -> tuple[Array, LayerOutputs]:
    """All layers over one token a row, as a plain loop.

    XLA lets a product read a slice of a parameter only, so layers read cached keys as they came in, and the token's own are the
    caller's to write. States are written layer by layer, each in place where the past is donated.
    """
    assert here.past is not None
    keys: list[Array] = []
    held: Any = _SlicedStates(here.past.gdn)
    if StatesInPlace.runs(model.config, here, here.past.gdn):
        held = StatesInPlace(model.layers(params["groups"]), here.past.gdn)
    for g in range(model.config.groups):
        layers = model.layers(jax.tree.map(lambda w, g=g: w[g], params["groups"]))
        read, write = functools.partial(held.read, g), functools.partial(held.write, g)
        x, own, *_ = _run_layers(layers, x, here, read, write, g, Wanted())
        keys += own
    # The barrier keeps whoever writes the keys behind the last layer's reading: it would have to be to a copy otherwise.
    x, stacked = jax.lax.optimization_barrier((x, jnp.stack(keys)))
    return here.same_for_head(x, head(params)), LayerOutputs(stacked, held.result(), None, None)


@dataclasses.dataclass
class _SlicedStates:
    """The states of all layers from one layer to the next, each cut out and put back: in place where the past is donated."""

    states: States

    def read(self, group: int, n: int) -> States:
        return jax.tree.map(lambda c: c[group, n], self.states)

    def write(self, group: int, n: int, left: States) -> None:
        old, at = self.states, (group, n)
        state, tail = put(old.state, at, left.state), put(old.tail, at, left.tail)
        self.states = dataclasses.replace(old, state=state, tail=tail)  # ids change between documents only

    def result(self) -> States:
        return self.states


def _run_layers(
    layers: Any,
    x: jax.Array,
    here: Pass,
    read: Callable[..., Any],
    write: Callable[..., Any],
    group: Any,
    wanted: Wanted,
) -> tuple[Any, ...]:
    """One group of layers: (x, keys and values, hidden states, router statistics). `read` and `write` its GDN states by number."""
    keys: list[Array] = []
    hidden: list[Array] = []
    sums: list[RouterStats] = []
    linear = itertools.count()
    full = (group * sum(layer.kind == FULL for layer in layers) + n for n in itertools.count())
    for kind, run in itertools.groupby(layers, key=lambda layer: layer.kind):
        split = here.partition
        of_run: list[Array] = []
        valid = here.valid if kind == FULL or split.segment_ids is None else split.segment_ids >= 0
        x = split.enter(x) if kind == LINEAR else x
        for layer in run:
            if kind == LINEAR:
                n = next(linear)
                x, left, routed = layer(x, split.enter_rows(read(n)), here, valid)
                write(n, split.leave_rows(left))
            else:
                x, left, routed = layer(x, next(full), here, valid)
                keys += left
            of_run += [x] if wanted.hidden else []
            sums += [here.sum_context(routed)] if wanted.stats else []
        x, of_run = split.leave((x, of_run)) if kind == LINEAR else (x, of_run)
        hidden += of_run
    total = jax.tree.map(lambda *s: sum(s[1:], s[0]), *sums) if wanted.stats else None
    return x, keys, jnp.stack(hidden) if wanted.hidden else None, total


def _new(
    model: Structure, here: Pass, left: LayerOutputs, lengths: jax.Array | None, seq_len: int, wanted: Wanted
) -> Chunks | None:
    """What the pass leaves for those after it."""
    if not wanted.new and wanted.cache_room is None:
        return None
    keys, layout = left.keys, cast(Layout, Contiguous())
    counts = jnp.full(keys.shape[1], seq_len, jnp.int32) if lengths is None else to_int32(lengths)
    (counts,) = pcast_to((counts,), here.token_axes(rows_only=True))
    if model.sharding is not None:
        layout = Striped() if here.same_tokens else model.sharding.context.layout
        keys = pcast_to(keys, axis_names(model.sharding.sequence))  # of one token: the first rank's counts
    total = counts if here.past is None else here.past.lengths + counts
    return Chunks((Chunk(keys, counts, layout),), left.states, total)


def _cache(here: Pass, new: Chunks | None, room: int) -> Cache:
    assert new is not None
    prompt = new.chunks[0].kv
    ranks = 1 if here.sharding is None else here.sharding.context.ranks()
    empty = jnp.zeros((*prompt.shape[:2], -(-room // ranks), *prompt.shape[3:]), prompt.dtype)
    empty = pcast_to(empty, here.token_axes() + axis_names(here.tensor))
    return Cache(prompt, empty, new.gdn, new.lengths, jnp.zeros((), jnp.int32))


def _logits_of(call: Forward, params: Any, here: Pass, x: jax.Array, lengths: jax.Array | None) -> Array | None:
    """The logits that are asked for."""
    model, wanted = call.model, call.wanted.logits
    if wanted == "none":
        return None
    if wanted == "all":
        return next_logits(model, params, here, _natural(x, here))
    if here.same_tokens:
        x = x[:, 0]
    else:
        last = jnp.full(x.shape[:1], call.seq_len - 1, jnp.int32) if lengths is None else lengths - 1
        at_last = here.order[None] == last[:, None]
        x = here.sum_context(jnp.sum(jnp.where(at_last[..., None], x, jnp.zeros_like(x)), axis=1))
    return here.whole_vocabulary(next_logits(model, params, here, x))


def next_logits(model: Structure, params: Any, here: Pass, x: jax.Array) -> Array:
    return here.product(Normed(x, params["final_norm"], model.config.norm_epsilon), head(params), jnp.float32)


def _natural(x: Any, here: Pass, seq_axis: int = 1) -> jax.Array:
    return x if here.sharding is None else here.sharding.context.from_layout(x, seq_axis=seq_axis)
