"""Which query tile a thread block works on next, and which key tiles that one visits in which order.

Keys may come in *segments*: arrays of their own, each with its own bounds. A query tile makes *visits*: first the masked tiles
of each segment that has some, then the unmasked tiles of each segment.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from ring_jax._hardware import HOPPER
from ring_jax.flash.hopper.config import SHARED_MEMORY_BYTES, ForwardConfig
from ring_jax.flash.operands import BlockOptions

MAX_SEGMENTS = 8  # of one kernel: a list of visits is eight numbers of four bits
_BITS = 4
_TILES_PER_BLOCK = 4  # at most, where nothing else is asked for


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and options, all static."""

    batch: int
    query_len: int
    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    packed: bool  # kv is [P 2 B, S, K, H]; else [P B, S, K, H + Hv]
    carry: bool
    in_place: bool  # out and lse are the carry's own buffers
    rounded: bool  # out is in the dtype of the inputs
    options: BlockOptions
    heads_per_section: int
    config: ForwardConfig
    segments: int = 1  # of keys, in this call; bounds have an axis of segments where there are several
    first_segment: int = 0
    # `heads` counts the query heads that share the KV heads here; the arrays of queries may hold others around them.
    first_head: int = 0

    @property
    def stages_carry(self) -> bool:
        """Whether the carry waits in shared memory until the end: else it is where the accumulator starts."""
        return self.carry and 4 <= self._spare_bytes

    @property
    def _spare_bytes(self) -> int:
        """Of shared memory for each element of a tile of out."""
        used = self.config.shared_memory_bytes(self.head_size, self.value_size)
        return (SHARED_MEMORY_BYTES - used) // (self.config.block_q * self.value_size)

    @property
    def _has_room_for_out(self) -> bool:
        return self.rounded and 2 + 4 * self.stages_carry <= self._spare_bytes

    @property
    def stages_out(self) -> bool:
        """Whether out has shared memory of its own to leave from, while the next tile's Q comes."""
        return self._has_room_for_out and self.tiles_per_block > 1

    @property
    def query_tiles(self) -> int:
        return pl.cdiv(self.query_len, self.config.block_q)

    @property
    def items(self) -> int:
        return self.batch * self.heads * self.query_tiles

    @property
    def tiles_per_block(self) -> int:
        """As many as leave the multiprocessors evenly busy, where that pays: a rounded out that leaves while the next tile is computed.
        One in parts of an attention, which run beside transfers: those take multiprocessors for themselves, and what is left
        shares single tiles best."""
        if self.config.tiles_per_block is not None:
            return self.config.tiles_per_block
        if self.carry or self.segments > 1 or not self._has_room_for_out:
            return 1

        def rounds(tiles: int) -> int:
            return tiles * pl.cdiv(pl.cdiv(self.items, tiles), HOPPER.multiprocessors)

        return min(range(_TILES_PER_BLOCK, 0, -1), key=rounds)

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.items, self.tiles_per_block)


