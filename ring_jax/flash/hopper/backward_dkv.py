"""The dkv kernel of the Hopper backward: see `backward_launch`."""

from functools import partial

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax.flash.hopper.backward_common import (
    COL,
    ROWS,
    STAGE_COLUMNS,
    TILE,
    WGS,
    Value,
    accumulate,
    drain,
    keys_of_a_program,
    loop,
    masked,
    product,
    program,
    read,
    softmax,
    span_of,
    splits_by_role,
    store,
)
from ring_jax.flash.hopper.config import REGISTERS
from ring_jax.mosaic import compat, in_place, wgmma
from ring_jax.mosaic.pipeline import ring_slot


def dkv(problem, query, kv, dout, stats, bounds, table, into=None):
    """dkv, added to `into` in its own buffer where that is given: it must be where programs share a KV tile."""
    H, Hv, config = problem.H, problem.Hv, problem.config
    by_role = splits_by_role(H, Hv)
    rows = keys_of_a_program(H, Hv)
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
    operands = query, kv, dout, stats, bounds, table
    output = compat.output_like(kv.shape, jnp.float32, *operands[:5])
    call = compat.kernel(
        partial(_body, problem, tiles),
        name="flash_backward_dkv",
        out_type=(output,) if into is None else (),
        scratch=scratch,
        grid=(problem.K * problem.split * problem.segments * problem.B * tiles,),
        grid_names=("program",),
        num_threads=WGS + 1,
        thread_name="wg",
    )
    return (call(*operands) if into is None else in_place.update(call, (), operands, (into,)))[0]


def _body(problem, tiles, query, kv, dout, stats, bounds, table, dkv_ref, *, kv_full, **scratch):
    by_role = splits_by_role(problem.H, problem.Hv)
    wg = lax.axis_index("wg")
    b, head, tile = program(problem.segments * problem.B, problem.K * problem.split, tiles, descending=False)
    kv_head = problem.kv_head(head)
    span = span_of(table, b, tile)
    pieces = 1 if by_role else WGS
    first_row = tile * (pieces * ROWS)
    compute, feed = problem.roles(wg, span)

    if by_role:
        for role, body in enumerate((_dv_role, _dk_role)):
            at = (problem.value_at, problem.key_at)[role]

            @pl.when(compute & (wg == role))
            def _(body=body, role=role, at=at):
                plgpu.set_max_registers(232, action="increase")
                plgpu.barrier_wait(kv_full)
                body(problem, span, first_row, target(dkv_ref, at, b, first_row, kv_head), **scratch)
    else:

        @pl.when(compute)
        def _compute():
            plgpu.set_max_registers(REGISTERS[WGS][0], action="increase")
            plgpu.barrier_wait(kv_full)
            row = first_row + wg * ROWS
            dk, dv = (target(dkv_ref, at, b, row, kv_head) for at in (problem.key_at, problem.value_at))
            rows_of_keys(problem, span, wg, row, dk, dv, **scratch)

    @pl.when(feed)
    def _memory():
        plgpu.set_max_registers(REGISTERS[WGS][1], action="decrease")
        load_keys(problem, kv, b, kv_head, first_row, pieces, kv_full, **scratch)
        total = problem.share * (span[1] - span[0])
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
    """Rows and head of step t, which counts the query tiles [first, last) of each query head of the program."""
    first, last = span[:2]
    g = lax.div(t, last - first)
    block = problem.config.block_q_dkv
    return pl.ds((first + t - g * (last - first)) * block, block), problem.first_head + head * problem.share + g


