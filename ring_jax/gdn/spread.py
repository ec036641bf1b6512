"""How the tokens and heads that one rank works on lie in the whole: the same layer code runs under each.

A spread offers the two operations that reach beyond a token, and what a whole mixer needs to begin and end:

    OneDevice     the whole sequence is here (one device; the `batch` way, whose rows are whole)
    StatePassing  one or two chunks of it are here; states and convolution halos pass between ranks
    HeadSplit     tokens are spread outside of the operation, heads inside: all-to-alls around it

States and tails that enter and leave are those of the whole sequence and all heads, the same on every context rank
(see `ring_jax.gdn.context` for the convention).
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax._checks import check_array
from ring_jax.context.shard import Shard, axis_to_seq, seq_to_axis
from ring_jax.gdn import segments
from ring_jax.gdn.checks import check_operands, state_dtype
from ring_jax.gdn.chunked import transition
from ring_jax.gdn.conv import causal_convolution, check_convolution, convolve_buffer, insert_tail, tail_at
from ring_jax.gdn.operation import gated_delta_rule
from ring_jax.gdn.ranks import Chunks


@runtime_checkable
class Spread(Protocol):
    """What a layer asks of the spread that it runs under."""

    @property
    def segment_ids(self) -> jax.Array | None:
        """Segment ids of the tokens that the layer sees here, [B, T here], negative for padding."""
        ...

    def gated_delta_rule(
        self, query, key, value, log_decay, beta, *, scale=None, initial_state=None, implementation=None
    ):
        """As `ring_jax.gated_delta_rule`, for the tokens here; initial and final state are the whole sequence's."""
        ...

    def causal_convolution(self, x, weight, *, tail=None):
        """As `causal_convolution`, for the tokens here; the tails are the whole sequence's."""
        ...

    def edge_segments(self) -> "tuple[jax.Array, jax.Array] | None":
        """Ids of the first and the last valid token of the whole sequence, int32 [B] each; None without ids."""
        ...


@dataclass(frozen=True)
class OneDevice:
    """The whole sequence is here, in natural order."""

    segment_ids: jax.Array | None = None

    def __post_init__(self):
        if self.segment_ids is not None:
            check_array("OneDevice(segment_ids=...)", self.segment_ids, "B T", kind="signed")

    def gated_delta_rule(self, *operands, **options):
        """As `ring_jax.gated_delta_rule`."""
        return gated_delta_rule(*operands, segment_ids=self.segment_ids, **options)

    def causal_convolution(self, x, weight, *, tail=None):
        """As `ring_jax.gdn.causal_convolution`."""
        return causal_convolution(x, weight, tail=tail, segment_ids=self.segment_ids)

    def edge_segments(self):
        """Ids of the first and the last valid token, int32 [B] each; None without ids."""
        ids = self.segment_ids
        if ids is None:
            return None
        return tuple(segments.segment_at(ids, index(ids)) for index in (segments.first_valid, segments.last_valid))


@dataclass(frozen=True)
class Borders:
    """Where documents begin and end over all ranks; positions are global, [B] the same on all ranks."""

    first: jax.Array  # [B] position of the first valid token, beyond the end where there is none
    last: jax.Array  # [B] position of the last valid token, -1 where there is none
    first_segment: jax.Array  # [B]
    last_segment: jax.Array  # [B]
    joins: jax.Array  # [folds, B] whether the state that enters a chunk goes on in it

    @classmethod
    def of(cls, ids: jax.Array, chunks: Chunks) -> "Borders":
        """From chunked segment ids [folds, B, size]."""
        folds, batch, size = ids.shape
        flat, starts = ids.reshape(folds * batch, size), chunks.starts()[:, None]
        first_here, last_here = (f(flat).reshape(folds, batch) for f in (segments.first_valid, segments.last_valid))
        end = 2 * chunks.ranks * size
        first_at = jnp.where(first_here < size, starts + first_here, end)
        last_at = jnp.where(last_here >= 0, starts + last_here, -1)
        first = lax.pmin(first_at.min(axis=0), chunks.axis)
        last = lax.pmax(last_at.max(axis=0), chunks.axis)
        first_ids, last_ids = (
            segments.segment_at(flat, here.reshape(-1)).reshape(folds, batch) for here in (first_here, last_here)
        )
        begins = (first_at == first) & (first_here < size)
        ends = (last_at == last) & (last_here >= 0)
        edge = jnp.stack([jnp.where(begins, first_ids, -1).max(axis=0), jnp.where(ends, last_ids, -1).max(axis=0)])
        edge = lax.pmax(edge, chunks.axis)
        before = chunks.predecessors(ids[:, :, -1] + 1) - 1  # a permute fills with 0, which is a valid id
        goes_on = (first_here == 0) & (before == first_ids)
        return cls(first, last, edge[0], edge[1], (first_here == size) | begins | goes_on)


