"""Paged decode attention for Hopper GPUs (sm90) in Pallas Mosaic GPU: two kernels, `attend` and `merge`.

Algorithm: Flash-Decoding (Dao et al., 2023) over PagedAttention's tables (Kwon et al., arXiv 2309.06180), with the work cut in
equal shares as in Stream-K (Osama et al., arXiv 2301.03598).

A *segment* s = row K + head is one KV head's keys of one row, in *tiles* of `warpgroups` blocks of `block_kv` keys. All tiles of all
segments stand in one line, of which every thread block takes an equal share: rows of any lengths keep all of them busy to the end,
and there is one launch for one row of a million keys and for a hundred rows of ten. A *memory* warpgroup copies K and V blocks from
their pages by TMA into rings of `stages` slots, one ring for each *compute* warpgroup, and runs ahead over the ends of segments. A
compute warpgroup holds the M = T G query rows that share the KV head, padded to the 64 of wgmma (the products are free beside
the memory), and runs the online softmax of `forward_kernel` over its block of every tile:

    S = Q K^T;  m' = max(m, rowmax(S) c);  P = exp2(S c - m');  l' = l exp2(m - m') + rowsum(P);  acc' = acc exp2(m - m') + P V

Where the share or the segment ends it writes (out, lse). Share c and segment s meet at most once, and c + s never falls along the
line and never repeats: it is where the partial result goes. `merge` joins those of a segment, which lie one after the other.

Keys behind a row's length are masked, and the last block's values behind it cleared in shared memory: they may be anything.
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax.flash.hopper.forward_kernel import softmax
from ring_jax.flash.operands import BlockOptions
from ring_jax.mosaic import compat, rows, wgmma
from ring_jax.mosaic.pipeline import ring_slot

_TILE = plgpu.Layout.WGMMA
_ROWS = plgpu.Layout.WGMMA.reduce(1)
_LN2 = math.log(2.0)
_NO_KEY_YET = -1e30
_AT_ONCE = 4  # partial results whose loads wait together


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedConfig:
    """How the keys are cut.

    Attributes:
        block_kv: keys of a block; a multiple of 16, at most 256.
        stages: K blocks, and as many V blocks, in flight for each compute warpgroup.
        warpgroups: compute warpgroups, 1 or 2. One keeps up with the memory, and leaves half as much to merge.
        blocks: thread blocks of the launch.
    """

    block_kv: int
    stages: int
    warpgroups: int = 1
    blocks: int = 132
    lazy_rescale: bool = True

    @property
    def tile(self) -> int:
        return self.block_kv * self.warpgroups

    @property
    def registers(self) -> tuple[int, int]:
        """Registers per thread of the compute and the memory warpgroups (setmaxnreg)."""
        return (232, 40) if self.warpgroups == 2 else (240, 40)

    def shared_memory_bytes(self, head_size: int) -> int:
        return 2 * head_size * (64 + 2 * self.stages * self.tile) + 1024


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and options, all static. `query_rows` is M, padded to a multiple of 8; `slots` those of a page."""

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    head_size: int
    pages: int
    slots: int
    options: BlockOptions
    config: PagedConfig

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def query_rows(self) -> int:
        return -(-self.tokens * self.group // 8) * 8

    @property
    def segments(self) -> int:
        return self.rows * self.kv_heads

    @property
    def partials(self) -> int:
        return (self.config.blocks + self.segments - 1) * self.config.warpgroups

    @property
    def copies(self) -> int:
        """TMA copies of a block."""
        return max(1, self.config.block_kv // self.slots)


def attend(problem: Problem, *refs, q_smem, k_smem, v_smem, q_full, q_free, k_full, k_free, v_full, v_free):
    """refs: query [R K M, H], pages [.. P, p, K, H], table, lengths, layer [1], starts and visits (`paged_launch.shares`); partial out
    [partials, M, H] and lse [partials, 64]."""
    config = problem.config
    q_ref, pages_ref, table_ref, lengths_ref, layer_ref, starts_ref, visits_ref, out_ref, lse_ref = refs
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")

    def walk(visit):
        """visit(segment, first tile, tiles, step) for each segment of this share; step counts the tiles before it."""
        share = _share(problem, starts_ref)
        begin = block * share

        def one(segment, step):
            start, stop = starts_ref[segment], starts_ref[segment + 1]
            first = lax.max(begin - start, 0)
            tiles = lax.max(lax.min(begin + share, stop) - start - first, 0)
            visit(segment, first, tiles, step)
            return step + tiles

        lax.fori_loop(visits_ref[0, block], visits_ref[1, block] + 1, one, jnp.int32(0))

    @pl.when(warpgroup < config.warpgroups)
    def _compute():
        plgpu.set_max_registers(config.registers[0], action="increase")
        ring = _Ring(k_smem, v_smem, k_full, k_free, v_full, v_free, warpgroup, config)
        ring.free_all()

        @pl.when(warpgroup == 0)
        def _():
            rows.clear_rows(q_smem, jnp.int32(problem.query_rows))

        plgpu.barrier_arrive(q_free)

        def visit(segment, first, tiles, step):
            @pl.when(tiles > 0)
            def _():
                @pl.when(warpgroup == 0)
                def _():
                    plgpu.barrier_wait(q_free)
                    mine = pl.ds(segment * problem.query_rows, problem.query_rows)
                    plgpu.copy_gmem_to_smem(q_ref.at[mine], q_smem.at[pl.ds(0, problem.query_rows)], q_full)

                length = lengths_ref[lax.div(segment, problem.kv_heads)]
                plgpu.barrier_wait(q_full)
                acc, m, l = _attend(problem, ring, q_smem, warpgroup, length, first, tiles, step)
                plgpu.barrier_arrive(q_free)
                at = (block + segment) * config.warpgroups + warpgroup
                l = l.sum(axis=1)
                visible = l != 0.0  # a NaN stays visible
                inverse = jnp.where(visible, 1.0 / l, 0.0)
                rows.store_rows(out_ref.at[at], acc * _across(inverse, problem.head_size))
                compat.store(lse_ref.at[at], jnp.where(visible, m * _LN2 + jnp.log(l), -jnp.inf))

        walk(visit)
        if compat.interpreting():  # which wants every phase of a barrier to be seen
            pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(q_free))

    @pl.when(warpgroup == config.warpgroups)
    def _memory():
        plgpu.set_max_registers(config.registers[1], action="decrease")
        base = layer_ref[0] * (2 * problem.pages)

        def visit(segment, first, tiles, step):
            row, head = lax.div(segment, problem.kv_heads), lax.rem(segment, problem.kv_heads)
            last_page = lax.div(lax.max(lengths_ref[row] - 1, 0), problem.slots)

            def one(i, _):
                for w in range(config.warpgroups):
                    ring = _Ring(k_smem, v_smem, k_full, k_free, v_full, v_free, w, config)
                    key = (first + i) * config.tile + w * config.block_kv
                    ids, slots = _places(problem, table_ref.at[row], key, last_page)
                    for part, (smem, full, free) in enumerate(ring.halves):
                        at = ring.at(step + i)
                        plgpu.barrier_wait(free.at[at])
                        for copy, page in enumerate(ids):
                            target = smem.at[at, pl.ds(copy * slots.size, slots.size)]
                            source = pages_ref.at[base + part * problem.pages + page, slots, head]
                            plgpu.copy_gmem_to_smem(source, target, full.at[at])

            lax.fori_loop(0, tiles, one, None)

        walk(visit)
        if compat.interpreting():
            for w in range(config.warpgroups):
                _Ring(k_smem, v_smem, k_full, k_free, v_full, v_free, w, config).await_all()


def _places(problem: Problem, table_ref, key, last_page):
    """(page ids, slots of each) of the block that begins at `key`. Behind the last page it is read again: ids there mean nothing."""
    block, slots = problem.config.block_kv, problem.slots
    if problem.copies == 1:
        return [table_ref[lax.min(lax.div(key, slots), last_page)]], pl.ds(lax.rem(key, slots), block)
    page = lax.div(key, slots)
    return [table_ref[lax.min(page + i, last_page)] for i in range(problem.copies)], pl.ds(0, slots)


class _Ring:
    """The slots of one compute warpgroup: K and V blocks, and who may touch them."""

    def __init__(self, k_smem, v_smem, k_full, k_free, v_full, v_free, warpgroup, config: PagedConfig):
        self.halves = (k_smem, k_full, k_free), (v_smem, v_full, v_free)
        self.first, self.stages = warpgroup * config.stages, config.stages

    def at(self, step):
        return self.first + ring_slot(jnp.int32(step), self.stages)

    def free_all(self) -> None:
        for stage in range(self.stages):
            for _, _, free in self.halves:
                plgpu.barrier_arrive(free.at[self.first + stage])

    def await_all(self) -> None:
        for stage in range(self.stages):
            for _, _, free in self.halves:
                plgpu.barrier_wait(free.at[self.first + stage])


def _attend(problem: Problem, ring: _Ring, q_smem, warpgroup, length, first, tiles, step):
    """(acc, m, l) of this warpgroup's blocks of `tiles` tiles from tile `first` on."""
    config = problem.config
    (k_smem, k_full, k_free), (v_smem, v_full, v_free) = ring.halves

    def one(tile, state, masked: bool):
        acc, m, l = state
        at = ring.at(step + tile - first)
        left = length - tile * config.tile - warpgroup * config.block_kv
        plgpu.barrier_wait(k_full.at[at])
        (scores,) = wgmma.wait(0, wgmma.start_scores(q_smem, k_smem.at[at]))
        plgpu.barrier_arrive(k_free.at[at])
        window = (lambda: (None, plgpu.layout_cast(jnp.full((64,), left, jnp.int32), _ROWS))) if masked else None
        p, m_new, l = softmax(problem, scores, window, m, l)
        acc = wgmma.rescale(acc, jnp.exp2(m - m_new))
        plgpu.barrier_wait(v_full.at[at])
        if masked:
            rows.clear_rows(v_smem.at[at], left)
        (acc,) = wgmma.wait(0, wgmma.start_values(acc, p.astype(q_smem.dtype), v_smem.at[at]))
        plgpu.barrier_arrive(v_free.at[at])
        return acc, m_new, l

    acc = plgpu.layout_cast(jnp.zeros((64, problem.head_size), jnp.float32), _TILE)
    m = plgpu.layout_cast(jnp.full((64,), _NO_KEY_YET, jnp.float32), _ROWS)
    l = plgpu.layout_cast(jnp.zeros((64, 8), jnp.float32), _TILE)
    # This warpgroup's blocks of the row that are full: (w + 1) blocks fit into the first tile, and so on.
    whole = lax.div(length + (config.tile - config.block_kv) - warpgroup * config.block_kv, config.tile)
    masked = lax.max(first, lax.min(whole, first + tiles))
    state = lax.fori_loop(first, masked, lambda tile, state: one(tile, state, False), (acc, m, l))
    return lax.fori_loop(masked, first + tiles, lambda tile, state: one(tile, state, True), state)


def _share(problem: Problem, starts_ref) -> jax.Array:
    """Tiles of a thread block, but of the last ones."""
    return lax.max(lax.div(starts_ref[problem.segments] + (problem.config.blocks - 1), problem.config.blocks), 1)


def _across(x: jax.Array, columns: int) -> jax.Array:
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def scratch(problem: Problem, dtype) -> dict:
    """Shared memory of `attend`."""
    config, size = problem.config, problem.head_size
    slots = config.stages * config.warpgroups

    def ring(arrivals=1):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots)

    return dict(
        q_smem=compat.tiled_smem((64, size), dtype),
        k_smem=compat.tiled_smem((slots, config.block_kv, size), dtype),
        v_smem=compat.tiled_smem((slots, config.block_kv, size), dtype),
        q_full=plgpu.Barrier(),
        q_free=plgpu.Barrier(num_arrivals=config.warpgroups),
        k_full=ring(problem.copies),
        k_free=ring(),
        v_full=ring(problem.copies),
        v_free=ring(),
    )


