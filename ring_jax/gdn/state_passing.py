"""The partition by states: every rank keeps its tokens, and what reaches beyond a token passes between ranks.

States pass as affine maps (`state_scan.py`), convolution inputs as halos of W - 1 tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax._checks import to_int32
from ring_jax.context.shard import Shard
from ring_jax.gdn import segments
from ring_jax.gdn.backends import select
from ring_jax.gdn.checks import check_operands, state_dtype
from ring_jax.gdn.chunked import transition
from ring_jax.gdn.conv import check_convolution, convolve_buffer, insert_tail, tail_at
from ring_jax.gdn.hopper import passing as hopper
from ring_jax.gdn.rule import delta_rule
from ring_jax.gdn.state_scan import Chunks
from ring_jax.gdn.stay import Stay


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
        begins = (first_at == first[None]) & (first_here < size)
        ends = (last_at == last[None]) & (last_here >= 0)
        edge = jnp.stack([jnp.where(begins, first_ids, -1).max(axis=0), jnp.where(ends, last_ids, -1).max(axis=0)])
        edge = lax.pmax(edge, chunks.axis)
        before = chunks.predecessors(ids[:, :, -1] + 1) - 1  # a permute fills with 0, which is a valid id
        goes_on = (first_here == 0) & (before == first_ids)
        return cls(first, last, edge[0], edge[1], (first_here == size) | begins | goes_on)


@dataclass(frozen=True)
class StatePassing(Stay):
    """Each rank runs its one or two chunks; states pass between ranks as affine maps, convolution inputs as halos."""

    chunks: Chunks
    segment_ids: jax.Array | None
    borders: Borders | None

    @classmethod
    def of(cls, shard: Shard, segment_ids: jax.Array | None = None) -> "StatePassing":
        """Raises ValueError for a layout that it cannot serve. Finds the document borders, once for all layers."""
        chunks = Chunks.of(shard)
        if segment_ids is None:
            return cls(chunks, None, None)
        segment_ids = to_int32(segment_ids)
        return cls(chunks, segment_ids, Borders.of(chunks.split(segment_ids), chunks))

    def edge_segments(self) -> Any:
        return None if self.borders is None else (self.borders.first_segment, self.borders.last_segment)

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
        chunks, batch = self.chunks, key.shape[0]
        if 0 in value.shape:
            shape = (batch, value.shape[2], key.shape[3], value.shape[3])
            zeros = jnp.zeros(shape, state_dtype(*operands))
            return jnp.zeros_like(value), zeros if initial_state is None else initial_state
        rows = [_merge(chunks.split(x)) for x in segments.blank_padding(self.segment_ids, *operands)]
        ids = None if self.segment_ids is None else _merge(chunks.split(self.segment_ids))
        joins = None if self.borders is None else self.borders.joins
        scale = key.shape[3] ** -0.5 if scale is None else scale
        if select(implementation, *rows[:3]).name == "mosaic":
            out, state = hopper.passing(chunks, float(scale), rows, ids, initial_state, joins)
        else:
            _, k, v, g, strength = rows
            m, b = (x.reshape(chunks.folds, batch, *x.shape[1:]) for x in transition(k, v, g, strength, ids))
            entering = chunks.entering(m, b, initial_state, joins=joins)
            out, state = delta_rule(
                *rows, scale=scale, initial_state=_merge(entering), segment_ids=ids, implementation=implementation
            )
            state = chunks.of_last(state.reshape(entering.shape))
        return chunks.join(out.reshape(chunks.folds, batch, *out.shape[1:])), state

    def passes_whole_tails(self, history: int) -> bool:
        """Whether the last `history` inputs of each chunk are what its successor has to know: no documents, no shorter chunks."""
        return self.borders is None and 0 < history <= self.chunks.size

    def entering_tails(self, last: jax.Array, tail: jax.Array) -> jax.Array:
        """From the last inputs of each chunk here [folds, B, W-1, F] and those before the sequence: what each chunk begins with."""
        begins = (self.chunks.starts() == 0)[:, None, None, None]
        return jnp.where(begins, tail[None], self.chunks.predecessors(last))

    def causal_convolution(
        self, x: jax.Array, weight: jax.Array, *, tail: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
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
            leaving: jax.Array = chunks.of_last(last)
        else:
            assert self.segment_ids is not None
            ids = _merge(self._with_halo(chunks.split(self.segment_ids)[..., None] + 1, history)[..., 0] - 1)
            each = [jnp.tile(x, chunks.folds) for x in (self.borders.first, self.borders.first_segment)]
            buffer, ids = insert_tail(_merge(buffer), ids, tails, each[0] - starts, each[1])
            ids = segments.runs(ids)
            y = convolve_buffer(buffer, weight, ids, _merge(chunks.split(self.segment_ids)))
            leaving = self._leaving_tail(buffer, ids, starts, tail)
        return chunks.join(y.reshape(chunks.folds, batch, *y.shape[1:])), leaving

    def _with_halo(self, x: jax.Array, history: int) -> Any:
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

    def _leaving_tail(self, buffer: jax.Array, ids: jax.Array, starts: jax.Array, tail: jax.Array) -> jax.Array:
        assert self.borders is not None
        chunks, history, batch = self.chunks, tail.shape[1], tail.shape[0]
        here = jnp.tile(self.borders.last, chunks.folds) - starts
        owns = (here >= 0) & (here < chunks.size)
        found = tail_at(buffer, ids, here + history, history)
        found = jnp.where(owns[:, None, None], found, jnp.zeros_like(found))
        found = lax.psum(found.reshape(chunks.folds, batch, *found.shape[1:]).sum(axis=0), chunks.axis)
        return jnp.where((self.borders.last >= 0)[:, None, None], found, tail)


def _merge(x: jax.Array) -> jax.Array:
    """Chunked [folds, B, ...] to [folds * B, ...]."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
