"""Gradients of the gated delta rule on Hopper, all chunks at the same time, from what `recurrence_kernel` left.

Persistent: a thread block takes one chunk of one key head after the other, and its value heads in turn. With S, dS, z, dV and
the decays of a value head,

    a = scale lower[dO z^T . D];                    b = -strict_lower[dV z^T . D]
    r_q = scale from_start (dO S^T);   r_k = -from_start (dV S^T);   c = to_end (z dS^T);   e = c + a^T Q + b^T K
    dq = r_q + (a diag(beta)) K;   dk = r_k + (b diag(beta)) K + diag(beta) e
    dbeta = k . e = dV . z / beta

dq and dk are summed over the value heads of the key head. Three warpgroups compute: *query* (dq), *key* (the first two addends of
dk) and *column* (e: it makes a^T and b^T by products of their own instead of transposing); a fourth feeds shared memory by TMA. The
gradient of the log decay of token l is a sum of what it scales, and of nothing else, so that nothing cancels where decays are strong:

    dg_l = sum_{i >= l > j} ((a . Q K^T + b . K K^T) diag(beta))_ij + sum_{i >= l} (q . r_q + k . r_k)_i
           + sum_{j < l} beta_j (k . c)_j + total <S, dS>

The kernel leaves the first sum, made by a product with a triangle of ones and added up over i warp by warp, and the terms of the
others, from float32 accumulators all of them; the sums over them are `decay_gradient`.
"""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from ring_jax.gdn.hopper.config import CHUNK, GATE_ROWS
from ring_jax.gdn.hopper.prepare import across, down, row_index
from ring_jax.mosaic import compat, wgmma
from ring_jax.mosaic.fragments import constant, hand_over, load, store, store_column_sums, store_dot, take_over

_TILE = plgpu.Layout.WGMMA
_ROWS = plgpu.Layout.WGMMA.reduce(1)
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
_QUERY, _KEY, _COLUMN = range(3)
_REGISTERS, _MEMORY_REGISTERS = 160, 32
# Rows of numbers a token that each warpgroup leaves for a value head: see `decay_gradient`.
_FIRST_ROW, _ROW_COUNT, ROWS = (0, 5, 10), (5, 5, 5), 15

WEAK = 2.0**-8  # strengths up to here take k . e


@dataclasses.dataclass(frozen=True)
class Problem:
    batch: int
    chunks: int
    key_heads: int
    group: int  # value heads of a key head
    key_size: int
    value_size: int
    scale: float
    documents: bool
    dtype: Any
    multiprocessors: int = 132

    @property
    def items(self) -> int:
        """Chunks of key heads."""
        return self.batch * self.chunks * self.key_heads

    @property
    def blocks(self) -> int:
        return min(self.multiprocessors, self.items)


def gradients(problem: Problem, query, key, out_gradient, z, dv, states, ends, gates, spans):
    """dq, dk in the dtype of the inputs, and rows [B, N, chunks, 15, 64] float32, of which come those of decays and strengths."""
    heads = problem.key_heads * problem.group
    ones = jnp.triu(jnp.ones((CHUNK, CHUNK), jnp.bfloat16), 1)
    operands = [query, key, out_gradient, z, dv, states, ends, gates, ones]
    operands += [spans] if problem.documents else []
    rows = (problem.batch, heads, problem.chunks, ROWS, CHUNK)
    out_type = (
        *(compat.output_like(x.shape, x.dtype, *operands) for x in (query, key)),
        compat.output_like(rows, jnp.float32, *operands),
    )

    def tile(rows, columns, dtype=problem.dtype):
        return compat.tiled_smem((rows, columns), dtype)

    smem = {name: tile(CHUNK, problem.key_size) for name in ("q", "k", "dq", "dk")}
    smem |= {name: tile(CHUNK, problem.value_size) for name in ("d_out", "z", "dv")}
    smem |= {name: tile(problem.value_size, problem.key_size) for name in ("s", "ds")}
    smem |= dict(
        ones=tile(CHUNK, CHUNK, jnp.bfloat16),
        gates=plgpu.SMEM((GATE_ROWS, CHUNK), jnp.float32),
        spans=plgpu.SMEM((2, CHUNK), jnp.int32),
        rows=plgpu.SMEM((ROWS, CHUNK), jnp.float32),
        hand=plgpu.SMEM((CHUNK, CHUNK), jnp.float32),
    )
    scratch = dict(
        smem=smem,
        full=dict(
            keys=plgpu.Barrier(num_arrivals=2),
            values=plgpu.Barrier(num_arrivals=4 + problem.documents),
            s=plgpu.Barrier(),
            ds=plgpu.Barrier(),
            ones=plgpu.Barrier(),
            hand=plgpu.Barrier(),
        ),
        free=dict(
            keys=plgpu.Barrier(num_arrivals=3),
            values=plgpu.Barrier(num_arrivals=3),
            s=plgpu.Barrier(num_arrivals=3),
            ds=plgpu.Barrier(),
            hand=plgpu.Barrier(),
        ),
    )

    def body(*refs, **scratch_refs):
        _body(problem, *refs, **scratch_refs)

    call = compat.kernel(
        body,
        name="gated_delta_gradients",
        out_type=out_type,
        scratch=scratch,
        grid=(problem.blocks,),
        grid_names=("block",),
        num_threads=4,
        thread_name="warpgroup",
    )
    return call(*operands)


