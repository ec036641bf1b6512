"""The dq kernel of the Hopper backward: see `mosaic_hopper_backward`."""

from functools import partial

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax.flash import mosaic_compat as compat
from ring_jax.flash.mosaic_backward_common import (
    ROW,
    ROWS,
    STAGE_COLUMNS,
    TILE,
    WGS,
    accumulate,
    drain,
    loop,
    masked,
    product,
    program,
    read,
    ring_slot,
    softmax,
    store,
)


def dq(problem, query, kv, dout, stats, bounds, table):
    H, Hv, config = problem.H, problem.Hv, problem.config
    tiles = table.shape[1]
    if H == Hv:
        slots = (compat.tiled_smem((config.slots, config.block_kv_dq, H), problem.dtype),)
    else:
        slots = tuple(
            compat.tiled_smem((config.slots // 2, config.block_kv_dq, width), problem.dtype) for width in (H, Hv)
        )
    staging = compat.tiled_smem((WGS, ROWS, STAGE_COLUMNS), jnp.float32)
    call = compat.kernel(
        partial(_body, problem, tiles),
        name="flash_backward_dq",
        out_type=compat.output_like((problem.B, problem.T, problem.N, H), jnp.float32, query, kv, dout, stats, bounds),
        scratch=dict(
            q_smem=compat.tiled_smem((WGS, ROWS, H), problem.dtype),
            do_smem=compat.tiled_smem((WGS, ROWS, Hv), problem.dtype),
            # The epilogue's staging reuses the KV slots.
            slots=plgpu.RefUnion(slots, staging),
            rows_full=plgpu.Barrier(num_arrivals=2, num_barriers=WGS),
            full=plgpu.Barrier(num_barriers=config.slots),
            consumed=plgpu.Barrier(num_arrivals=WGS, num_barriers=config.slots),
            done=plgpu.Barrier(num_arrivals=WGS),
        ),
        grid=(problem.N * problem.B * tiles,),
        grid_names=("program",),
        num_threads=WGS + 1,
        thread_name="wg",
    )
    return call(query, kv, dout, stats, bounds, table)


def _slot(slots, slot, i):
    """Buffer `slot` of the ring in which K (i = 0) and V (i = 1) alternate."""
    return slots[0].at[slot] if len(slots) == 1 else slots[i].at[lax.div(slot, 2)]


def _body(problem, tiles, query, kv, dout, stats, bounds, table, dq_ref, *,
          q_smem, do_smem, slots, rows_full, full, consumed, done):  # fmt: skip
    config = problem.config
    block = config.block_kv_dq
    wg = lax.axis_index("wg")
    b, head, tile = program(problem, problem.N, tiles, descending=True)
    first, last, u, v = (table[b, tile, i] for i in range(4))
    slots, staging = slots

    @pl.when(wg < WGS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        rows = pl.ds(tile * (WGS * ROWS) + wg * ROWS, ROWS)
        q, do = q_smem.at[wg], do_smem.at[wg]
        plgpu.copy_gmem_to_smem(query.at[b, rows, head], q, rows_full.at[wg])
        plgpu.copy_gmem_to_smem(dout.at[b, rows, head], do, rows_full.at[wg])
        lse, delta = (compat.load(stats.at[b, head, i, rows], ROW) for i in range(2))
        start, end = (compat.load(bounds.at[b, i, rows], ROW) for i in range(2))
        plgpu.barrier_wait(rows_full.at[wg])
        shape = (ROWS, block)

        def spread(x):
            return lax.broadcast_in_dim(x, shape, [0])

        def walk(dq_acc):
            def step(j):
                item = 2 * (j - first)
                k_slot, v_slot = ring_slot(item, config.slots), ring_slot(item + 1, config.slots)
                key, value = _slot(slots, k_slot, 0), _slot(slots, v_slot, 1)

                def visible(p):
                    keys = j * block + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=TILE)
                    return lax.cond((j < u) | (j >= v), lambda: masked(p, keys, spread(start), spread(end)), lambda: p)

                def scores(s_acc, dp_acc):
                    plgpu.barrier_wait(full.at[k_slot])
                    product(s_acc, q, key, rhs_transposed=True)
                    plgpu.barrier_wait(full.at[v_slot])
                    product(dp_acc, do, value, rhs_transposed=True)
                    p, derivative = softmax(problem, read(s_acc, in_flight=1), spread(lse), visible)
                    ds = p * (read(dp_acc) - spread(delta))
                    plgpu.barrier_arrive(consumed.at[v_slot])
                    return ds if derivative is None else ds * derivative

                ds = accumulate(scores, shape, shape)
                product(dq_acc, ds.astype(problem.dtype), key)
                read(dq_acc)
                plgpu.barrier_arrive(consumed.at[k_slot])

            loop(first, last, step, dq_acc)
            # The staging buffer reuses the slots, and the other warpgroup may still read them.
            plgpu.barrier_arrive(done)
            plgpu.barrier_wait(done)
            store(dq_acc, problem.scale, staging.at[wg], lambda columns: dq_ref.at[b, rows, head, columns])

        accumulate(walk, (ROWS, problem.H))

    @pl.when(wg == WGS)
    def _memory():
        plgpu.set_max_registers(40, action="decrease")
        kv_head = lax.div(head, problem.G)

        @pl.loop(0, last - first)
        def _(t):
            keys = pl.ds((first + t) * block, block)
            for i, source in enumerate((problem.key_at, problem.value_at)):
                slot = ring_slot(2 * t + i, config.slots)

                @pl.when(2 * t + i >= config.slots)
                def _(slot=slot):
                    plgpu.barrier_wait(consumed.at[slot])

                plgpu.copy_gmem_to_smem(kv.at[source(b, keys, kv_head)], _slot(slots, slot, i), full.at[slot])

        drain(2 * (last - first), config.slots, consumed)
