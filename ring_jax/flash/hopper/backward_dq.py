"""The dq kernel of the Hopper backward: see `backward_launch`."""

from functools import partial

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax.flash.hopper.backward_common import (
    ROW,
    ROWS,
    STAGE_COLUMNS,
    TILE,
    Value,
    drain,
    program,
    softmax,
    store,
)
from ring_jax.flash.hopper.config import REGISTERS
from ring_jax.mosaic import compat, in_place, wgmma
from ring_jax.mosaic.pipeline import ring_slot


def dq(problem, query, kv, dout, stats, bounds, table, total=None):
    """dq, added to `total` in its own buffer where that is given."""
    H, Hv, config = problem.H, problem.Hv, problem.config
    wgs = config.warpgroups_dq
    operands = query, kv, dout, stats, bounds, table
    output = compat.output_like(query.shape, jnp.float32, *operands[:5])
    tiles = table.shape[1]  # [B, tiles, ...] with and without segments
    key_slots, value_slots = config.slots_of_dq
    slots = (
        compat.tiled_smem((key_slots, config.block_kv_dq, H), problem.dtype),
        compat.tiled_smem((value_slots, config.block_kv_dq, Hv), problem.dtype),
    )
    staging = compat.tiled_smem((wgs, ROWS, STAGE_COLUMNS), jnp.float32)
    call = compat.kernel(
        partial(_body, problem, tiles, total is not None),
        name="flash_backward_dq",
        out_type=(output,) if total is None else (),
        scratch=dict(
            q_smem=compat.tiled_smem((wgs, ROWS, H), problem.dtype),
            do_smem=compat.tiled_smem((wgs, ROWS, Hv), problem.dtype),
            # The epilogue's staging reuses the KV slots.
            slots=plgpu.RefUnion(slots, staging),
            rows_full=plgpu.Barrier(num_arrivals=2, num_barriers=wgs),
            k_full=plgpu.Barrier(num_barriers=key_slots),
            k_consumed=plgpu.Barrier(num_arrivals=wgs, num_barriers=key_slots),
            v_full=plgpu.Barrier(num_barriers=value_slots),
            v_consumed=plgpu.Barrier(num_arrivals=wgs, num_barriers=value_slots),
            done=plgpu.Barrier(num_arrivals=wgs),
        ),
        grid=(problem.N * problem.B * tiles,),
        grid_names=("program",),
        num_threads=wgs + 1,
        thread_name="wg",
    )
    return (call(*operands) if total is None else in_place.update(call, (), operands, (total,)))[0]


def _body(problem, tiles, add, query, kv, dout, stats, bounds, table, dq_ref, *,
          q_smem, do_smem, slots, rows_full, done, **barriers):  # fmt: skip
    wg = lax.axis_index("wg")
    b, program_head, tile = program(problem.B, problem.N, tiles, descending=True)
    head = problem.first_head + program_head
    visits = _Visits(problem, table, b, tile)
    (k_slots, v_slots), staging = slots
    wgs = problem.config.warpgroups_dq
    registers, memory_registers = REGISTERS[wgs]

    # What sees no key here has nothing to add.
    @pl.when((wg < wgs) & (visits.total > 0) if add else wg < wgs)
    def _compute():
        plgpu.set_max_registers(registers, action="increase")
        rows = pl.ds(tile * (wgs * ROWS) + wg * ROWS, ROWS)
        q, do = q_smem.at[wg], do_smem.at[wg]
        plgpu.copy_gmem_to_smem(query.at[b, rows, head], q, rows_full.at[wg])
        plgpu.copy_gmem_to_smem(dout.at[b, rows, head], do, rows_full.at[wg])
        lse, delta = (compat.load(stats.at[b, head, i, rows], ROW) for i in range(2))

        def bounds_in(segment):
            at = b if segment is None else segment * problem.B + b
            return tuple(compat.load(bounds.at[at, i, rows], ROW) for i in range(2))

        view = _enter(visits, bounds_in, 0)
        plgpu.barrier_wait(rows_full.at[wg])
        operands = (q, do, lse, delta, view, bounds_in)
        acc = _rows_of_queries(problem, visits, operands, k_slots, v_slots, **barriers)
        # The staging buffer reuses the slots, and the other warpgroup may still read them.
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)
        store(
            Value(acc),
            problem.options.scale,
            staging.at[wg],
            lambda columns: dq_ref.at[b, rows, head, columns],
            add=add,
        )

    @pl.when(wg == wgs)
    def _memory():
        plgpu.set_max_registers(memory_registers, action="decrease")
        _load_keys(problem, visits, b, lax.div(program_head, problem.G), kv, k_slots, v_slots, **barriers)