def decay_gradient(rows, gates):
    """The gradients of log decays and of strengths, [B, N, chunks, 64], from the rows that `gradients` leaves."""
    pairs = jnp.sum(rows[..., 0:4, :], -2) + jnp.sum(rows[..., 5:9, :], -2)
    beta = gates[..., 3, :]
    reads, writes = rows[..., 4, :] + rows[..., 9, :], beta * rows[..., 10, :]
    through = gates[..., 1, -1] * jnp.sum(rows[..., 13:, :], (-2, -1))
    before = jnp.pad(writes[..., :-1], ((0, 0),) * (writes.ndim - 1) + ((1, 0),))  # never a difference of sums
    ahead = jnp.cumsum(before, -1)
    # The sum k . e loses digits where keys are alike; the other form has none where beta is 0.
    strong = jnp.abs(beta) > WEAK
    behind = lax.cumsum(reads, reads.ndim - 1, reverse=True)
    return pairs + behind + ahead + through[..., None], jnp.where(
        strong, rows[..., 12, :] / jnp.where(strong, beta, 1.0), rows[..., 11, :]
    )


def _body(problem, *refs, **scratch):
    inputs, (dq, dk, rows) = refs[:-3], refs[-3:]
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    count = lax.div(problem.items - 1 - block, jnp.int32(problem.blocks)) + 1

    def place(i):
        item = block + i * problem.blocks
        head, item = lax.rem(item, problem.key_heads), lax.div(item, problem.key_heads)
        return lax.div(item, problem.chunks), lax.rem(item, problem.chunks), head

    def rows_at(i, r, part):
        batch, chunk, head = place(i)
        return rows.at[batch, head * problem.group + r, chunk, pl.ds(_FIRST_ROW[part], _ROW_COUNT[part])]

    def key_at(ref, i):
        batch, chunk, head = place(i)
        return ref.at[batch, pl.ds(chunk * CHUNK, CHUNK), head]

    def run(part, body, target):
        plgpu.set_max_registers(_REGISTERS, action="increase")
        body(part, lambda i: key_at(target, i), lambda i, r: rows_at(i, r, part))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == _QUERY)
    def _():
        run(_QUERY, functools.partial(_rows, problem, count, **scratch), dq)

    @pl.when(warpgroup == _KEY)
    def _():
        run(_KEY, functools.partial(_rows, problem, count, **scratch), None)

    @pl.when(warpgroup == _COLUMN)
    def _():
        run(_COLUMN, functools.partial(_columns, problem, count, **scratch), dk)

    @pl.when(warpgroup == 3)
    def _():
        plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")
        _memory(problem, count, place, inputs, **scratch)


def _memory(problem, count, place, inputs, *, smem, full, free):
    query, key, out_gradient, z, dv, states, ends, gates, ones, *spans = inputs

    def copy(source, name, barrier):
        plgpu.copy_gmem_to_smem(source, smem[name], full[barrier])

    copy(ones, "ones", "ones")

    @pl.loop(0, count)
    def _(i):
        batch, chunk, key_head = place(i)
        tokens = pl.ds(chunk * CHUNK, CHUNK)
        plgpu.barrier_wait(free["keys"])
        copy(query.at[batch, tokens, key_head], "q", "keys")
        copy(key.at[batch, tokens, key_head], "k", "keys")

        @pl.loop(0, problem.group)
        def _(r):
            head = key_head * problem.group + r
            plgpu.barrier_wait(free["values"])
            copy(gates.at[batch, head, chunk], "gates", "values")
            for ref in spans:
                copy(ref.at[batch, chunk], "spans", "values")
            for source, name in ((z, "z"), (dv, "dv"), (out_gradient, "d_out")):
                copy(source.at[batch, tokens, head], name, "values")
            plgpu.barrier_wait(free["s"])
            copy(states.at[batch, head, chunk], "s", "s")
            plgpu.barrier_wait(free["ds"])
            copy(ends.at[batch, head, chunk], "ds", "ds")

    if compat.interpreting():  # the interpreter wants every phase of a barrier to be seen
        for name in ("keys", "values", "s", "ds"):
            plgpu.barrier_wait(free[name])