def work_item(problem: Problem, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(batch, head, first query row) of a work item: sections of heads whose KV fits L2, in each the last rows first.

    Under causal masks the last rows have the most work, and long work must not start late.
    """
    section, inside = jnp.divmod(index, problem.heads_per_section * problem.query_tiles)
    tile, head = jnp.divmod(inside, problem.heads_per_section)
    batch, head = jnp.divmod(section * problem.heads_per_section + head, problem.heads)
    row = (problem.query_tiles - 1 - tile) * problem.config.block_q
    # The last tile slides back into bounds. It recomputes rows of its neighbour, to the same bits.
    return batch, head, jnp.minimum(row, problem.query_len - problem.config.block_q)


@dataclasses.dataclass(frozen=True)
class Steps:
    """The key tiles of one query tile, in the order in which they are visited: masked ones first."""

    total: jax.Array
    masked: jax.Array
    left: jax.Array  # masked tiles at the left edge
    first_tile: jax.Array
    first_unmasked: jax.Array
    first_right: jax.Array

    def tile(self, step: jax.Array | int) -> jax.Array:
        right = self.first_right + step - self.left
        unmasked = self.first_unmasked + step - self.masked
        return jnp.where(step < self.left, self.first_tile + step, jnp.where(step < self.masked, right, unmasked))

    def load(self, load_key, load_value) -> None:
        """What the memory warpgroup does: K of the next step is needed together with V of this one.

        load_key and load_value take (step, segment, tile); segment is None of keys in one piece.
        """

        pl.when(self.total > 0)(lambda: load_key(jnp.int32(0), None, self.tile(jnp.int32(0))))

        @pl.loop(0, self.total)
        def _(step):
            pl.when(step + 1 < self.total)(lambda: load_key(step + 1, None, self.tile(step + 1)))
            load_value(step, None, self.tile(step))

    def masked_windows(self, block_kv: int, bounds: Callable):
        """(first, loop) for the masked steps: `first()` is the window of step 0, which is always taken as a masked one;
        `loop(begin, body, state)` folds state = body(step, state, window) over the steps from `begin` (0 or 1) on.

        A window is a function that gives the visible columns [first, last) of each row; bounds(segment) are the rows' bounds.
        """
        rows = bounds(None)

        def window(step):
            return _window(rows, lambda: self.tile(step) * block_kv)

        def loop(begin, body, state):
            end = jnp.maximum(self.masked, begin) if begin else self.masked
            return lax.fori_loop(begin, end, lambda step, state: body(step, state, window(step)), state)

        return (lambda: window(0)), loop


def _window(rows, first_key: Callable):
    # The tile is worked out where the mask is applied, not before the products.
    return lambda: tuple(bound - first_key() for bound in rows)


def steps_of(problem: Problem, start_ref: Any, end_ref: Any, batch: jax.Array, row: jax.Array) -> Steps:
    return _steps(problem, *_edges(problem, start_ref, end_ref, batch, row))


def _edges(problem: Problem, start_ref: Any, end_ref: Any, batch: jax.Array, row: jax.Array):
    """The bounds of the first and the last row of a query tile."""
    last_row = row + problem.config.block_q - 1
    return start_ref[batch, row], start_ref[batch, last_row], end_ref[batch, row], end_ref[batch, last_row]


def _steps(problem: Problem, low: jax.Array, low_max: jax.Array, high_min: jax.Array, high: jax.Array) -> Steps:
    block = problem.config.block_kv
    first = lax.div(low, block)
    last = jnp.where(high > low, pl.cdiv(high, block), first)
    first_unmasked = jnp.clip(pl.cdiv(low_max, block), first, last)
    first_right = jnp.clip(lax.div(high_min, block), first_unmasked, last)
    left = first_unmasked - first
    return Steps(last - first, left + last - first_right, left, first, first_unmasked, first_right)


@dataclasses.dataclass(frozen=True)
class Visit:
    """The masked or the unmasked key tiles of one segment, for one query tile."""

    segment: jax.Array
    count: jax.Array
    left: jax.Array  # tiles counted from `first`, the others from `right`
    first: jax.Array
    right: jax.Array

    def tile(self, i: jax.Array | int) -> jax.Array:
        return i + jnp.where(i < self.left, self.first, self.right)


@dataclasses.dataclass(frozen=True)
class SegmentSteps:
    """The key tiles of one query tile over several segments.

    Holds few numbers, because the memory warpgroup has few registers: of each visit just its segment. What a visit covers is
    worked out again from the bounds, which lie in the L1 cache by then.
    """

    total: jax.Array
    masked: jax.Array
    masked_visits: jax.Array
    visits: jax.Array
    masked_segments: jax.Array  # packed, _BITS each
    unmasked_segments: jax.Array
    steps_in: Callable[[jax.Array], Steps]

    def masked_visit(self, i: jax.Array | int) -> Visit:
        segment = (self.masked_segments >> (_BITS * i)) & (MAX_SEGMENTS - 1)
        steps = self.steps_in(segment)
        return Visit(segment, steps.masked, steps.left, steps.first_tile, steps.first_right - steps.left)

    def visit(self, i: jax.Array | int) -> Visit:
        masked = i < self.masked_visits
        segments = jnp.where(masked, self.masked_segments, self.unmasked_segments)
        segment = (segments >> (_BITS * jnp.where(masked, i, i - self.masked_visits))) & (MAX_SEGMENTS - 1)
        steps = self.steps_in(segment)
        return Visit(
            segment,
            jnp.where(masked, steps.masked, steps.total - steps.masked),
            jnp.where(masked, steps.left, 0),
            steps.first_tile,
            jnp.where(masked, steps.first_right - steps.left, steps.first_unmasked),
        )

    def load(self, load_key, load_value) -> None:
        """See `Steps.load`: the same order, also from one segment to the next."""

        def visit_segment(i, state):
            visit = self.visit(i)

            def next_step(i, state):
                step, *previous = state
                load_key(step, visit.segment, visit.tile(i))
                pl.when(step > 0)(lambda: load_value(step - 1, *previous))
                return step + 1, visit.segment, visit.tile(i)

            return lax.fori_loop(0, visit.count, next_step, state)

        step, *last = lax.fori_loop(0, self.visits, visit_segment, (jnp.int32(0),) * 3)
        pl.when(step > 0)(lambda: load_value(step - 1, *last))

    def masked_windows(self, block_kv: int, bounds: Callable):
        """See `Steps.masked_windows`."""

        def first():
            visit = self.visit(0)
            return _window(bounds(visit.segment), lambda: visit.tile(0) * block_kv)

        def loop(begin, body, state):
            def visit_segment(i, state):
                visit = self.masked_visit(i)
                rows = bounds(visit.segment)

                def next_step(j, state):
                    step, *state = state
                    return step + 1, *body(step, state, _window(rows, lambda: visit.tile(j) * block_kv))

                return lax.fori_loop(jnp.where(i == 0, begin, 0), visit.count, next_step, state)

            return lax.fori_loop(0, self.masked_visits, visit_segment, (jnp.int32(begin), *state))[1:]

        return first, loop


def segment_steps_of(problem: Problem, start_ref: Any, end_ref: Any, batch: jax.Array, row: jax.Array) -> SegmentSteps:
    def loaded(segment):
        segment = segment + problem.first_segment
        return _edges(problem, start_ref.at[segment], end_ref.at[segment], batch, row)

    def steps_in(segment):
        return _steps(problem, *loaded(segment))

    total, masked, masked_visits, unmasked_visits, masked_segments, unmasked_segments = (jnp.int32(0),) * 6
    # All loads before the first use, so that they wait for memory together.
    for segment, edges in enumerate([loaded(segment) for segment in range(problem.segments)]):
        steps = _steps(problem, *edges)
        total, masked = total + steps.total, masked + steps.masked
        some_masked, some_unmasked = steps.masked > 0, steps.total > steps.masked
        masked_segments |= jnp.where(some_masked, segment << (_BITS * masked_visits), 0)
        unmasked_segments |= jnp.where(some_unmasked, segment << (_BITS * unmasked_visits), 0)
        masked_visits += jnp.where(some_masked, 1, 0)
        unmasked_visits += jnp.where(some_unmasked, 1, 0)
    return SegmentSteps(
        total, masked, masked_visits, masked_visits + unmasked_visits, masked_segments, unmasked_segments, steps_in
    )
