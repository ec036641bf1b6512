"""The fused Hopper backward: one kernel, five matrix products, dQ added up in global memory.

Algorithm: FlashAttention-3 (arXiv 2407.08608), appendix B.1. It is the dkv kernel of `backward_launch`, except that
the two compute warpgroups also leave dS^T in shared memory, and the third warpgroup, which feeds shared memory, turns it
into dQ += dS K of the query tile and adds that to dq in global memory by TMA reduction. Float32 additions from different
programs arrive in any order, so dq does not repeat bit by bit; nor do dK and dV of more than two programs (`_split`).

dq enters as what there is to add to (`in_place`): zeros, or the sum over a ring's hops so far.
"""

import itertools
from functools import partial

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax.flash.hopper.backward_common import ROWS, STAGE_COLUMNS, WGS, program, span_of
from ring_jax.flash.hopper.backward_dkv import load_keys, load_query, query_of, rows_of_keys, target
from ring_jax.mosaic import compat, in_place

_COLUMNS = 64  # of dQ at a time: all of them would take registers that dK and dV need


def _compute_registers(config) -> int:
    """Of each of the two compute warpgroups: what the pool of 168 registers a thread, in three warpgroups, leaves."""
    return (3 * 168 - config.feed_registers) // 16 * 8


def unsupported_reason(H: int, Hv: int, block_q: int) -> str | None:
    """Why the fused form cannot run, or None."""
    if H + Hv > 256:
        return f"dK and dV of head sizes {H} and {Hv} do not fit the registers beside dQ"
    if block_q % ROWS:
        return f"needs block_q_dkv = {ROWS} or {2 * ROWS}, got {block_q}"
    if compat.interpreting():
        return "TMA reductions have no interpreter"
    if not in_place.AVAILABLE:
        return "needs Refs as kernel arguments, jax 0.11 or later"
    return None


