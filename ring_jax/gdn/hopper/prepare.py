"""Chunk preparation on Hopper: T = (I + strict_lower[beta K K^T . D])^-1 diag(beta) of every chunk and value head.

Persistent: each warpgroup takes one chunk of one key head after the other, the next one loading meanwhile. K K^T is one
product; each value head of the key head then has its own decays (`gates`, also written out), and its inverse. The
diagonal blocks of 16 are inverted inside a warp (`leaf`), and joined, 16 -> 32 -> 64, as X <- X - X L X with L the blocks
of N between the joined ones, in float16 with float32 sums: the inverse of what is stable has entries of the order of
1, and 11 bits are more than T keeps when it is stored in bfloat16. Powers of N beyond blocks of 8 never occur, so nothing grows where
keys are alike.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax.gdn.hopper.config import CHUNK, GATE_ROWS
from ring_jax.gdn.hopper.gates import write_gate_rows
from ring_jax.gdn.hopper.leaf import joined_blocks, leaf_inverses
from ring_jax.mosaic import compat, wgmma
from ring_jax.mosaic.fragments import store

_TILE = plgpu.Layout.WGMMA
_ROWS = plgpu.Layout.WGMMA.reduce(1)
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
_SHAPE = (CHUNK, CHUNK)
_WARPGROUPS = 3  # with four, 128 registers a thread would spill


@dataclasses.dataclass(frozen=True)
class Problem:
    batch: int
    chunks: int
    key_heads: int
    group: int  # value heads of a key head
    key_size: int
    documents: bool
    dtype: Any
    backward: bool = False  # T = (I + strict_lower[K K^T . D] diag(beta))^-1 instead, see `recurrence_kernel`
    multiprocessors: int = 132

    @property
    def items(self) -> int:
        """Chunks of key heads."""
        return self.batch * self.chunks * self.key_heads

    @property
    def blocks(self) -> int:
        return min(self.multiprocessors, pl.cdiv(self.items, _WARPGROUPS))


def across(rows, columns: int = CHUNK):
    """A value per row as a matrix."""
    return lax.broadcast_in_dim(rows, (CHUNK, columns), [0])


def down(columns, rows: int = CHUNK):
    """A value per column as a matrix."""
    return lax.broadcast_in_dim(columns, (rows, CHUNK), [1])


def row_index():
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=_ROWS)


# Where a transition and the rule ask for the same (state passing), they are one program text, of which XLA keeps one.
@functools.partial(jax.jit, static_argnums=0)
def prepare(problem: Problem, key, rows, starts):
    """T [B, N, chunks, 64, 64] in the dtype of the keys, and `gates`."""
    heads = problem.key_heads * problem.group
    operands = (key, rows, *([starts] if problem.documents else []))
    per_chunk = (problem.batch, heads, problem.chunks)
    out_type = (
        compat.output_like((*per_chunk, CHUNK, CHUNK), problem.dtype, *operands),
        compat.output_like((*per_chunk, GATE_ROWS, CHUNK), jnp.float32, *operands),
    )
    per_warpgroup = (_WARPGROUPS, problem.group)
    scratch = dict(
        k_smem=compat.tiled_smem((_WARPGROUPS, CHUNK, problem.key_size), problem.dtype),
        x_smem=compat.tiled_smem((_WARPGROUPS, *_SHAPE), jnp.float16),
        y_smem=compat.tiled_smem((_WARPGROUPS, *_SHAPE), jnp.float16),
        t_smem=compat.tiled_smem((_WARPGROUPS, *_SHAPE), problem.dtype),
        rows_smem=plgpu.SMEM((*per_warpgroup, 2, CHUNK), jnp.float32),
        gates_smem=plgpu.SMEM((*per_warpgroup, GATE_ROWS, CHUNK), jnp.float32),
        starts_smem=plgpu.SMEM((_WARPGROUPS, CHUNK), jnp.int32),
        full=plgpu.Barrier(num_arrivals=1 + problem.group + problem.documents, num_barriers=_WARPGROUPS),
    )

    def body(*refs, **scratch_refs):
        _body(problem, *refs, **scratch_refs)

    call = compat.kernel(
        body,
        name="gated_delta_prepare",
        out_type=out_type,
        scratch=scratch,
        grid=(problem.blocks,),
        grid_names=("block",),
        num_threads=_WARPGROUPS,
        thread_name="warpgroup",
    )
    return call(*operands)


def _body(problem, *refs, full, **buffers):
    key_ref, rows_ref, *starts_ref, t_ref, gates_ref = refs
    warpgroup = lax.axis_index("warpgroup")
    buffers = {name: buffer.at[warpgroup] for name, buffer in buffers.items()}
    full = full.at[warpgroup]
    first = lax.axis_index("block") * _WARPGROUPS + warpgroup
    stride = problem.blocks * _WARPGROUPS

    def place(item):
        head, item = lax.rem(item, problem.key_heads), lax.div(item, problem.key_heads)
        return lax.div(item, problem.chunks), lax.rem(item, problem.chunks), head

    def load(item):
        @pl.when(item < problem.items)
        def _():
            batch, chunk, head = place(item)
            tokens = pl.ds(chunk * CHUNK, CHUNK)
            plgpu.copy_gmem_to_smem(key_ref.at[batch, tokens, head], buffers["k_smem"], full)
            for r in range(problem.group):
                source = rows_ref.at[batch, head * problem.group + r, chunk]
                plgpu.copy_gmem_to_smem(source, buffers["rows_smem"].at[r], full)
            if problem.documents:
                plgpu.copy_gmem_to_smem(starts_ref[0].at[batch, chunk], buffers["starts_smem"], full)

    load(first)

    @pl.loop(0, pl.cdiv(problem.items, stride))
    def _(i):
        item = first + i * stride

        @pl.when(item < problem.items)
        def _():
            batch, chunk, head = place(item)
            plgpu.barrier_wait(full)

            def targets(r):
                return tuple(ref.at[batch, head * problem.group + r, chunk] for ref in (t_ref, gates_ref))

            _item(problem, targets, lambda: load(item + stride), **buffers)

    plgpu.wait_smem_to_gmem(0)


def _item(problem, targets, load_next, *, k_smem, x_smem, y_smem, t_smem, rows_smem, gates_smem, starts_smem):
    (products,) = wgmma.start_products((None, k_smem, k_smem))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    write_gate_rows(rows_smem, starts_smem if problem.documents else None, gates_smem)
    low = compat.load(starts_smem, _ROWS) if problem.documents else None
    (products,) = wgmma.wait(0, products)
    plgpu.commit_smem()
    load_next()
    row = row_index()

    @pl.loop(0, problem.group)
    def _(r):
        t_target, gates_target = targets(r)
        gate = gates_smem.at[r]
        plgpu.copy_smem_to_gmem(gate, gates_target)
        decay = jnp.exp2(across(compat.load(gate.at[0], _ROWS)) - down(compat.load(gate.at[0], _COLUMNS)))
        if problem.backward:
            strict = products * down(-compat.load(gate.at[3], _COLUMNS)) * decay
        else:
            strict = products * across(-compat.load(gate.at[3], _ROWS)) * decay
        inverse = _inverse(wgmma.mask(strict, low, row, 0.0), x_smem, y_smem)
        if not problem.backward:
            inverse = inverse * down(compat.load(gate.at[3], _COLUMNS))
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the last T has left; the gates may be on their way
        store(t_smem, inverse.astype(problem.dtype))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(t_smem, t_target)


def _inverse(strict, x_smem, y_smem):
    """(I - strict)^-1, float32."""
    x = leaf_inverses(strict)
    strict = strict.astype(jnp.float16)
    for size in (16, 32):
        half, between = x.astype(jnp.float16), joined_blocks(strict, size)
        # Columns that the blocks have, and their rows: all others are zero.
        upper = [pl.ds(i, size) for i in range(0, CHUNK, 2 * size)]
        lower = [pl.ds(i + size, size) for i in range(0, CHUNK, 2 * size)]
        store(x_smem, half)
        plgpu.commit_smem()
        y = None
        for block in upper:
            (y,) = wgmma.start_products((y, _columns(between, block), x_smem.at[block], False))
        (y,) = wgmma.wait(0, y)
        store(y_smem, y.astype(jnp.float16))
        plgpu.commit_smem()
        for block in lower:
            (x,) = wgmma.start_products((x, _columns(half, block), y_smem.at[block]))
        (x,) = wgmma.wait(0, x)
    return x


def _columns(x, block):
    return x[:, block.start : block.start + block.size]