def _hidden_row_index():
    """`row_index`, anew: the compiler would keep every comparison with row indices in registers over the loops."""
    if compat.interpreting():
        return row_index()

    @plgpu.inline_mgpu(arg_types=(_ROWS,), return_type=plgpu.ShapeDtypeStruct((CHUNK,), jnp.int32, layout=_ROWS))
    def hide(_, row):
        i32 = ir.IntegerType.get_signless(32)
        registers = np.empty_like(row.registers)
        for i, register in np.ndenumerate(row.registers):
            value = llvm.extractelement(register, constant(0))
            value = llvm.inline_asm(i32, [value], "mov.b32 $0, $1;", "=r,r", has_side_effects=True)
            registers[i] = llvm.insertelement(register, value, constant(0))
        return mgpu.FragmentedArray(_registers=registers, _layout=row.layout, _is_signed=row.is_signed)

    return hide(row_index())


def _rows_of(buffers, part):
    return buffers.rows.at[pl.ds(_FIRST_ROW[part], _ROW_COUNT[part])]


def _decay(buffers, sign: float):
    """2^(G_i - G_j) of tokens i in rows and j in columns, or the other way round where sign is -1."""
    total = buffers.gates.at[0]
    return jnp.exp2((across(compat.load(total, _ROWS)) - down(compat.load(total, _COLUMNS))) * sign)


def _halves(size: int):
    return [pl.ds(i, 64) for i in range(0, size, 64)]


def _zeros():
    return plgpu.layout_cast(jnp.zeros((CHUNK, 64), jnp.float32), _TILE)


def _row_sum(x, y):
    return jnp.sum(x.astype(jnp.float32) * y, axis=1)


def _rows(problem, count, part, key_target, rows_target, *, smem, full, free):
    """The query warpgroup (r_q, a) or the key warpgroup (r_k, b)."""
    keys = part == _KEY
    at = types.SimpleNamespace(**smem)
    factor, halves = -1.0 if keys else problem.scale, _halves(problem.key_size)
    for name in ("keys", "values", "s"):
        plgpu.barrier_arrive(free[name])
    plgpu.barrier_wait(full["ones"])

    def head(i, r, sums):
        row = _hidden_row_index()
        left, partner = (at.dv, at.k) if keys else (at.d_out, at.q)
        plgpu.barrier_wait(full["values"])
        (weights,) = wgmma.start_products((None, left, at.z))
        decay = _decay(at, 1.0)
        low = compat.load(at.spans.at[0], _ROWS) if problem.documents else None
        (weights,) = wgmma.wait(0, weights)
        weights = wgmma.mask(weights * decay, low, row if keys else row + 1, 0.0)
        weights = weights * down(compat.load(at.gates.at[3], _COLUMNS) * factor)
        # One after the other: together they and the decays would take more registers than there are.
        (products,) = wgmma.wait(0, *wgmma.start_products((None, partner, at.k)))
        products = (products * weights).astype(jnp.bfloat16)
        weights = weights.astype(problem.dtype)
        (products,) = wgmma.start_products((None, products, at.ones, False))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the rows of the last value head have left
        (products,) = wgmma.wait(0, products)
        store_column_sums(_rows_of(at, part).at[pl.ds(0, 4)], wgmma.mask(products, None, row + 1, 0.0))

        plgpu.barrier_wait(full["s"])
        from_start = compat.load(at.gates.at[1], _ROWS) * factor
        reads, following = None, list[jax.Array]()
        for half, total in zip(halves, sums, strict=True):
            (x,) = wgmma.start_products((None, left, at.s.at[:, half], False))
            other = load(partner.at[:, half])
            (x,) = wgmma.wait(0, x)
            x = x * across(from_start)
            dot = _row_sum(other, x)
            reads = dot if reads is None else reads + dot
            following += wgmma.wait(0, *wgmma.start_products((total + x, weights, at.k.at[:, half])))
        plgpu.barrier_arrive(free["s"])
        plgpu.barrier_arrive(free["values"])
        compat.store(_rows_of(at, part).at[4], reads)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(_rows_of(at, part), rows_target(i, r))
        return tuple(following)

    @pl.loop(0, count)
    def _(i):
        plgpu.barrier_wait(full["keys"])
        sums = lax.fori_loop(0, problem.group, lambda r, sums: head(i, r, sums), tuple(_zeros() for _ in halves))
        plgpu.barrier_arrive(free["keys"])
        for half, total in zip(halves, sums, strict=True):
            if keys:
                plgpu.barrier_wait(free["hand"])
                hand_over(smem["hand"], total)
                plgpu.commit_smem()
                plgpu.barrier_arrive(full["hand"])
            else:
                store(smem["dq"].at[:, half], total.astype(problem.dtype))
        if not keys:
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem["dq"], key_target(i))

    if keys and compat.interpreting():
        plgpu.barrier_wait(free["hand"])