def fused(problem, query, kv, dout, stats, bounds, table, dq, into=None):
    """(dq, dkv) as `backward_launch` has them before it cuts off padding; adds to `dq`, and to `into` as `dkv` does."""
    H, Hv, stages = problem.H, problem.Hv, problem.config.stages
    block, halves = problem.config.block_q_dkv, problem.config.block_q_dkv // ROWS
    tiles = table.shape[1]
    operands = query, kv, dout, stats, bounds, table
    outputs = (compat.output_like(kv.shape, jnp.float32, *operands[:5]),) if into is None else ()
    call = compat.kernel(
        partial(_body, problem, tiles),
        name="flash_backward_fused",
        out_type=outputs,
        scratch=dict(
            k_smem=compat.tiled_smem((WGS, ROWS, H), problem.dtype),
            v_smem=compat.tiled_smem((WGS, ROWS, Hv), problem.dtype),
            q_smem=compat.tiled_smem((stages, block, H), problem.dtype),
            do_smem=compat.tiled_smem((stages, block, Hv), problem.dtype),
            stats_smem=plgpu.SMEM((stages, 2, block), jnp.float32),
            bounds_smem=plgpu.SMEM((stages, 2, block), jnp.int32),
            staging=compat.tiled_smem((WGS, ROWS, STAGE_COLUMNS), jnp.float32),
            kv_full=plgpu.Barrier(num_arrivals=2 * WGS),
            q_full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            do_full=plgpu.Barrier(num_barriers=stages),
            q_consumed=plgpu.Barrier(num_arrivals=WGS, num_barriers=stages),
            do_consumed=plgpu.Barrier(num_arrivals=WGS, num_barriers=stages),
            ds_smem=compat.tiled_smem((2, WGS, halves, ROWS, ROWS), problem.dtype),
            dq_smem=compat.tiled_smem((halves, H // _COLUMNS, ROWS, _COLUMNS), jnp.float32),
            ds_full=plgpu.Barrier(num_arrivals=WGS, num_barriers=2),
            ds_consumed=plgpu.Barrier(num_barriers=2),
        ),
        grid=(problem.K * problem.split * problem.segments * problem.B * tiles,),
        grid_names=("program",),
        num_threads=WGS + 1,
        thread_name="wg",
    )
    if into is None:
        dkv, dq = in_place.update(call, outputs, operands, (dq,))
        return dq, dkv
    return tuple(in_place.update(call, outputs, operands, (dq, into)))


def _body(
    problem,
    tiles,
    query,
    kv,
    dout,
    stats,
    bounds,
    table,
    dq,
    dkv,
    *,
    kv_full,
    ds_smem,
    dq_smem,
    ds_full,
    ds_consumed,
    **scratch,
):
    wg = lax.axis_index("wg")
    b, head, tile = program(problem.segments * problem.B, problem.K * problem.split, tiles, descending=False)
    kv_head = problem.kv_head(head)
    span = span_of(table, b, tile)
    first_row = tile * (WGS * ROWS)
    compute, feed = problem.roles(wg, span)

    @pl.when(compute)
    def _compute():
        plgpu.set_max_registers(_compute_registers(problem.config), action="increase")
        plgpu.barrier_wait(kv_full)
        row = first_row + wg * ROWS
        dk, dv = (target(dkv, at, b, row, kv_head) for at in (problem.key_at, problem.value_at))

        def hand_over(t, ds):
            buffer = lax.rem(t, 2)

            @pl.when(t >= 2)
            def _():
                plgpu.barrier_wait(ds_consumed.at[buffer])

            for half in range(ds_smem.shape[2]):
                ds_smem.at[buffer, wg, half][...] = lax.slice(ds, (0, half * ROWS), (ROWS, (half + 1) * ROWS))
            plgpu.commit_smem()
            plgpu.barrier_arrive(ds_full.at[buffer])

        rows_of_keys(problem, span, wg, row, dk, dv, hand_over=hand_over, **scratch)

    @pl.when(feed)
    def _feed():
        plgpu.set_max_registers(problem.config.feed_registers, action="decrease")
        load_keys(problem, kv, b, kv_head, first_row, WGS, kv_full, **scratch)
        operands = (problem, span, b, head, query, dout, stats, bounds)
        total = problem.share * (span[1] - span[0])

        @pl.loop(0, lax.min(total, problem.config.stages))
        def _(t):
            load_query(*operands, t, wait=False, **scratch)

        def load_next(t):
            @pl.when(t < total)
            def _():
                load_query(*operands, t, wait=True, **scratch)

        @pl.loop(0, total)
        def _(t):
            buffer = lax.rem(t, 2)
            plgpu.barrier_wait(ds_full.at[buffer])

            rows, q_head = query_of(problem, span, head, t)
            pieces = list(itertools.product(*map(range, dq_smem.shape[:2])))
            for half, piece in pieces:
                columns = pl.ds(piece * _COLUMNS, _COLUMNS)

                def product(acc, half=half, columns=columns):
                    for keys in range(WGS):
                        plgpu.wgmma(
                            acc,
                            ds_smem.at[buffer, keys, half].transpose((1, 0)),
                            scratch["k_smem"].at[keys, :, columns],
                        )
                    return acc[...]

                tile_dq = pl.run_scoped(product, plgpu.ACC((ROWS, _COLUMNS), jnp.float32)) * problem.options.scale
                if (half, piece) == pieces[-1]:
                    plgpu.barrier_arrive(ds_consumed.at[buffer])
                    load_next(t + problem.config.stages)
                # This piece's buffer is free once its addition of the last step has been read.
                plgpu.wait_smem_to_gmem(len(pieces) - 1, wait_read_only=True)
                dq_smem.at[half, piece][...] = tile_dq
                plgpu.commit_smem()
                target_dq = dq.at[problem.query_batch(b), pl.ds(rows.start + half * ROWS, ROWS), q_head, columns]
                plgpu.copy_smem_to_gmem(dq_smem.at[half, piece], target_dq, reduction_op="add")

        plgpu.wait_smem_to_gmem(0)
