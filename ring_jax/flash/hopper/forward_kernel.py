"""Flash attention for Hopper GPUs (sm90), forward, in Pallas Mosaic GPU.

Algorithm: FlashAttention-3 (Shah et al., 2024, arXiv 2407.08608) on key intervals, resumable.

One thread block walks over query tiles. A *memory* warpgroup copies Q once per tile, before it knows which keys are needed, and
K, V tiles into a ring of `stages` shared-memory slots (TMA, by one of its warps); *compute* warpgroups of 64 query rows each run
the online softmax

    S = Q K^T;  m' = max(m, rowmax(S) c);  P = exp2(S c - m');  l' = l exp2(m - m') + rowsum(P)
    acc' = acc exp2(m - m') + P V,         c = scale * log2(e)

and end with out = acc / l, lse = m ln 2 + ln l. A carry starts them, or is joined at the end, whence it comes through
shared memory where there is room. The product Q K of tile i+1 is issued before P V of tile i, so that
the tensor cores work while the softmax runs; the compute warpgroups take turns at issuing (ping-pong).

Which keys: row t sees [key_start[t], key_end[t]), both monotone, so the first and the last row of a query tile bound
it. Key tiles outside [start[first], end[last]) are never loaded. Key tiles that are not inside
[start[last], end[first]) are masked and come first; the others follow and pay nothing for the mask. Keys may come in segments,
as an all-gather leaves them: then all this holds in each segment, masked tiles of all segments come first, and a segment of which
no row sees a key costs a load of its bounds. They are in `schedule`.

Names: a *step* is one key tile of one query tile. Step i uses slot i mod stages, whatever the query tile, so that slots follow
from a loop counter; every load waits for its slot to be free, and all slots are declared free at first. m starts at a
large finite number, not at -inf, so that a row whose keys are all masked has exp2(-inf - m) = 0 and never -inf - -inf; such a
row ends with l = 0.
"""

import math

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax._arrays import LOG2E
from ring_jax.flash.hopper.config import ForwardConfig
from ring_jax.flash.hopper.schedule import Problem, segment_steps_of, steps_of, work_item
from ring_jax.mosaic import compat, pipeline, wgmma
from ring_jax.mosaic.pipeline import ring_slot

_TILE = plgpu.Layout.WGMMA
_ROWS = plgpu.Layout.WGMMA.reduce(1)
_LN2 = math.log(2.0)
_NO_KEY_YET = -1e30
_LAZY_BITS = 8.0  # P then reaches 2^8, far below what float16 holds