def load_query(problem, span, b, head, query, dout, stats, bounds, t, *, wait, q_smem, do_smem, stats_smem, bounds_smem,
                q_full, do_full, q_consumed, do_consumed, **_):  # fmt: skip
    """Starts the loads of step t, if `wait` once its buffers are free."""
    slot = ring_slot(t, problem.config.stages)
    rows, q_head = query_of(problem, span, head, t)
    q_b = problem.query_batch(b)
    if wait:
        plgpu.barrier_wait(q_consumed.at[slot])
    plgpu.copy_gmem_to_smem(query.at[q_b, rows, q_head], q_smem.at[slot], q_full.at[slot])
    plgpu.copy_gmem_to_smem(stats.at[q_b, q_head, :, rows], stats_smem.at[slot], q_full.at[slot])
    plgpu.copy_gmem_to_smem(bounds.at[b, :, rows], bounds_smem.at[slot], q_full.at[slot])
    if wait:
        plgpu.barrier_wait(do_consumed.at[slot])
    plgpu.copy_gmem_to_smem(dout.at[q_b, rows, q_head], do_smem.at[slot], do_full.at[slot])


def _walk_queries(problem, span, body, *accumulators):
    """body(t, query tile) for each query tile of each query head of the program; t counts on."""
    first, last = span[:2]
    count = last - first

    def per_head(g):
        loop(first, last, lambda i: body(g * count + i - first, i), *accumulators)

    loop(0, problem.share, per_head, *accumulators)


def _fold_queries(problem, span, body, begin, state):
    """state = body(t, query tile, state) for each query tile of each query head of the program, from step `begin` on."""
    first, last = span[:2]
    total = problem.share * (last - first)

    def following(i):  # after the last one, the first of the next head
        return jnp.where(i + 1 == last, first, i + 1)

    def step(n, carry):
        i, state = carry
        state = body(begin + n, i, state)
        return following(i), state

    # From 0, since the bounds may vary over a manual mesh axis and the loop's own counter does not.
    return lax.fori_loop(0, total - begin, step, (following(first - 1 + begin), state))[1]


def _visible_keys(span, i, first_key, shape, bounds):
    """Masks P^T [keys, queries] where query tile i needs it."""

    def apply(x, hidden):
        keys = first_key + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=TILE)
        start, end = (lax.broadcast_in_dim(compat.load(bounds.at[x], COL), shape, [1]) for x in range(2))
        return masked(x, keys, start, end, hidden)

    return lambda x, hidden: lax.cond((i < span[2]) | (i >= span[3]), lambda: apply(x, hidden), lambda: x)