@dataclass(frozen=True)
class StatePassing:
    """Each rank runs its one or two chunks; states pass between ranks as affine maps, convolution inputs as halos."""

    chunks: Chunks
    segment_ids: jax.Array | None
    borders: Borders | None

    @classmethod
    def of(cls, shard: Shard, segment_ids: jax.Array | None = None) -> "StatePassing":
        """Raises ValueError for a layout that it cannot serve. Finds the document borders once for all layers."""
        chunks = Chunks.of(shard)
        if segment_ids is None:
            return cls(chunks, None, None)
        segment_ids = segment_ids.astype(jnp.int32)
        return cls(chunks, segment_ids, Borders.of(chunks.split(segment_ids), chunks))

    def edge_segments(self):
        return None if self.borders is None else (self.borders.first_segment, self.borders.last_segment)

    def gated_delta_rule(
        self, query, key, value, log_decay, beta, *, scale=None, initial_state=None, implementation=None
    ):
        operands = query, key, value, log_decay, beta
        check_operands(*operands, initial_state, self.segment_ids)
        chunks, batch = self.chunks, key.shape[0]
        if initial_state is None:
            shape = (batch, value.shape[2], key.shape[3], value.shape[3])
            initial_state = jnp.zeros(shape, state_dtype(*operands))
        operands = segments.blank_padding(self.segment_ids, *operands)
        operands = [_merge(chunks.split(x)) for x in operands]
        ids = None if self.segment_ids is None else _merge(chunks.split(self.segment_ids))
        maps = transition(*operands[1:], ids)
        m, b = (x.reshape(chunks.folds, batch, *x.shape[1:]) for x in maps)
        joins = None
        if self.borders is not None:
            joins = self.borders.joins[..., None, None, None]
            m = jnp.where(joins, m, jnp.zeros_like(m))
        entering = chunks.entering(m, b, initial_state)
        if joins is not None:
            entering = jnp.where(joins, entering, jnp.zeros_like(entering))
        out, state = gated_delta_rule(
            *operands, scale=scale, initial_state=_merge(entering), segment_ids=ids, implementation=implementation
        )
        state = chunks.of_last(state.reshape(entering.shape))
        return chunks.join(out.reshape(chunks.folds, batch, *out.shape[1:])), state

    def causal_convolution(self, x, weight, *, tail=None):
        check_convolution(x, weight, tail, self.segment_ids)
        history, chunks = weight.shape[0] - 1, self.chunks
        batch, _, features = x.shape
        if tail is None:
            tail = jnp.zeros((batch, history, features), x.dtype)
        (x,) = segments.blank_padding(self.segment_ids, x)
        buffer = self._with_halo(chunks.split(x), history)  # [folds, B, history + size, F]
        starts = jnp.broadcast_to(chunks.starts()[:, None], (chunks.folds, batch)).reshape(-1)
        tails = _merge(jnp.broadcast_to(tail, (chunks.folds, *tail.shape)))
        if self.borders is None:
            # The tail lies at positions -history ... -1: in the halo of the first chunk, or of several short ones.
            halo = _merge(buffer[:, :, :history])
            halo, _ = insert_tail(halo, jnp.zeros(halo.shape[:2], jnp.int32), tails, -starts, jnp.zeros_like(starts))
            buffer = jnp.concatenate([halo, _merge(buffer[:, :, history:])], axis=1)
            y = convolve_buffer(buffer, weight)
            last = buffer.reshape(chunks.folds, batch, *buffer.shape[1:])[:, :, chunks.size :]
            leaving = chunks.of_last(last)
        else:
            ids = _merge(self._with_halo(chunks.split(self.segment_ids)[..., None] + 1, history)[..., 0] - 1)
            each = [jnp.tile(x, chunks.folds) for x in (self.borders.first, self.borders.first_segment)]
            buffer, ids = insert_tail(_merge(buffer), ids, tails, each[0] - starts, each[1])
            y = convolve_buffer(buffer, weight, ids, _merge(chunks.split(self.segment_ids)))
            leaving = self._leaving_tail(buffer, ids, starts, tail)
        return chunks.join(y.reshape(chunks.folds, batch, *y.shape[1:])), leaving

    def _with_halo(self, x, history: int):
        """Chunked [folds, B, size, F] with the `history` tokens before each chunk in front, zeros before the first."""
        size = self.chunks.size
        if history == 0:
            return x
        width = min(size, history)
        piece = x[:, :, size - width :]
        pieces: list[jax.Array] = []
        for _ in range(math.ceil(history / size)):
            piece = self.chunks.predecessors(piece)
            pieces.insert(0, piece)
        halo = jnp.concatenate(pieces, axis=2)
        return jnp.concatenate([halo[:, :, halo.shape[2] - history :], x], axis=2)

    def _leaving_tail(self, buffer, ids, starts, tail):
        chunks, history, batch = self.chunks, tail.shape[1], tail.shape[0]
        here = jnp.tile(self.borders.last, chunks.folds) - starts
        owns = (here >= 0) & (here < chunks.size)
        found = tail_at(buffer, ids, here + history, history)
        found = jnp.where(owns[:, None, None], found, jnp.zeros_like(found))
        found = lax.psum(found.reshape(chunks.folds, batch, *found.shape[1:]).sum(axis=0), chunks.axis)
        return jnp.where((self.borders.last >= 0)[:, None, None], found, tail)