def kernel(problem: Problem, *refs, q_smem, k_smem, v_smem, q_full, q_free, k_full, k_free, v_full, v_free, turn,
            carry_smem=None, carry_full=None, carry_free=None, out_smem=None):  # fmt: skip
    q_ref, kv_ref, start_ref, end_ref, *carry_refs, out_ref, lse_ref = refs
    if problem.in_place:
        carry_refs = [out_ref, lse_ref]
    config = problem.config
    warpgroup = lax.axis_index("warpgroup")
    block = lax.axis_index("block")
    tiles = problem.tiles_per_block

    def walk(tile_body, give_registers=lambda: None, at_once=lambda *_: None):
        """Runs at_once(batch, head, row), which needs no bounds, and tile_body(steps, batch, head, row) over this thread
        block's work items."""

        order = steps_of if problem.segments == 1 else segment_steps_of

        def steps_for(batch, head, row):
            return order(problem, start_ref, end_ref, batch, row)

        if problem.segments > 1 and tiles == 1:
            place = work_item(problem, block)
            steps = steps_for(*place)  # many loads at a time, while there are registers for them
            give_registers()  # who computes waits for these, and then frees Q's buffer
            at_once(*place)
            tile_body(steps, *place)
            return

        give_registers()

        @pl.loop(block * tiles, jnp.minimum((block + 1) * tiles, problem.items))
        def _(index):
            place = work_item(problem, index)
            at_once(*place)
            tile_body(steps_for(*place), *place)

    @pl.when(warpgroup < config.warpgroups)
    def _compute():
        plgpu.set_max_registers(config.registers[0], action="increase")
        buffers = (q_smem.at[warpgroup], k_smem, v_smem, q_full, q_free, k_full, k_free, v_full, v_free)
        take_turn, pass_turn = _turns(config, warpgroup, turn)
        pl.when(warpgroup == config.warpgroups - 1)(pass_turn)
        plgpu.barrier_arrive(q_free)
        if problem.stages_carry:
            plgpu.barrier_arrive(carry_free)
        for slot in range(config.stages):
            plgpu.barrier_arrive(k_free.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])

        def tile_body(steps, batch, head, row):
            rows = pl.ds(row + warpgroup * 64, 64)
            head += problem.first_head
            outputs = (out_ref.at[batch, rows, head], lse_ref.at[batch, rows, head])
            carry = tuple(ref.at[batch, rows, head] for ref in carry_refs)
            staged = (carry_smem.at[warpgroup], carry_full.at[warpgroup], carry_free) if problem.stages_carry else None

            def bounds(segment):
                at = (batch, rows) if segment is None else (segment + problem.first_segment, batch, rows)
                return tuple(compat.load(ref.at[at], _ROWS) for ref in (start_ref, end_ref))

            @pl.when(steps.total > 0)
            def _():
                place = None if out_smem is None else out_smem.at[warpgroup]
                _attend(problem, warpgroup, steps, bounds, carry, staged, outputs, place, buffers, take_turn, pass_turn)

            @pl.when(steps.total <= 0)
            def _():
                plgpu.barrier_wait(q_full.at[warpgroup])
                plgpu.barrier_arrive(q_free)
                _pass_through(problem, carry, outputs)

        walk(tile_body)
        if out_smem is not None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        pl.when(warpgroup == 0)(take_turn)

    @pl.when(warpgroup == config.warpgroups)
    def _memory():
        def load_query(batch, head, row):
            plgpu.barrier_wait(q_free)
            for w in range(config.warpgroups):
                rows = pl.ds(row + w * 64, 64)
                query = q_ref.at[batch, rows, head + problem.first_head]
                plgpu.copy_gmem_to_smem(query, q_smem.at[w], q_full.at[w])

        def tile_body(steps, batch, head, row):
            kv_head = lax.div(head, problem.heads // problem.kv_heads)
            head += problem.first_head
            key_at, value_at = batch, batch
            key_columns, value_columns = (), ()
            if problem.packed:
                value_at = batch + problem.batch
            else:
                key_columns = (pl.ds(0, problem.head_size),)
                value_columns = (pl.ds(problem.head_size, problem.value_size),)

            def load(step, segment, tile, at, columns, smem, full, free):
                slot = ring_slot(step, config.stages)
                if segment is not None:
                    at += (segment + problem.first_segment) * (problem.batch * (2 if problem.packed else 1))
                keys = pl.ds(tile * config.block_kv, config.block_kv)
                plgpu.barrier_wait(free.at[slot])
                plgpu.copy_gmem_to_smem(kv_ref.at[(at, keys, kv_head, *columns)], smem.at[slot], full.at[slot])

            def load_key(step, segment, tile):
                load(step, segment, tile, key_at, key_columns, k_smem, k_full, k_free)

            def load_value(step, segment, tile):
                load(step, segment, tile, value_at, value_columns, v_smem, v_full, v_free)

            pipeline.in_first_warp(lambda: steps.load(load_key, load_value))

            if problem.stages_carry:  # needed after the last step, so behind all other loads

                @pl.when(steps.total > 0)
                def _():
                    plgpu.barrier_wait(carry_free)
                    for w in range(config.warpgroups):
                        rows = pl.ds(row + w * 64, 64)
                        plgpu.copy_gmem_to_smem(carry_refs[0].at[batch, rows, head], carry_smem.at[w], carry_full.at[w])

        walk(tile_body, lambda: plgpu.set_max_registers(config.registers[1], action="decrease"), load_query)
        if compat.interpreting():
            # The interpreter wants every phase of a barrier to be seen.
            staged = (carry_free,) if problem.stages_carry else ()
            for barrier in (
                q_free,
                *staged,
                *(free.at[slot] for slot in range(config.stages) for free in (k_free, v_free)),
            ):
                plgpu.barrier_wait(barrier)


def _turns(config: ForwardConfig, warpgroup: jax.Array, turn):
    """(take, pass): the compute warpgroups issue their products one after the other."""
    following = (warpgroup + 1) % config.warpgroups
    if not config.ping_pong:
        return (lambda: None), (lambda: None)
    if compat.interpreting():
        return (lambda: plgpu.barrier_wait(turn.at[warpgroup])), (lambda: plgpu.barrier_arrive(turn.at[following]))
    return (lambda: pipeline.take_turn(warpgroup)), (lambda: pipeline.pass_turn(following))


def _across(rows: jax.Array, columns: int) -> jax.Array:
    return lax.broadcast_in_dim(rows, (rows.shape[0], columns), [0])


def _fold(x: jax.Array, combine) -> jax.Array:
    """[64, n] to [64, 8], columns 8 apart combined: what one thread holds of a row stays in that thread."""
    columns = [x[:, i : i + 8] for i in range(0, x.shape[1], 8)]
    while len(columns) > 1:
        pairs = [combine(a, b) for a, b in zip(columns[::2], columns[1::2], strict=False)]
        columns = pairs + columns[2 * len(pairs) :]
    return columns[0]


def shift(problem: Problem, scores, window, m):
    """(what exp2 makes P of, m') for these scores.

    `window()` gives [first, last) of the visible columns of each row; None where all are visible.
    """
    if problem.options.logits_soft_cap is None:
        factor = problem.options.scale * LOG2E
    else:
        # tanh(x) = 1 - 2 / (1 + e^2x): the hardware's tanh is good to 11 bits only, times the cap.
        factor = problem.options.logits_soft_cap * LOG2E
        e2x = jnp.exp2(scores * (2 * LOG2E * problem.options.scale / problem.options.logits_soft_cap))
        scores = 1.0 - 2.0 / (1.0 + e2x)
    if window is not None:
        scores = wgmma.mask(scores, *window())
    m_new = jnp.maximum(m, _fold(scores, jnp.maximum).max(axis=1) * factor)
    if problem.config.lazy_rescale:
        # A stale maximum is as good a reference while exp2 of what exceeds it stays small (FlashAttention-4).
        m_new = jnp.where(m_new - m > _LAZY_BITS, m_new, m)
    return scores * factor - _across(m_new, scores.shape[1]), m_new


def weigh(exponents, m, m_new, l):
    """(P in float32, l') of `shift`ed scores; l is kept as [64, 8] partial sums."""
    p = jnp.exp2(exponents)
    return p, l * _across(jnp.exp2(m - m_new), 8) + _fold(p, jnp.add)


def softmax(problem: Problem, scores, window, m, l):
    """One online-softmax step: (P in float32, m', l')."""
    exponents, m_new = shift(problem, scores, window, m)
    p, l = weigh(exponents, m, m_new, l)
    return p, m_new, l


def _attend(problem: Problem, warpgroup, steps, bounds, carry, staged, outputs, place, buffers, take_turn, pass_turn):
    """All steps of one query tile for one compute warpgroup, and its stores; out by way of `place`, if there is one."""
    q_smem, k_smem, v_smem, q_full, q_free, k_full, k_free, v_full, v_free = buffers
    config = problem.config
    first_window, masked_loop = steps.masked_windows(config.block_kv, bounds)
    acc, m, l = _initial(problem, () if problem.stages_carry else carry)
    dtype = q_smem.dtype

    def slot_of(step):
        return ring_slot(jnp.int32(step), config.stages)

    def rescale(acc, m, m_new):
        alpha = jnp.exp2(m - m_new)
        if config.lazy_rescale:
            return wgmma.rescale(acc, alpha)
        return acc * _across(alpha, problem.value_size)

    def scores_of(step, when_issued=None):
        slot = slot_of(step)
        plgpu.barrier_wait(k_full.at[slot])
        scores = wgmma.start_scores(q_smem, k_smem.at[slot])
        if when_issued is not None:
            when_issued()
        (scores,) = wgmma.wait(0, scores)
        plgpu.barrier_arrive(k_free.at[slot])
        return scores

    def add_values(step, acc, p):
        slot = slot_of(step)
        plgpu.barrier_wait(v_full.at[slot])
        (acc,) = wgmma.wait(0, wgmma.start_values(acc, p, v_smem.at[slot]))
        plgpu.barrier_arrive(v_free.at[slot])
        return acc

    def overlapped(step, state, window=None, slot=None):
        # Maximum and exponents of this step are made while P V of the previous one is in flight. Not exp2, too: P, rounded as it
        # comes, would need registers of its own, or stand in the way of the next products (FlashAttention-4 waits here as well).
        acc, m, l, p = state
        slot, previous = (slot_of(step), slot_of(step - 1)) if slot is None else (slot, (slot - 1) % config.stages)
        plgpu.barrier_wait(k_full.at[slot])
        plgpu.barrier_wait(v_full.at[previous])
        take_turn()
        scores, acc = wgmma.start(q_smem, k_smem.at[slot], acc, p, v_smem.at[previous])
        pass_turn()
        (scores,) = wgmma.wait(1, scores)
        plgpu.barrier_arrive(k_free.at[slot])
        exponents, m_new = shift(problem, scores, window, m)
        wgmma.hold_back(exponents[:, :8], q_smem)
        acc, exponents = wgmma.wait(0, acc, exponents)
        plgpu.barrier_arrive(v_free.at[previous])
        p, l = weigh(exponents, m, m_new, l)  # into the registers that P V read
        p = p.astype(dtype)
        acc = rescale(acc, m, m_new)
        wgmma.hold_back(-l, q_smem)  # or exp2 would go on where the next turn is waited for and held
        return acc, m_new, l, p

    def in_turn(step, state, window=None):
        # Holds the turn from P V of one step to Q K of the next, and gives it up for the softmax.
        acc, m, l = state
        p, m_new, l = softmax(problem, scores_of(step, pass_turn), window, m, l)
        acc = rescale(acc, m, m_new)
        wgmma.hold_back(-l, q_smem)
        take_turn()
        return add_values(step, acc, p.astype(dtype)), m_new, l

    plgpu.barrier_wait(q_full.at[warpgroup])
    state: tuple[jax.Array, ...]
    if config.overlap:
        p, m_new, l = softmax(problem, scores_of(0), first_window(), m, l)
        if problem.carry and not problem.stages_carry:
            acc = rescale(acc, m, m_new)
        state, body, first, masked_end = (acc, m_new, l, p.astype(dtype)), overlapped, 1, jnp.maximum(steps.masked, 1)
    else:
        state, body, first, masked_end = (acc, m, l), in_turn, 0, steps.masked
        take_turn()
    state = masked_loop(first, body, state)
    if config.overlap:  # unrolled by stages, so that slots are constants
        stages = config.stages
        # From slot 1 on, where the common case of one masked tile leaves off.
        begin = jnp.minimum(masked_end + lax.rem(masked_end * (stages - 1) + 1, stages), steps.total)
        rounds = lax.div(steps.total - begin, stages)

        def round_(i, state):
            for n in range(stages):
                state = body(begin + i * stages + n, state, slot=(n + 1) % stages)
            return state

        state = lax.fori_loop(masked_end, begin, body, state)
        state = lax.fori_loop(0, rounds, round_, state)
        state = lax.fori_loop(begin + rounds * stages, steps.total, body, state)
    else:
        state = lax.fori_loop(masked_end, steps.total, body, state)
    acc, m, l = state[:3]
    # A rounded out leaves as whole rows by TMA, where registers store eight bytes at a time: by way of shared memory, that of the
    # query tile where there is none of its own.
    shared = place is None and problem.head_size == problem.value_size and problem.rounded
    if not shared:
        plgpu.barrier_arrive(q_free)
    if config.overlap:
        acc = add_values(steps.total - 1, acc, state[3])
    else:
        pass_turn()
    l = l.sum(axis=1)
    if problem.stages_carry:
        acc, m, l = _resume(problem, carry[1], staged, acc, m, l)
    if place is not None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
    _store(problem, outputs, acc, m, l, q_smem if shared else place)
    if shared:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(q_free)


def _resume(problem: Problem, lse_ref, staged, acc, m, l):
    """(acc, m, l) joined with the carry, which has come to shared memory meanwhile."""
    out_smem, full, free = staged
    lse = compat.load(lse_ref, _ROWS)
    plgpu.barrier_wait(full)
    out = compat.load(out_smem, _TILE)
    plgpu.barrier_arrive(free)
    empty = lse <= _NO_KEY_YET  # so that a NaN stays one
    m_carry = jnp.where(empty, _NO_KEY_YET, lse * LOG2E)
    top = jnp.maximum(m, m_carry)
    factor, share = jnp.exp2(m - top), jnp.where(empty, 0.0, jnp.exp2(m_carry - top))
    out = jnp.where(_across(empty, problem.value_size), 0.0, out)
    acc = acc * _across(factor, problem.value_size) + out * _across(share, problem.value_size)
    return acc, top, l * factor + share


def _initial(problem: Problem, carry) -> tuple[jax.Array, jax.Array, jax.Array]:
    """acc [64, Hv], m [64] (base 2), l [64, 8] before the first key."""
    if not carry:
        acc = plgpu.layout_cast(jnp.zeros((64, problem.value_size), jnp.float32), _TILE)
        m = plgpu.layout_cast(jnp.full((64,), _NO_KEY_YET, jnp.float32), _ROWS)
        return acc, m, plgpu.layout_cast(jnp.zeros((64, 8), jnp.float32), _TILE)
    out_ref, lse_ref = carry
    lse = compat.load(lse_ref, _ROWS)
    empty = lse <= _NO_KEY_YET  # so that a NaN stays one
    # m is finite at all times: a NaN goes on in l and out.
    m = jnp.where(empty | (lse != lse), _NO_KEY_YET, lse * LOG2E)
    # An eighth in each of the eight columns: their sum is l = 1.
    l = _across(jnp.where(empty, 0.0, jnp.where(lse != lse, lse, 0.125)), 8)
    out = compat.load(out_ref, _TILE)
    return jnp.where(_across(empty, problem.value_size), 0.0, out), m, plgpu.layout_cast(l, _TILE)


def _store(problem: Problem, outputs, acc, m, l, place):
    out_ref, lse_ref = outputs
    visible = l != 0.0  # a NaN stays visible
    inverse = jnp.where(visible, 1.0 / l, 0.0)
    out = (acc * _across(inverse, problem.value_size)).astype(out_ref.dtype)
    if place is None:
        compat.store(out_ref, out)
    else:
        place[...] = out
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(place, out_ref)
    compat.store(lse_ref, jnp.where(visible, m * _LN2 + jnp.log(l), -jnp.inf))


def _pass_through(problem: Problem, carry, outputs):
    """A query tile that sees no key: the carry as it came, or nothing."""
    if problem.in_place:
        return
    out_ref, lse_ref = outputs
    acc, m, l = _initial(problem, carry)
    if problem.carry:
        compat.store(lse_ref, compat.load(carry[1], _ROWS))
    else:
        compat.store(lse_ref, plgpu.layout_cast(jnp.full((64,), -jnp.inf, jnp.float32), _ROWS))
    compat.store(out_ref, acc.astype(out_ref.dtype))