def rows_of_keys(problem, span, wg, row, dk_target, dv_target, *, k_smem, v_smem, q_smem, do_smem, stats_smem, bounds_smem,
              staging, q_full, do_full, q_consumed, do_consumed, hand_over=None):  # fmt: skip
    """dK and dV of 64 keys in one warpgroup; `hand_over(t, ds)` gets each dS^T [keys, queries], rounded."""
    config = problem.config
    stages = config.stages
    shape = (ROWS, config.block_q_dkv)
    first, last = span[:2]
    total = problem.share * (last - first)
    key, value = k_smem.at[wg], v_smem.at[wg]
    overlap = config.overlap and hand_over is None  # the fused form lacks the registers

    def buffers(t):
        slot = ring_slot(t, stages)
        return slot, q_smem.at[slot], do_smem.at[slot]

    def spread(ref):
        return lax.broadcast_in_dim(ref, shape, [1])

    def probabilities(i, slot, s, lse):
        """P and the derivative of the soft cap (or None)."""
        visible = _visible_keys(span, i, row, shape, bounds_smem.at[slot])
        if not config.mask_first:
            return softmax(problem, s, lambda: spread(lse), visible)
        # Loaded after the mask, which takes registers, too.
        return softmax(problem, s, lambda: spread(lse_of(slot)), visible, mask_first=True)

    def gradient(p, dp, delta, derivative):
        ds = p * (dp - spread(delta))
        return ds if derivative is None else ds * derivative

    def lse_of(slot):  # loaded while a product runs, like delta
        return compat.load(stats_smem.at[slot, 0], COL)

    def delta_of(slot):
        return compat.load(stats_smem.at[slot, 1], COL)

    def release(t):
        plgpu.barrier_arrive(do_consumed.at[ring_slot(t, stages)])
        plgpu.barrier_arrive(q_consumed.at[ring_slot(t, stages)])

    def tiles(t, i, previous=()):
        """P and dS of step t, then dV and dK with those of the step before: their products run during the softmax."""
        slot, q, do = buffers(t)
        plgpu.barrier_wait(q_full.at[slot])
        plgpu.barrier_wait(do_full.at[slot])
        s, dp, *sums = wgmma.start_products((None, key, q), (None, value, do), *previous)
        lse = None if config.mask_first else lse_of(slot)
        (s,) = wgmma.wait(1 + len(sums), s)
        p, derivative = probabilities(i, slot, s, lse)
        delta = delta_of(slot)
        (dp,) = wgmma.wait(len(sums), dp)
        ds = gradient(p, dp, delta, derivative)
        # Rounded, they take the registers that the products of the last ones read.
        *sums, p, ds = wgmma.wait(0, *sums, p, ds)
        p, ds = p.astype(problem.dtype), ds.astype(problem.dtype)
        if hand_over is not None:
            hand_over(t, ds)
        return *sums, p, ds

    def sums_of(t, dv, dk, p, ds):
        _, q, do = buffers(t)
        return (dv, p, do), (dk, ds, q)

    def pipelined(t, i, state):
        state = tiles(t, i, sums_of(t - 1, *state))
        release(t - 1)
        return state

    def in_turn(t, i, state):
        dv, dk = state
        slot, q, do = buffers(t)
        plgpu.barrier_wait(q_full.at[slot])
        lse = None if config.mask_first else lse_of(slot)
        if overlap:
            plgpu.barrier_wait(do_full.at[slot])
            s, dp = wgmma.start_products((None, key, q), (None, value, do))
            (s,) = wgmma.wait(1, s)
        else:
            (s,) = wgmma.wait(0, *wgmma.start_products((None, key, q)))
        p, derivative = probabilities(i, slot, s, lse)
        # To hold the unrounded form, too, would spill.
        p, wide_p = wgmma.rounded(p, problem.dtype)
        if not overlap:
            plgpu.barrier_wait(do_full.at[slot])
            (dp,) = wgmma.start_products((None, value, do))
        (dv,) = wgmma.start_products((dv, p, do))
        delta = delta_of(slot)
        (dp,) = wgmma.wait(1, dp)
        ds = gradient(wide_p, dp, delta, derivative).astype(problem.dtype)
        if hand_over is not None:
            hand_over(t, ds)
        (dk,) = wgmma.start_products((dk, ds, q))
        (dv,) = wgmma.wait(1, dv)
        plgpu.barrier_arrive(do_consumed.at[slot])
        (dk,) = wgmma.wait(0, dk)
        plgpu.barrier_arrive(q_consumed.at[slot])
        return dv, dk

    def pipeline(dv, dk):
        state = _fold_queries(problem, span, pipelined, 1, (dv, dk, *tiles(0, first)))
        sums = wgmma.wait(0, *wgmma.start_products(*sums_of(total - 1, *state)))
        release(total - 1)
        return sums

    zeros = (plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), TILE) for width in (problem.Hv, problem.H))
    if config.pipeline_dkv:
        dv, dk = lax.cond(total > 0, pipeline, lambda *x: x, *zeros)
    else:
        dv, dk = _fold_queries(problem, span, in_turn, 0, tuple(zeros))
    store(Value(dk), problem.options.scale, staging.at[wg], dk_target, add=problem.split > 1)
    store(Value(dv), 1.0, staging.at[wg], dv_target, add=problem.split > 1)


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
                p, derivative = softmax(problem, read(s_acc), lambda: lse, visible)
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
        drain(problem.share * (span[1] - span[0]), 2, p_consumed)
        store(dv_acc, 1.0, staging.at[0], target, add=problem.split > 1)

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
        store(dk_acc, problem.options.scale, staging.at[1], target, add=problem.split > 1)

    accumulate(walk, (ROWS, problem.H))
