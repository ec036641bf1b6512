"""Paged decode attention on Hopper as a function of arrays: what it takes, how the work is shared out, the launches. See `paged_kernel`."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from ring_jax._arrays import pad_to
from ring_jax._hardware import HOPPER
from ring_jax._vma import pcast_to, varying_axes
from ring_jax.flash.hopper import paged_kernel
from ring_jax.flash.hopper.paged_kernel import PagedConfig, Problem
from ring_jax.flash.operands import BlockOptions, Partial
from ring_jax.mosaic import compat, in_place
from ring_jax.mosaic.device import hopper_reason

QUERY_ROWS = 64  # of a KV head: those of wgmma


def paged_config(head_size: int) -> PagedConfig:
    """The config that is used for this head size; docs/kernels/paged.md has the table that it was chosen from."""
    block_kv, stages = {64: (128, 2), 128: (64, 3), 192: (32, 4), 256: (32, 3)}[head_size]
    return PagedConfig(block_kv=block_kv, stages=stages)


def unsupported_reason(query: Any, pages: Any, options: BlockOptions) -> str | None:
    """Why the kernel cannot run these inputs here, or None."""
    return hopper_reason() or operand_reason(query, pages, options)


def operand_reason(query: Any, pages: Any, options: BlockOptions) -> str | None:
    """Why the kernel cannot take these operands on any device, or None."""
    if not compat.INTERPRET_AVAILABLE:
        return f"needs jax 0.11 or later, this is {jax.__version__}"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, got {query.dtype}"
    (_, tokens, heads, size), (slots, kv_heads) = query.shape, pages.shape[-3:-1]
    if size not in (64, 128, 192, 256):
        return f"the head size must be 64, 128, 192 or 256, got {size}"
    block = paged_config(size).block_kv
    if slots % 8 or (slots % block and block % slots):
        return f"pages of {slots} slots do not fit blocks of {block} keys: take a power of two from 8 up"
    if kv_heads and tokens * (heads // kv_heads) > QUERY_ROWS:
        return f"takes {QUERY_ROWS} queries a KV head, got {tokens} tokens of {heads // kv_heads} heads"
    if options.scale <= 0:
        return f"scale must be positive, got {options.scale}"
    return None


def forward(
    query: jax.Array,
    pages: jax.Array,
    table: jax.Array,
    lengths: jax.Array,
    layer: jax.Array,
    options: BlockOptions,
    *,
    config: PagedConfig | None = None,
) -> Partial:
    """Attention of a few queries to the keys in a row's pages; the contract of `flash.paged`.

    Args:
        config: how the keys are cut; None takes the tuned one.
    """
    # `plgpu.kernel` forgets over which manual mesh axes its outputs vary.
    axes = varying_axes(query, pages, table, lengths, layer)
    with jax.enable_x64(False):  # kernels compute indices in int32
        (R, T, N, H), (P, p, K) = query.shape, pages.shape[-4:-1]
        problem = Problem(R, T, N, K, H, P, p, options, config or paged_config(H))
        used = problem.config.shared_memory_bytes(H)
        if used > HOPPER.shared_memory_bytes:
            raise ValueError(f"{problem.config} needs {used} bytes of shared memory for head size {H}")
        grouped = query.reshape(R, T, K, N // K, H).swapaxes(1, 2).reshape(R * K, T * (N // K), H)
        grouped = pad_to(grouped, 1, problem.query_rows).reshape(-1, H)
        starts, visits = shares(lengths, K, problem.config)
        operands = (grouped, pages.reshape(-1, p, K, H), table, lengths, layer.reshape(1), starts, visits)
        partial = _attend(problem, *pcast_to(operands, axes))
        out, lse = _merge(problem, *partial, pcast_to(starts, axes))
    return pcast_to((out, lse), axes)


def shares(lengths: jax.Array, kv_heads: int, config: PagedConfig) -> tuple[jax.Array, jax.Array]:
    """Who works on what; the same for all layers of a step, so that XLA computes it once, in two small kernels.

    Returns:
        starts [R K + 1], the tiles before each segment and in all; visits [2, blocks], the first and the last segment of each
        thread block's share, first > last where it has none.
    """
    tiles = -(-lengths // config.tile)
    row, segments = jnp.arange(len(lengths), dtype=jnp.int32), len(lengths) * kv_heads
    segment = jnp.arange(segments + 1, dtype=jnp.int32)
    heads_before = jnp.clip(segment[:, None] - row[None] * kv_heads, 0, kv_heads)
    starts = jnp.sum(heads_before * tiles[None], axis=1, dtype=jnp.int32)
    share = jnp.maximum(-(-starts[-1] // config.blocks), 1)
    begin = jnp.arange(config.blocks, dtype=jnp.int32) * share
    beyond = jnp.stack([begin + 1, jnp.minimum(begin + share, starts[-1])])
    return starts, jnp.sum(starts[None, None, 1:] < beyond[..., None], axis=2, dtype=jnp.int32)


def _attend(problem: Problem, *operands) -> Partial:
    out_type = (
        compat.output_like((problem.partials, problem.query_rows, problem.head_size), jnp.float32, *operands),
        compat.output_like((problem.partials, 64), jnp.float32, *operands),
    )
    call = compat.kernel(
        functools.partial(paged_kernel.attend, problem),
        name="paged_attention",
        out_type=out_type,
        scratch=paged_kernel.scratch(problem, operands[0].dtype),
        grid=(problem.config.blocks,),
        grid_names=("block",),
        num_threads=problem.config.warpgroups + 1,
        thread_name="warpgroup",
    )
    out, lse = in_place.opaque(call, out_type, operands)
    return out, lse


def _merge(problem: Problem, *operands) -> Partial:
    shape = problem.rows, problem.tokens, problem.heads
    out_type = (
        compat.output_like((*shape, problem.head_size), jnp.float32, *operands),
        compat.output_like(shape, jnp.float32, *operands),
    )
    call = compat.kernel(
        functools.partial(paged_kernel.merge, problem),
        name="paged_attention_merge",
        out_type=out_type,
        scratch={},
        grid=(math.prod(shape),),
        grid_names=("query",),
        num_threads=1,
        thread_name="warpgroup",
    )
    out, lse = in_place.opaque(call, out_type, operands)
    return out, lse