def _columns(problem, count, part, key_target, rows_target, *, smem, full, free):
    """The column warpgroup: e, from c and the products with the transposes of a and b."""
    at, halves = types.SimpleNamespace(**smem), _halves(problem.key_size)
    for name in ("keys", "values", "s", "ds", "hand"):
        plgpu.barrier_arrive(free[name])

    def head(i, r, sums):
        row = _hidden_row_index()
        plgpu.barrier_wait(full["values"])
        (a,) = wgmma.start_products((None, at.z, at.d_out))
        decay = _decay(at, -1.0)
        high = compat.load(at.spans.at[1], _ROWS) if problem.documents else row * 0 + CHUNK
        (a,) = wgmma.wait(0, a)
        a = wgmma.mask(a * decay * problem.scale, row, high, 0.0).astype(problem.dtype)
        plgpu.barrier_wait(full["ds"])
        to_end, beta = compat.load(at.gates.at[2], _ROWS), compat.load(at.gates.at[3], _ROWS)
        writes, strengths, following = None, None, list[jax.Array]()
        for half, total in zip(halves, sums, strict=True):
            (x,) = wgmma.start_products((None, at.z, at.ds.at[:, half], False))
            k = load(at.k.at[:, half])
            (x,) = wgmma.wait(0, x)
            x = x * across(to_end)
            dot = _row_sum(k, x)
            writes = dot if writes is None else writes + dot
            (x,) = wgmma.wait(0, *wgmma.start_products((x, a, at.q.at[:, half])))
            dot = _row_sum(k, x)
            strengths = dot if strengths is None else strengths + dot
            following.append(total + x * across(beta))
        # Only now: a and b together would take more registers than there are.
        (b,) = wgmma.start_products((None, at.z, at.dv))
        decay = _decay(at, -1.0)
        (b,) = wgmma.wait(0, b)
        diagonal = jnp.sum(wgmma.mask(b, row, row + 1, 0.0), axis=1)
        b = wgmma.mask(-b * decay, row + 1, high, 0.0).astype(problem.dtype)
        for n, half in enumerate(halves):
            (x,) = wgmma.start_products((None, b, at.k.at[:, half], False))
            k = load(at.k.at[:, half])
            (x,) = wgmma.wait(0, x)
            strengths = strengths + _row_sum(k, x)
            following[n] += x * across(beta)
        plgpu.barrier_arrive(free["values"])
        plgpu.barrier_wait(full["s"])
        rows = _rows_of(at, part)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the rows of the last value head have left
        store_dot(rows.at[pl.ds(3, 2)], at.s, at.ds)
        plgpu.barrier_arrive(free["s"])
        plgpu.barrier_arrive(free["ds"])
        for n, x in enumerate((writes, strengths, diagonal)):
            compat.store(rows.at[n], x)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(rows, rows_target(i, r))
        return tuple(following)

    @pl.loop(0, count)
    def _(i):
        plgpu.barrier_wait(full["keys"])
        sums = lax.fori_loop(0, problem.group, lambda r, sums: head(i, r, sums), tuple(_zeros() for _ in halves))
        plgpu.barrier_arrive(free["keys"])
        for half, total in zip(halves, sums, strict=True):
            plgpu.barrier_wait(full["hand"])
            other = take_over(smem["hand"])
            plgpu.barrier_arrive(free["hand"])
            store(smem["dk"].at[:, half], (total + other).astype(problem.dtype))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem["dk"], key_target(i))