def merge(problem: Problem, out_part_ref, lse_part_ref, starts_ref, out_ref, lse_ref):
    """One query row a program: the partial results of its segment, a few at a time so that their loads wait together."""
    config = problem.config
    program = lax.axis_index("query")
    head, rest = lax.rem(program, problem.heads), lax.div(program, problem.heads)
    token, row = lax.rem(rest, problem.tokens), lax.div(rest, problem.tokens)
    segment = row * problem.kv_heads + lax.div(head, problem.group)
    place = token * problem.group + lax.rem(head, problem.group)
    start, stop, share = starts_ref[segment], starts_ref[segment + 1], _share(problem, starts_ref)
    block = lax.div(start, share)
    first = (block + segment) * config.warpgroups
    parts = jnp.where(stop > start, (lax.div(stop - 1, share) - block + 1) * config.warpgroups, 0)
    layout = _vector(problem.head_size)

    def few(i, state):
        acc, m, l = state
        each = [i * _AT_ONCE + j for j in range(_AT_ONCE)]
        at = [first + lax.min(j, parts - 1) for j in each]
        lses = [jnp.where(j < parts, lse_part_ref[a, place], -jnp.inf) for j, a in zip(each, at, strict=True)]
        outs = [compat.load(out_part_ref.at[a, place], layout) for a in at]
        top = functools.reduce(lax.max, lses, m)
        acc, l = acc * jnp.exp(m - top), l * jnp.exp(m - top)
        for lse, out in zip(lses, outs, strict=True):
            weight = jnp.exp(lse - top)
            acc, l = acc + out * weight, l + weight
        return acc, top, l

    acc = plgpu.layout_cast(jnp.zeros((problem.head_size,), jnp.float32), layout)
    state = acc, jnp.float32(_NO_KEY_YET), jnp.float32(0.0)
    acc, m, l = lax.fori_loop(0, lax.div(parts + (_AT_ONCE - 1), _AT_ONCE), few, state)
    visible = l != 0.0
    compat.store(out_ref.at[row, token, head], acc * jnp.where(visible, 1.0 / l, 0.0))
    lse_ref[row, token, head] = jnp.where(visible, m + jnp.log(l), -jnp.inf)


def _vector(size: int):
    """[size], spread over the threads of a warpgroup, which hold it twice where 128 does not divide it."""
    tile = 128 if size % 128 == 0 else 64
    warps = (-3,) if tile == 128 else (fragmented_array.Replicated(2), -3)
    return compat.tiled_layout(((tile,), (32,), (1,)), warps, (-2,))