class _Visits:
    """The KV tiles of one query tile, segment by segment; segments of which it sees no key are not in the table."""

    def __init__(self, problem, table, b, tile):
        self._at = lambda *index: table[(b, tile, *index)]
        self._one = problem.segments == 1
        if self._one:
            self._span = tuple(self._at(i) for i in range(4))
            self.total = self._span[1] - self._span[0]
        else:
            self.total, self._count = (self._at(0, i) for i in range(2))

    def __getitem__(self, n):
        """(first tile, last tile, [u, v) without mask), segment or None."""
        if self._one:
            return self._span, None
        return tuple(self._at(n + 1, i) for i in range(4)), self._at(n + 1, 4)

    def fold(self, view, enter, body, state):
        """state = body(t, j, view, state) for each step t, KV tile j of visit n, view = enter(n); `view` is that of visit 0."""

        def tiles(t, view, state):
            first, last = view[0][:2]
            # From 0, since `first` may vary over a manual mesh axis and the loop's own counter does not.
            return lax.fori_loop(0, last - first, lambda i, x: body(t + i, first + i, view, x), state)

        def visit(n, carry):
            t, state = carry
            view = enter(n)
            return t + view[0][1] - view[0][0], tiles(t, view, state)

        if self._one:
            return tiles(0, view, state)
        return lax.fori_loop(0, self._count, visit, (jnp.int32(0), state))[1]


def _enter(visits, bounds_in, n):
    """What the steps of visit n need: tiles, and the bounds of the rows."""
    span, segment = visits[n]
    return span, bounds_in(segment)


def _rows_of_queries(problem, visits, operands, k_slots, v_slots, *, k_full, k_consumed, v_full, v_consumed):
    """dQ / scale of 64 queries in one warpgroup."""
    q, do, lse, delta, first_view, bounds_in = operands
    block = problem.config.block_kv_dq
    key_slots, value_slots = problem.config.slots_of_dq

    def spread(x):
        return lax.broadcast_in_dim(x, (ROWS, block), [0])

    def visible(j, view, p, hidden):
        (_, _, u, v), (start, end) = view

        def apply():
            return wgmma.mask(p, start - j * block, end - j * block, hidden)

        return lax.cond((j < u) | (j >= v), apply, lambda: p)

    def step(t, j, view, acc):
        k_slot, v_slot = ring_slot(t, key_slots), ring_slot(t, value_slots)
        key, value = k_slots.at[k_slot], v_slots.at[v_slot]
        plgpu.barrier_wait(k_full.at[k_slot])
        plgpu.barrier_wait(v_full.at[v_slot])
        s, dp = wgmma.start_products((None, q, key), (None, do, value))
        (s,) = wgmma.wait(1, s)
        p, derivative = softmax(problem, s, lambda: spread(lse), partial(visible, j, view))
        (dp,) = wgmma.wait(0, dp)
        plgpu.barrier_arrive(v_consumed.at[v_slot])
        ds = p * (dp - spread(delta))
        ds = (ds if derivative is None else ds * derivative).astype(problem.dtype)
        (acc,) = wgmma.wait(0, *wgmma.start_products((acc, ds, key)))
        plgpu.barrier_arrive(k_consumed.at[k_slot])
        return acc

    acc = plgpu.layout_cast(jnp.zeros((ROWS, problem.H), jnp.float32), TILE)
    return visits.fold(first_view, partial(_enter, visits, bounds_in), step, acc)


def _load_keys(problem, visits, b, kv_head, kv, k_slots, v_slots, *, k_full, k_consumed, v_full, v_consumed):
    block = problem.config.block_kv_dq
    rings = (
        (problem.key_at, k_slots, k_full, k_consumed),
        (problem.value_at, v_slots, v_full, v_consumed),
    )

    def load(t, j, visit, _):
        segment = visit[1]
        keys = pl.ds(j * block, block)
        for count, (at, slots, full, consumed) in zip(problem.config.slots_of_dq, rings, strict=True):
            slot = ring_slot(t, count)

            @pl.when(t >= count)
            def _(slot=slot, consumed=consumed):
                plgpu.barrier_wait(consumed.at[slot])

            row = b if segment is None else segment * problem.B + b
            plgpu.copy_gmem_to_smem(kv.at[at(row, keys, kv_head)], slots.at[slot], full.at[slot])

    visits.fold(visits[0], visits.__getitem__, load, None)
    for count, consumed in zip(problem.config.slots_of_dq, (k_consumed, v_consumed), strict=True):
        drain(visits.total, count, consumed)
