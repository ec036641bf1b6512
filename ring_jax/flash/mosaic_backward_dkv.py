"""The dkv kernel of the Hopper backward: see `mosaic_hopper_backward`."""

from functools import partial

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax.flash import mosaic_compat as compat
from ring_jax.flash import mosaic_wgmma
from ring_jax.flash.mosaic_backward_common import (
    COL,
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
    splits_by_role,
    store,
)


def dkv(problem, query, kv, dout, stats, bounds, table):
    H, Hv, config = problem.H, problem.Hv, problem.config
    by_role = splits_by_role(H, Hv)
    rows = ROWS if by_role else WGS * ROWS
    tiles, block, stages = table.shape[1], config.block_q_dkv, config.stages
    scratch = dict(
        k_smem=compat.tiled_smem((rows // ROWS, ROWS, H), problem.dtype),
        v_smem=compat.tiled_smem((rows // ROWS, ROWS, Hv), problem.dtype),
        q_smem=compat.tiled_smem((stages, block, H), problem.dtype),
        do_smem=compat.tiled_smem((stages, block, Hv), problem.dtype),
        stats_smem=plgpu.SMEM((stages, 2, block), jnp.float32),
        bounds_smem=plgpu.SMEM((stages, 2, block), jnp.int32),
        staging=compat.tiled_smem((WGS, ROWS, STAGE_COLUMNS), jnp.float32),
        kv_full=plgpu.Barrier(num_arrivals=2 * (rows // ROWS)),
        q_full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        do_full=plgpu.Barrier(num_barriers=stages),
        q_consumed=plgpu.Barrier(num_arrivals=WGS, num_barriers=stages),
        do_consumed=plgpu.Barrier(num_arrivals=WGS, num_barriers=stages),
    )
    if by_role:
        scratch |= dict(
            p_smem=compat.tiled_smem((2, ROWS, block), problem.dtype),
            p_full=plgpu.Barrier(num_barriers=2),
            p_consumed=plgpu.Barrier(num_barriers=2),
        )
    call = compat.kernel(
        partial(_body, problem, tiles),
        name="flash_backward_dkv",
        out_type=compat.output_like(kv.shape, jnp.float32, query, kv, dout, stats, bounds),
        scratch=scratch,
        grid=(problem.K * problem.B * tiles,),
        grid_names=("program",),
        num_threads=WGS + 1,
        thread_name="wg",
    )
    return call(query, kv, dout, stats, bounds, table)


def _body(problem, tiles, query, kv, dout, stats, bounds, table, dkv_ref, *, kv_full, **scratch):
    by_role = splits_by_role(problem.H, problem.Hv)
    wg = lax.axis_index("wg")
    b, head, tile = program(problem, problem.K, tiles, descending=False)
    span = tuple(table[b, tile, i] for i in range(4))
    pieces = 1 if by_role else WGS
    first_row = tile * (pieces * ROWS)

    if by_role:
        for role, body in enumerate((_dv_role, _dk_role)):
            at = (problem.value_at, problem.key_at)[role]

            @pl.when(wg == role)
            def _(body=body, role=role, at=at):
                plgpu.set_max_registers(232, action="increase")
                plgpu.barrier_wait(kv_full)
                body(problem, span, first_row, target(dkv_ref, at, b, first_row, head), **scratch)
    else:

        @pl.when(wg < WGS)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            plgpu.barrier_wait(kv_full)
            row = first_row + wg * ROWS
            dk, dv = (target(dkv_ref, at, b, row, head) for at in (problem.key_at, problem.value_at))
            rows_of_keys(problem, span, wg, row, dk, dv, **scratch)

    @pl.when(wg == WGS)
    def _memory():
        plgpu.set_max_registers(40, action="decrease")
        load_keys(problem, kv, b, head, first_row, pieces, kv_full, **scratch)
        total = problem.G * (span[1] - span[0])
        stages = problem.config.stages
        load = partial(load_query, problem, span, b, head, query, dout, stats, bounds, **scratch)
        pl.loop(0, lax.min(total, stages))(lambda t: load(t, wait=False))
        pl.loop(0, lax.max(total - stages, 0))(lambda t: load(t + stages, wait=True))
        drain(total, stages, scratch["q_consumed"], scratch["do_consumed"])


def target(dkv_ref, at, b, row, head):
    """Where a range of columns of 64 rows of dK or dV goes."""
    b, rows, head, columns_all = at(b, pl.ds(row, ROWS), head)
    return lambda columns: dkv_ref.at[b, rows, head, pl.ds(columns_all.start + columns.start, columns.size)]


def load_keys(problem, kv, b, head, first_row, pieces, kv_full, *, k_smem, v_smem, **_):
    """The program's own K and V tile."""
    for piece in range(pieces):
        rows = pl.ds(first_row + piece * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(kv.at[problem.key_at(b, rows, head)], k_smem.at[piece], kv_full)
        plgpu.copy_gmem_to_smem(kv.at[problem.value_at(b, rows, head)], v_smem.at[piece], kv_full)


def query_of(problem, span, head, t):
    """Rows and head of step t, which counts the query tiles [first, last) of each query head of the group."""
    first, last = span[:2]
    g = lax.div(t, last - first)
    block = problem.config.block_q_dkv
    return pl.ds((first + t - g * (last - first)) * block, block), head * problem.G + g


def load_query(problem, span, b, head, query, dout, stats, bounds, t, *, wait, q_smem, do_smem, stats_smem, bounds_smem,
                q_full, do_full, q_consumed, do_consumed, **_):  # fmt: skip
    """Starts the loads of step t, if `wait` once its buffers are free."""
    slot = ring_slot(t, problem.config.stages)
    rows, q_head = query_of(problem, span, head, t)
    if wait:
        plgpu.barrier_wait(q_consumed.at[slot])
    plgpu.copy_gmem_to_smem(query.at[b, rows, q_head], q_smem.at[slot], q_full.at[slot])
    plgpu.copy_gmem_to_smem(stats.at[b, q_head, :, rows], stats_smem.at[slot], q_full.at[slot])
    plgpu.copy_gmem_to_smem(bounds.at[b, :, rows], bounds_smem.at[slot], q_full.at[slot])
    if wait:
        plgpu.barrier_wait(do_consumed.at[slot])
    plgpu.copy_gmem_to_smem(dout.at[b, rows, q_head], do_smem.at[slot], do_full.at[slot])


def _walk_queries(problem, span, body, *accumulators):
    """body(t, query tile) for each query tile of each query head of the group; t counts on."""
    first, last = span[:2]
    count = last - first

    def per_head(g):
        loop(first, last, lambda i: body(g * count + i - first, i), *accumulators)

    loop(0, problem.G, per_head, *accumulators)


def _visible_keys(span, i, first_key, shape, bounds):
    """Masks P^T [keys, queries] where query tile i needs it."""

    def apply(p):
        keys = first_key + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=TILE)
        start, end = (lax.broadcast_in_dim(compat.load(bounds.at[x], COL), shape, [1]) for x in range(2))
        return masked(p, keys, start, end)

    return lambda p: lax.cond((i < span[2]) | (i >= span[3]), lambda: apply(p), lambda: p)


def rows_of_keys(problem, span, wg, row, dk_target, dv_target, *, k_smem, v_smem, q_smem, do_smem, stats_smem, bounds_smem,
              staging, q_full, do_full, q_consumed, do_consumed, hand_over=None):  # fmt: skip
    """dK and dV of 64 keys in one warpgroup; `hand_over(t, ds)` gets each dS^T [keys, queries], rounded."""
    stages = problem.config.stages
    shape = (ROWS, problem.config.block_q_dkv)
    key, value = k_smem.at[wg], v_smem.at[wg]

    def load(ref):
        return compat.load(ref, COL)

    def spread(row):
        return lax.broadcast_in_dim(row, shape, [1])

    def walk(dk_acc, dv_acc):
        def step(t, i):
            slot = ring_slot(t, stages)
            q, do = q_smem.at[slot], do_smem.at[slot]
            lse, delta = (stats_smem.at[slot, i] for i in range(2))

            def probabilities_of(s, lse):
                """P for the product, the same in float32 (to hold the unrounded form too would spill), the cap's derivative."""
                visible = _visible_keys(span, i, row, shape, bounds_smem.at[slot])
                p, derivative = softmax(problem, s, spread(lse), visible)
                return *mosaic_wgmma.rounded(p, problem.dtype), derivative

            def start_s(s_acc):
                plgpu.barrier_wait(q_full.at[slot])
                product(s_acc, key, q, rhs_transposed=True)
                # Loaded while the product runs, not after it.
                return load(lse)

            def start_dp(dp_acc):
                plgpu.barrier_wait(do_full.at[slot])
                product(dp_acc, value, do, rhs_transposed=True)

            def finish(p, wide_p, derivative, dp_acc):
                product(dv_acc, p, do)
                row = load(delta)
                ds = wide_p * (read(dp_acc, in_flight=1) - spread(row))
                return (ds if derivative is None else ds * derivative).astype(problem.dtype)

            if problem.config.overlap and hand_over is None:  # the fused form lacks the registers

                def gradients(s_acc, dp_acc):
                    row = start_s(s_acc)
                    start_dp(dp_acc)
                    return finish(*probabilities_of(read(s_acc, in_flight=1), row), dp_acc)

                ds = accumulate(gradients, shape, shape)
            else:

                def probabilities(s_acc):
                    row = start_s(s_acc)
                    return probabilities_of(read(s_acc), row)

                p, wide_p, derivative = accumulate(probabilities, shape)

                def gradients(dp_acc):
                    start_dp(dp_acc)
                    return finish(p, wide_p, derivative, dp_acc)

                ds = accumulate(gradients, shape)
            if hand_over is not None:
                hand_over(t, ds)
            product(dk_acc, ds, q)
            read(dv_acc, in_flight=1)
            plgpu.barrier_arrive(do_consumed.at[slot])
            read(dk_acc)
            plgpu.barrier_arrive(q_consumed.at[slot])

        _walk_queries(problem, span, step, dk_acc, dv_acc)
        store(dk_acc, problem.scale, staging.at[wg], dk_target)
        store(dv_acc, 1.0, staging.at[wg], dv_target)

    accumulate(walk, (ROWS, problem.H), (ROWS, problem.Hv))


def _dv_role(problem, span, row, target, *, k_smem, q_smem, do_smem, stats_smem, bounds_smem, p_smem, staging,
             q_full, do_full, q_consumed, do_consumed, p_full, p_consumed, **_):  # fmt: skip
    """S^T, P^T (handed to the other warpgroup) and dV of 64 keys."""
    stages = problem.config.stages
    shape = (ROWS, problem.config.block_q_dkv)

    def walk(dv_acc):
        def step(t, i):
            slot, p_slot = ring_slot(t, stages), ring_slot(t, 2)

            def probabilities(s_acc):
                plgpu.barrier_wait(q_full.at[slot])
                product(s_acc, k_smem.at[0], q_smem.at[slot], rhs_transposed=True)
                lse = lax.broadcast_in_dim(compat.load(stats_smem.at[slot, 0], COL), shape, [1])
                visible = _visible_keys(span, i, row, shape, bounds_smem.at[slot])
                p, derivative = softmax(problem, read(s_acc), lse, visible)
                return p, p if derivative is None else p * derivative

            p, p_for_ds = accumulate(probabilities, shape)
            plgpu.barrier_arrive(q_consumed.at[slot])
            p = p.astype(problem.dtype)

            @pl.when(t >= 2)
            def _():
                plgpu.barrier_wait(p_consumed.at[p_slot])

            p_smem.at[p_slot][...] = p_for_ds.astype(problem.dtype)
            plgpu.barrier_arrive(p_full.at[p_slot])
            plgpu.barrier_wait(do_full.at[slot])
            product(dv_acc, p, do_smem.at[slot])
            read(dv_acc)
            plgpu.barrier_arrive(do_consumed.at[slot])

        _walk_queries(problem, span, step, dv_acc)
        drain(problem.G * (span[1] - span[0]), 2, p_consumed)
        store(dv_acc, 1.0, staging.at[0], target)

    accumulate(walk, (ROWS, problem.Hv))


def _dk_role(problem, span, row, target, *, v_smem, q_smem, do_smem, stats_smem, p_smem, staging,
             q_full, do_full, q_consumed, do_consumed, p_full, p_consumed, **_):  # fmt: skip
    """dP^T, dS^T and dK of the same 64 keys."""
    stages = problem.config.stages
    shape = (ROWS, problem.config.block_q_dkv)

    def walk(dk_acc):
        def step(t, i):
            slot, p_slot = ring_slot(t, stages), ring_slot(t, 2)

            def gradients(dp_acc):
                plgpu.barrier_wait(do_full.at[slot])
                product(dp_acc, v_smem.at[0], do_smem.at[slot], rhs_transposed=True)
                plgpu.barrier_wait(q_full.at[slot])
                delta = lax.broadcast_in_dim(compat.load(stats_smem.at[slot, 1], COL), shape, [1])
                plgpu.barrier_wait(p_full.at[p_slot])
                p = compat.load(p_smem.at[p_slot], TILE)
                plgpu.barrier_arrive(p_consumed.at[p_slot])
                dp = read(dp_acc)
                plgpu.barrier_arrive(do_consumed.at[slot])
                return p.astype(jnp.float32) * (dp - delta)

            ds = accumulate(gradients, shape)
            product(dk_acc, ds.astype(problem.dtype), q_smem.at[slot])
            read(dk_acc)
            plgpu.barrier_arrive(q_consumed.at[slot])

        _walk_queries(problem, span, step, dk_acc)
        store(dk_acc, problem.scale, staging.at[1], target)

    accumulate(walk, (ROWS, problem.H))