@dataclass(frozen=True)
class HeadSplit:
    """Tokens are spread between operations, heads inside them: this rank's share of heads for the whole sequence."""

    shard: Shard
    segment_ids: jax.Array | None = None  # of the tokens here
    natural_ids: jax.Array | None = None  # of the whole sequence in natural order

    @property
    def inside(self) -> OneDevice:
        """What the operation itself runs under, between the all-to-alls."""
        return OneDevice(self.natural_ids)

    def edge_segments(self):
        return self.inside.edge_segments()

    def check_heads(self, key_heads: int, value_heads: int) -> None:
        """Raises ValueError where the heads do not divide over the ranks."""
        for kind, heads in (("key", key_heads), ("value", value_heads)):
            if heads % self.shard.ranks:
                raise ValueError(
                    f"way='head' gives each of {self.shard.ranks} context ranks the same number of heads, got {heads} "
                    f"{kind} heads: use way='state' (any number of heads), or 'batch'"
                )

    def gated_delta_rule(
        self, query, key, value, log_decay, beta, *, scale=None, initial_state=None, implementation=None
    ):
        operands = query, key, value, log_decay, beta
        check_operands(*operands, initial_state, self.segment_ids)
        self.check_heads(key.shape[2], value.shape[2])
        operands = [seq_to_axis(x, self.shard, 2) for x in operands]
        if initial_state is not None:
            initial_state = self.own(initial_state, 1)
        out, state = self.inside.gated_delta_rule(
            *operands, scale=scale, initial_state=initial_state, implementation=implementation
        )
        return axis_to_seq(out, self.shard, 2), self.everyone(state, 1)

    def causal_convolution(self, x, weight, *, tail=None):
        check_convolution(x, weight, tail, self.segment_ids)
        if x.shape[2] % self.shard.ranks:
            raise ValueError(
                f"way='head' splits the features of a convolution over {self.shard.ranks} ranks, got {x.shape[2]} "
                "features: use way='state' or 'batch'"
            )
        if tail is not None:
            tail = self.own(tail, 2)
        y, tail = self.inside.causal_convolution(seq_to_axis(x, self.shard, 2), self.own(weight, 1), tail=tail)
        return axis_to_seq(y, self.shard, 2), self.everyone(tail, 2)

    def own(self, x, axis: int):
        """This rank's part of an array that all ranks hold."""
        size = x.shape[axis] // self.shard.ranks
        return lax.dynamic_slice_in_dim(x, self.shard.rank() * size, size, axis)

    def everyone(self, x, axis: int):
        """The parts of all ranks, on all ranks."""
        return lax.all_gather(x, self.shard.axis, axis=axis, tiled=True, to="invarying")


def _merge(x):
    """Chunked [folds, B, ...] to [folds * B, ...]."""
    return x.reshape(-1, *x.shape[2:])
