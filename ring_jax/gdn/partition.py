"""How the tokens and heads that one rank works on lie in the whole: the same layer code runs under each partition.

A partition is made once a pass, entered before a run of layers and left after it:

    partition = gdn.partition(context, x, strategy=..., segment_ids=...)      # ids and borders of documents, for all layers
    x = partition.enter(x)
    for layer, cache in zip(layers, caches):
        x, cache = layer(x, partition.enter_rows(cache), partition)
        cache = partition.leave_rows(cache)
    x = partition.leave(x)

It offers the two operations that reach beyond a token, and what a whole mixer needs to begin and end:

    OneDevice     the whole sequence is here (no context; OneRank: a context of one rank)
    BatchSplit    `batch`: whole rows between enter and leave, which are an all-to-all each; between them nothing moves
    HeadSplit     `head`: tokens are spread outside of the operation, heads inside: all-to-alls around it
    StatePassing  `state`: one or two chunks of tokens are here; states and convolution halos pass between ranks

Where the final state and the convolution tail lie, under each: **on all context ranks alike**, natural heads and features,
the batch sharded over `batch_axis` only. Initial states and tails are taken in the same form, so what one partition leaves
any other continues, and decode, whose single token is on all context ranks, needs no communication at all.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax._checks import check_array, check_choice, check_count, check_instance, to_int32
from ring_jax._mesh import Axis
from ring_jax.context.parallel import ContextParallel
from ring_jax.context.shard import Shard, axis_to_seq, seq_to_axis
from ring_jax.gdn import segments
from ring_jax.gdn.checks import check_operands, check_segments
from ring_jax.gdn.conv import causal_convolution, check_convolution
from ring_jax.gdn.cost import STRATEGIES, GDNShape, choose_strategy
from ring_jax.gdn.rule import delta_rule
from ring_jax.gdn.state_passing import StatePassing
from ring_jax.gdn.state_scan import Chunks
from ring_jax.gdn.stay import Stay


@runtime_checkable
class Partition(Protocol):
    """What a run of layers asks of the partition that it runs under."""

    @property
    def segment_ids(self) -> jax.Array | None:
        """Segment ids of the tokens that the layer sees here, [B here, T here], negative for padding."""
        ...

    def enter(self, x: Any) -> Any:
        """Tokens [B, T, ...] as they lie outside (a pytree of them) to those that are here inside."""
        ...

    def leave(self, y: Any) -> Any:
        """Inverse of `enter`."""
        ...

    def enter_rows(self, cache: Any) -> Any:
        """A pytree [B, ...] that all context ranks hold, such as a `GDNCache`, to the rows that are here inside."""
        ...

    def leave_rows(self, cache: Any) -> Any:
        """Inverse of `enter_rows`: all rows on all context ranks."""
        ...

    def gated_delta_rule(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        log_decay: jax.Array,
        beta: jax.Array,
        *,
        scale: float | None = None,
        initial_state: jax.Array | None = None,
        implementation: str | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """As `ring_jax.gated_delta_rule`, for the tokens here; initial and final state are the whole sequence's."""
        ...

    def causal_convolution(
        self, x: jax.Array, weight: jax.Array, *, tail: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """As `causal_convolution`, for the tokens here; the tails are the whole sequence's."""
        ...

    def edge_segments(self) -> "tuple[jax.Array, jax.Array] | None":
        """Ids of the first and the last valid token of the whole sequence, int32 [B here] each; None without ids."""
        ...


def partition(
    context: ContextParallel | None,
    x: jax.Array,
    *,
    strategy: str = "auto",
    shape: GDNShape | None = None,
    segment_ids: jax.Array | None = None,
    seq_len: int | None = None,
) -> Partition:
    """How GDN layers split what lies here; made once a pass, inside a shard_map that is manual over the context axis.

    Args:
        context: the mesh axes and the layout; None for one device.
        x: [B, T here, ...] in the order of `context.layout`, of which only the shape is looked at.
        strategy: "batch", "head", "state", or "auto": the cheapest that can run, by `choose_strategy`, which needs `shape`.
        shape: of a run of layers, for "auto" (batch and length are filled in from x).
        segment_ids: int [B, T here] in the order of the layout; negative: padding.
        seq_len: real length, where `to_layout` padded: later positions are padding.

    Raises:
        ValueError: the strategy cannot serve the layout; "auto" without a shape; outside of a shard_map.

    Example:
        >>> part = partition(None, jnp.ones((1, 5, 8)), seq_len=4)
        >>> part.segment_ids.tolist()
        [[0, 0, 0, 0, -1]]
    """
    check_instance("context", context, ContextParallel, "a ring_jax.ContextParallel", optional=True)
    check_array("x", x, kind="any")
    if x.ndim < 2:
        raise ValueError(f"x must be [B, T, ...], got shape {x.shape}")
    batch, time = x.shape[:2]
    check_choice("strategy", strategy, ("auto", *STRATEGIES))
    check_instance("shape", shape, GDNShape, "a ring_jax.gdn.GDNShape", optional=True)
    check_segments(segment_ids, batch, time, natural=False)
    if context is None:
        if seq_len is not None:
            segment_ids = segments.beyond(segment_ids, seq_len, batch, time)
        return OneDevice(segment_ids)
    if not context.is_manual:
        raise ValueError(
            f"gdn.partition splits local shards: call it inside a shard_map over {context.axis!r}, or let gdn.run make one"
        )
    shard = context.shard(time * context.ranks())
    seq_len = None if seq_len is None else check_count("seq_len", seq_len, 0, shard.length)
    ids = _mask_padding(segment_ids, batch, shard, seq_len)
    strategy = resolve_strategy(strategy, shape, batch, shard)
    if shard.ranks == 1:
        return OneRank(ids, axis=shard.axis)
    if strategy == "state":
        return StatePassing.of(shard, ids)
    natural = None
    if ids is not None:
        natural = lax.all_gather(ids, shard.axis, axis=1, tiled=True, to="invarying")
        natural = shard.layout.restore(natural, 1, shard.ranks)
    if strategy == "head":
        return HeadSplit(shard, ids, natural)
    return BatchSplit.of(shard, batch, time, natural)


def resolve_strategy(strategy: str, shape: GDNShape | None, batch: int, shard: Shard) -> str:
    """`strategy` by name, checked against the layout; "auto" by cost, for `batch` rows on one context group."""
    if strategy == "auto":
        if shard.ranks == 1:
            return "batch"
        if shape is None:
            raise ValueError(
                f"strategy='auto' weighs bytes against FLOPs: pass shape=GDNShape(...), or name one of {STRATEGIES}"
            )
        shape = dataclasses.replace(shape, batch=batch, length=shard.length)
        return choose_strategy(shape, shard.ranks, shard.layout)[0]
    if strategy == "state":
        Chunks.of(shard)
    return strategy


@dataclass(frozen=True)
class OneDevice(Stay):
    """The whole sequence is here, in natural order."""

    segment_ids: jax.Array | None = None

    def __post_init__(self) -> None:
        if self.segment_ids is not None:
            check_array("OneDevice(segment_ids=...)", self.segment_ids, "B T", kind="signed")

    def gated_delta_rule(self, *operands: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
        """As `ring_jax.gated_delta_rule`."""
        return delta_rule(*operands, segment_ids=self.segment_ids, **options)

    def causal_convolution(
        self, x: jax.Array, weight: jax.Array, *, tail: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """As `ring_jax.gdn.causal_convolution`."""
        return causal_convolution(x, weight, tail=tail, segment_ids=self.segment_ids)

    def edge_segments(self) -> Any:
        """Ids of the first and the last valid token, int32 [B] each; None without ids."""
        ids = self.segment_ids
        if ids is None:
            return None
        return tuple(segments.segment_at(ids, index(ids)) for index in (segments.first_valid, segments.last_valid))


@dataclass(frozen=True)
class BatchSplit(OneDevice):
    """Whole rows are here between `enter` and `leave`: an all-to-all each, nothing in between.

    Fields:
        shard: how the sequence lies outside. batch: rows outside; where they do not divide, rows of padding are added.
        documents: whether segment ids were given; without, they only mark rows of padding.
    """

    shard: Shard = dataclasses.field(kw_only=True)
    batch: int = dataclasses.field(kw_only=True)
    documents: bool = dataclasses.field(kw_only=True)

    @classmethod
    def of(cls, shard: Shard, batch: int, local_length: int, natural_ids: jax.Array | None) -> "BatchSplit":
        """natural_ids: of whole rows, [B, T], the same on all ranks."""
        padded, documents = -(-batch // shard.ranks) * shard.ranks, natural_ids is not None
        if natural_ids is None and padded != batch:
            natural_ids = jnp.zeros((batch, local_length * shard.ranks), jnp.int32)
        if natural_ids is not None:
            natural_ids = _own_rows(_pad_rows(natural_ids, padded, segments.PADDING), shard)
        return cls(natural_ids, shard=shard, batch=batch, documents=documents)

    def edge_segments(self) -> Any:
        return super().edge_segments() if self.documents else None

    @property
    def padded(self) -> int:
        """Rows of all ranks, those of padding included."""
        return -(-self.batch // self.shard.ranks) * self.shard.ranks

    def enter(self, x: Any) -> Any:
        return jax.tree.map(lambda leaf: seq_to_axis(_pad_rows(leaf, self.padded), self.shard, 0), x)

    def leave(self, y: Any) -> Any:
        return jax.tree.map(lambda leaf: axis_to_seq(leaf, self.shard, 0)[: self.batch], y)

    def enter_rows(self, cache: Any) -> Any:
        return jax.tree.map(lambda leaf: _own_rows(_pad_rows(leaf, self.padded), self.shard), cache)

    def leave_rows(self, cache: Any) -> Any:
        if self.batch == 0:  # XLA gathers no empty arrays
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cache)
        gather = functools.partial(lax.all_gather, axis_name=self.shard.axis, axis=0, tiled=True, to="invarying")
        return jax.tree.map(lambda leaf: gather(leaf)[: self.batch], cache)


@dataclass(frozen=True)
class OneRank(OneDevice):
    """A context axis of one rank: `leave_rows` only says that a cache is the same on all ranks."""

    axis: Axis = dataclasses.field(kw_only=True)

    def leave_rows(self, cache: Any) -> Any:
        return lax.psum(cache, self.axis)


@dataclass(frozen=True)
class HeadSplit(Stay):
    """Tokens are spread between operations, heads inside them: this rank's share of heads for the whole sequence."""

    shard: Shard
    segment_ids: jax.Array | None = None  # of the tokens here
    natural_ids: jax.Array | None = None  # of the whole sequence in natural order

    @property
    def inside(self) -> OneDevice:
        """What the operation itself runs under, between the all-to-alls."""
        return OneDevice(self.natural_ids)

    def edge_segments(self) -> Any:
        return self.inside.edge_segments()

    def check_heads(self, key_heads: int, value_heads: int) -> None:
        """Raises ValueError where the heads do not divide over the ranks."""
        for kind, heads in (("key", key_heads), ("value", value_heads)):
            if heads % self.shard.ranks:
                raise ValueError(
                    f"strategy='head' gives each of {self.shard.ranks} context ranks the same number of heads, got {heads} "
                    f"{kind} heads: use strategy='state' (any number of heads), or 'batch'"
                )

    def gated_delta_rule(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        log_decay: jax.Array,
        beta: jax.Array,
        *,
        scale: float | None = None,
        initial_state: jax.Array | None = None,
        implementation: str | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        operands = query, key, value, log_decay, beta
        check_operands(*operands, initial_state, self.segment_ids)
        self.check_heads(key.shape[2], value.shape[2])
        split = [seq_to_axis(x, self.shard, 2) for x in operands]
        if initial_state is not None:
            initial_state = self.own(initial_state, 1)
        out, state = self.inside.gated_delta_rule(
            *split, scale=scale, initial_state=initial_state, implementation=implementation
        )
        return axis_to_seq(out, self.shard, 2), self.everyone(state, 1)

    def causal_convolution(
        self, x: jax.Array, weight: jax.Array, *, tail: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        check_convolution(x, weight, tail, self.segment_ids)
        if x.shape[2] % self.shard.ranks:
            raise ValueError(
                f"strategy='head' splits the features of a convolution over {self.shard.ranks} ranks, got {x.shape[2]} "
                "features: use strategy='state' or 'batch'"
            )
        if tail is not None:
            tail = self.own(tail, 2)
        y, tail = self.inside.causal_convolution(seq_to_axis(x, self.shard, 2), self.own(weight, 1), tail=tail)
        return axis_to_seq(y, self.shard, 2), self.everyone(tail, 2)

    def own(self, x: jax.Array, axis: int) -> jax.Array:
        """This rank's part of an array that all ranks hold."""
        size = x.shape[axis] // self.shard.ranks
        return lax.dynamic_slice_in_dim(x, self.shard.rank() * size, size, axis)

    def everyone(self, x: jax.Array, axis: int) -> jax.Array:
        """The parts of all ranks, on all ranks."""
        return lax.all_gather(x, self.shard.axis, axis=axis, tiled=True, to="invarying")


def _mask_padding(ids: jax.Array | None, batch: int, shard: Shard, seq_len: int | None) -> jax.Array | None:
    if seq_len is None or seq_len == shard.length:
        return ids
    positions = shard.positions()
    if ids is None:
        ids = jnp.zeros((batch, positions.shape[0]), jnp.int32)
    return jnp.where(positions[None] < seq_len, to_int32(ids), segments.PADDING)


def _pad_rows(x: jax.Array, rows: int, value: int = 0) -> Any:
    widths = [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, widths, constant_values=value) if rows != x.shape[0] else x


def _own_rows(x: jax.Array, shard: Shard) -> Any:
    """This rank's rows of an array that all ranks hold."""
    rows = x.shape[0] // shard.ranks
    return lax.dynamic_slice_in_dim(x, shard.rank() * rows, rows, 0)
