"""The Hopper forward kernel as a function of arrays: what it takes, padding, and the launch. See `forward_kernel`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from ring_jax._arrays import pad_to, round_up
from ring_jax._vma import pcast_to, varying_axes
from ring_jax.flash.hopper import forward_kernel
from ring_jax.flash.hopper.config import SHARED_MEMORY_BYTES, ForwardConfig, forward_config
from ring_jax.flash.hopper.schedule import MAX_SEGMENTS, Problem
from ring_jax.flash.kv import HeadSlice, check_heads, fold_segments, value_size
from ring_jax.flash.operands import BlockOptions, Bounds, Partial
from ring_jax.mosaic import compat, in_place


def forward(
    query: jax.Array,
    kv: jax.Array,
    bounds: Bounds,
    carry: Partial | None,
    options: BlockOptions,
    *,
    out_dtype: Any = None,
    heads: HeadSlice | None = None,
    into: Partial | None = None,
    config: ForwardConfig | None = None,
) -> Partial:
    """Attention of each query over its interval of keys, continued from `carry`; the contract of `flash.backends`.

    Args:
        query: [B, T, N, H], bfloat16 or float16.
        kv: packed [2, B, S, K, H], or flat [B, S, K, H + Hv] where the value head size differs; N = K * G.
        bounds: int32 [B, T], 0 <= start <= end <= S, both non-decreasing along T. Or [P, B, T] of keys in P segments, which
            kv has as an axis before all others: a row sees an interval of each segment.
        carry: (out [B, T, N, Hv], lse [B, T, N]), float32, of the keys seen so far.
        options: scale (positive), soft cap.
        out_dtype: float32 (the default) or the input dtype.
        heads: which KV heads `kv` holds, where those are not all: only the query heads that share them are computed.
        into: (out, lse) of the result's dtypes to write the computed heads into, in their own buffers (jax 0.11 and
            later). Without it the results of other heads are undefined.
        config: tile sizes; None takes the tuned ones.

    Returns:
        out [B, T, N, Hv] in out_dtype, normalised, and lse [B, T, N], float32, natural log. A row that has seen no key
        has out 0 and lse -inf. The values of keys that no row sees must still be finite.

    Raises:
        ValueError: kv does not have as many segments as the bounds; heads that are not all there; `into` of other dtypes.
    """
    check_heads(kv, heads)
    out_dtype = jnp.dtype(out_dtype or jnp.float32)
    if out_dtype not in (jnp.float32, query.dtype):
        raise ValueError(f"out_dtype must be float32 or {query.dtype}, got {out_dtype}")
    if into is not None and (into[0].dtype, into[1].dtype) != (out_dtype, jnp.float32):
        raise ValueError(f"into must be {out_dtype} and float32, got {into[0].dtype} and {into[1].dtype}")
    # `plgpu.kernel` forgets over which manual mesh axes its outputs vary.
    axes = varying_axes(query, kv, bounds, carry, into)
    with jax.enable_x64(False):  # kernels compute indices in int32
        kv, bounds, segments = fold_segments(kv, bounds)
        query_len, value_size = query.shape[1], _head_sizes(query, kv)[1]
        config = config or forward_config(*(round_up(size, 64) for size in _head_sizes(query, kv)))
        into = _padded_rows(into, query, kv, config)
        query, kv, bounds, carry = _padded(query, kv, bounds, carry, config)
        calls = pl.cdiv(segments, MAX_SEGMENTS)
        for call in range(calls):
            first, last = (segments * i // calls for i in (call, call + 1))  # no call is left with a single segment
            final = last == segments
            dtype = out_dtype if final else jnp.float32
            problem = _problem(query, kv, carry, options, config, dtype, segments, heads)
            problem = dataclasses.replace(problem, segments=last - first, first_segment=first)
            carry = _launch(problem, query, kv, bounds, carry, dtype, into if final else None)
        assert carry is not None
        out, lse = carry
        if out.shape[1] != query_len or out.shape[3] != value_size:
            out, lse = out[:, :query_len, :, :value_size], lse[:, :query_len]
    return pcast_to((out, lse), axes)


def _head_sizes(query: jax.Array, kv: jax.Array) -> tuple[int, int]:
    return query.shape[-1], value_size(kv, query.shape[-1])


def _padded(
    query: jax.Array, kv: jax.Array, bounds: Bounds, carry: Partial | None, config: ForwardConfig
) -> tuple[jax.Array, jax.Array, Bounds, Partial | None]:
    """The arrays as TMA can read them; copies only where a length is no multiple of 8, or a head size none of 64."""
    head_size, value_size = _head_sizes(query, kv)
    key_columns, value_columns = round_up(head_size, 64), round_up(value_size, 64)
    carry = _padded_rows(carry, query, kv, config)
    if kv.ndim == 5:
        kv = pad_to(kv, 4, key_columns)
    elif (key_columns, value_columns) != (head_size, value_size):
        key, value = kv[..., :head_size], kv[..., head_size:]
        kv = jnp.concatenate([pad_to(key, 3, key_columns), pad_to(value, 3, value_columns)], axis=-1)
    kv = pad_to(kv, kv.ndim - 3, round_up(kv.shape[-3], 8))
    query_len = _rows(query, config)
    query = pad_to(pad_to(query, 3, key_columns), 1, query_len)
    bounds = Bounds(*(pad_to(bound, -1, query_len, "edge") for bound in bounds))
    return query, kv, bounds, carry


def _rows(query: jax.Array, config: ForwardConfig) -> int:
    return max(round_up(query.shape[1], 8), config.block_q)


def _padded_rows(partial: Partial | None, query: jax.Array, kv: jax.Array, config: ForwardConfig) -> Partial | None:
    """(out, lse) padded like the queries."""
    if partial is None:
        return None
    out, lse = partial
    rows, columns = _rows(query, config), round_up(_head_sizes(query, kv)[1], 64)
    return pad_to(pad_to(out, 3, columns), 1, rows), pad_to(lse, 1, rows)


def _in_place(query_len: int, carry: Partial | None, out_dtype: DTypeLike, config: ForwardConfig) -> bool:
    """Whether the carry's buffers can be the results'. A last tile that slides back would resume its rows twice."""
    return (
        carry is not None
        and jnp.dtype(out_dtype) == jnp.float32
        and query_len % config.block_q == 0
        and in_place.AVAILABLE
    )


def _problem(
    query: jax.Array,
    kv: jax.Array,
    carry: Partial | None,
    options: BlockOptions,
    config: ForwardConfig,
    out_dtype: DTypeLike,
    segments: int,
    heads: HeadSlice | None,
) -> Problem:
    batch, query_len, query_heads, head_size = query.shape
    kv_heads, value_size = kv.shape[-2], _head_sizes(query, kv)[1]
    first, total = heads or (0, kv_heads)
    group = query_heads // total
    used = config.shared_memory_bytes(head_size, value_size)
    if used > SHARED_MEMORY_BYTES:
        raise ValueError(f"{config} needs {used} bytes of shared memory for {head_size=}, {value_size=}")
    bytes_per_kv_head = segments * kv.shape[-3] * (head_size + value_size) * kv.dtype.itemsize
    wanted = max(1, config.kv_bytes_in_flight // bytes_per_kv_head)
    kv_heads_per_section = max(n for n in range(1, batch * kv_heads + 1) if batch * kv_heads % n == 0 and n <= wanted)
    return Problem(
        batch=batch,
        query_len=query_len,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_size=head_size,
        value_size=value_size,
        packed=kv.ndim == 5,
        carry=carry is not None,
        in_place=heads is None and _in_place(query_len, carry, out_dtype, config),
        rounded=jnp.dtype(out_dtype) == query.dtype,
        options=options,
        heads_per_section=kv_heads_per_section * group,
        config=config,
        first_head=first * group,
    )


def _launch(
    problem: Problem,
    query: jax.Array,
    kv: jax.Array,
    bounds: Bounds,
    carry: Partial | None,
    out_dtype: DTypeLike,
    into: Partial | None,
) -> Partial:
    config = problem.config
    operands = (query, kv, *bounds, *(carry or ()))
    rows = query.shape[:3]
    out_type = (
        compat.output_like((*rows, problem.value_size), out_dtype, *operands),
        compat.output_like(rows, jnp.float32, *operands),
    )
    if problem.in_place:
        operands, into = operands[:4], carry
    if into is not None:
        out_type = ()
    if problem.packed:
        operands = (query, kv.reshape(-1, *kv.shape[2:]), *operands[2:])

    def ring(arrivals: int = 1) -> Any:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=config.stages)

    scratch = dict(
        q_smem=compat.tiled_smem((config.warpgroups, 64, problem.head_size), query.dtype),
        k_smem=compat.tiled_smem((config.stages, config.block_kv, problem.head_size), query.dtype),
        v_smem=compat.tiled_smem((config.stages, config.block_kv, problem.value_size), query.dtype),
        q_full=plgpu.Barrier(num_barriers=config.warpgroups),
        q_free=plgpu.Barrier(num_arrivals=config.warpgroups),
        k_full=ring(),
        k_free=ring(config.warpgroups),
        v_full=ring(),
        v_free=ring(config.warpgroups),
        turn=plgpu.Barrier(num_barriers=config.warpgroups),
    )

    if problem.stages_carry:
        scratch |= dict(
            carry_smem=compat.tiled_smem((config.warpgroups, 64, problem.value_size), jnp.float32),
            carry_full=plgpu.Barrier(num_barriers=config.warpgroups),
            carry_free=plgpu.Barrier(num_arrivals=config.warpgroups),
        )

    if problem.stages_out:
        scratch["out_smem"] = compat.tiled_smem((config.warpgroups, 64, problem.value_size), out_dtype)

    call = compat.kernel(
        functools.partial(forward_kernel.kernel, problem),
        name="flash_attention_forward",
        out_type=out_type,
        scratch=scratch,
        grid=(problem.blocks,),
        grid_names=("block",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
    )
    if into is not None:
        return in_place.update(call, (), operands, into)
    # What one warp does by itself takes no Refs that vary over a mesh (`pipeline.in_first_warp`).
    varying = in_place.AVAILABLE and varying_axes(operands)
    found = in_place.opaque(call, out_type, operands) if varying else call(*operands)
    # In a scan that also stacks a result as residual, XLA would clone the whole kernel into a fusion that writes the stack.
    return tuple(lax.optimization_barrier(found))
