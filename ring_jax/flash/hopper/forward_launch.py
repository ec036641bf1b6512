"""The Hopper forward kernel as a function of arrays: what it takes, padding, and the launch. See `forward_kernel`."""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax.flash.hopper import forward_kernel
from ring_jax.flash.hopper.config import SHARED_MEMORY_BYTES, ForwardConfig, forward_config
from ring_jax.flash.hopper.schedule import MAX_PARTS, Problem
from ring_jax.flash.packed import Heads, check_heads, fold_parts, value_size
from ring_jax.mosaic import compat, in_place


def unsupported_reason(
    query: jax.Array,
    kv: jax.Array,
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    out_dtype: Any = None,
    heads: Heads | None = None,
    compute_capability: str | None = None,
) -> str | None:
    """Why `forward` cannot take these arguments, or None. `compute_capability` is the GPU's, such as "9.0"."""
    if compute_capability is not None and compute_capability != "9.0":
        return f"needs a Hopper GPU (compute capability 9.0), this is {compute_capability}"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, got {query.dtype}"
    if kv.dtype != query.dtype:
        return f"query and kv must share a dtype, got {query.dtype} and {kv.dtype}"
    sizes = _head_sizes(query, kv)
    if min(sizes) < 1 or max(sizes) > 256:
        return f"head sizes must be between 1 and 256, got {sizes[0]} for keys and {sizes[1]} for values"
    if query.shape[2] % (kv_heads := heads.total if heads else kv.shape[-2]):
        return f"query heads must be a multiple of key-value heads, got {query.shape[2]} and {kv_heads}"
    if out_dtype is not None and jnp.dtype(out_dtype) not in (jnp.dtype(jnp.float32), query.dtype):
        return f"out_dtype must be float32 or {query.dtype}, got {jnp.dtype(out_dtype)}"
    if scale is not None and scale <= 0:
        return f"scale must be positive, got {scale}"
    if logits_soft_cap is not None and logits_soft_cap <= 0:
        return f"logits_soft_cap must be positive, got {logits_soft_cap}"
    if 0 in query.shape or 0 in kv.shape:
        return f"empty arrays, got {query.shape} and {kv.shape}"
    return None


def forward(
    query: jax.Array,
    kv: jax.Array,
    key_start: jax.Array,
    key_end: jax.Array,
    carry: tuple[jax.Array, jax.Array] | None = None,
    *,
    scale: float,
    logits_soft_cap: float | None = None,
    out_dtype: Any = jnp.float32,
    heads: Heads | None = None,
    into: tuple[jax.Array, jax.Array] | None = None,
    config: ForwardConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of each query over its interval of keys, continued from `carry`.

    Args:
        query: [B, T, N, H], bfloat16 or float16.
        kv: packed [2, B, S, K, H], or flat [B, S, K, H + Hv] where the value head size differs; N = K * G.
        key_start, key_end: int32 [B, T], 0 <= start <= end <= S, both non-decreasing along T. Or [P, B, T] of keys in P
            parts, which kv has as an axis before all others: a row sees an interval of each part.
        carry: (out [B, T, N, Hv], lse [B, T, N]), float32, of the keys seen so far.
        scale: factor of the logits.
        logits_soft_cap: cap, for cap * tanh(logits / cap).
        out_dtype: float32 or the input dtype.
        heads: which KV heads `kv` holds, where those are not all: only the query heads that share them are computed.
        into: (out, lse) of the result's dtypes to write the computed heads into, in their own buffers (jax 0.11 and
            later). Without it the results of other heads are undefined.
        config: tile sizes; None takes the tuned ones.

    Returns:
        out [B, T, N, Hv] in out_dtype, normalised, and lse [B, T, N], float32, natural log. A row that has seen no key
        has out 0 and lse -inf. The values of keys that no row sees must still be finite.

    Raises:
        NotImplementedError: if `unsupported_reason` gives one.
        ValueError: kv does not have as many parts as the bounds; heads that are not all there; `into` of other dtypes.
    """
    check_heads(kv, heads)
    kv, (key_start, key_end), parts = fold_parts(kv, (key_start, key_end))
    options = {"scale": scale, "logits_soft_cap": logits_soft_cap, "out_dtype": out_dtype, "heads": heads}
    reason = unsupported_reason(query, kv, **options)
    if reason is not None:
        raise NotImplementedError(f"the Hopper flash-attention kernel {reason}")
    head_size, value_size = _head_sizes(query, kv)
    query_len = query.shape[1]
    config = config or forward_config(_round_up(head_size, 64), _round_up(value_size, 64))
    if into is not None and (into[0].dtype, into[1].dtype) != (jnp.dtype(out_dtype), jnp.float32):
        raise ValueError(f"into must be {jnp.dtype(out_dtype)} and float32, got {into[0].dtype} and {into[1].dtype}")
    into = _padded_rows(into, query, kv, config)
    query, kv, key_start, key_end, carry = _padded(query, kv, key_start, key_end, carry, config)
    calls = pl.cdiv(parts, MAX_PARTS)
    for call in range(calls):
        first, last = (parts * i // calls for i in (call, call + 1))  # no call is left with a single part
        dtype = out_dtype if last == parts else jnp.float32
        problem = _problem(query, kv, carry, scale, logits_soft_cap, config, dtype, parts, heads)
        problem = dataclasses.replace(problem, parts=last - first, first_part=first)
        carry = _call(problem, query, kv, key_start, key_end, carry, dtype, into if last == parts else None)
    out, lse = carry
    if out.shape[1] != query_len or out.shape[3] != value_size:
        out, lse = out[:, :query_len, :, :value_size], lse[:, :query_len]
    return out, lse


def _head_sizes(query: jax.Array, kv: jax.Array) -> tuple[int, int]:
    return query.shape[-1], value_size(kv, query.shape[-1])


def _round_up(n: int, multiple: int) -> int:
    return pl.cdiv(n, multiple) * multiple


def _pad_axis(x: jax.Array, axis: int, size: int, mode: str = "constant") -> jax.Array:
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, mode=mode)


def _padded(query, kv, key_start, key_end, carry, config):
    """The arrays as TMA can read them; copies only where a length is no multiple of 8, or a head size none of 64."""
    head_size, value_size = _head_sizes(query, kv)
    key_columns, value_columns = _round_up(head_size, 64), _round_up(value_size, 64)
    carry = _padded_rows(carry, query, kv, config)
    if kv.ndim == 5:
        kv = _pad_axis(kv, 4, key_columns)
    elif (key_columns, value_columns) != (head_size, value_size):
        key, value = kv[..., :head_size], kv[..., head_size:]
        kv = jnp.concatenate([_pad_axis(key, 3, key_columns), _pad_axis(value, 3, value_columns)], axis=-1)
    kv = _pad_axis(kv, kv.ndim - 3, _round_up(kv.shape[-3], 8))
    query_len = _rows(query, config)
    query = _pad_axis(_pad_axis(query, 3, key_columns), 1, query_len)
    key_start, key_end = (_pad_axis(bound, bound.ndim - 1, query_len, "edge") for bound in (key_start, key_end))
    return query, kv, key_start, key_end, carry


def _rows(query, config) -> int:
    return max(_round_up(query.shape[1], 8), config.block_q)


def _padded_rows(partial, query, kv, config):
    """(out, lse) padded like the queries."""
    if partial is None:
        return None
    out, lse = partial
    rows, columns = _rows(query, config), _round_up(_head_sizes(query, kv)[1], 64)
    return _pad_axis(_pad_axis(out, 3, columns), 1, rows), _pad_axis(lse, 1, rows)


def _in_place(query_len, carry, out_dtype, config) -> bool:
    """Whether the carry's buffers can be the results'. A last tile that slides back would resume its rows twice."""
    return (
        carry is not None
        and jnp.dtype(out_dtype) == jnp.float32
        and query_len % config.block_q == 0
        and in_place.AVAILABLE
    )


def _problem(query, kv, carry, scale, logits_soft_cap, config, out_dtype, parts, heads) -> Problem:
    batch, query_len, query_heads, head_size = query.shape
    kv_heads, value_size = kv.shape[-2], _head_sizes(query, kv)[1]
    first, total = heads or (0, kv_heads)
    group = query_heads // total
    used = config.shared_memory_bytes(head_size, value_size)
    if used > SHARED_MEMORY_BYTES:
        raise ValueError(f"{config} needs {used} bytes of shared memory for {head_size=}, {value_size=}")
    bytes_per_kv_head = parts * kv.shape[-3] * (head_size + value_size) * kv.dtype.itemsize
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
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        heads_per_section=kv_heads_per_section * group,
        config=config,
        first_head=first * group,
    )


def _call(problem: Problem, query, kv, key_start, key_end, carry, out_dtype, into):
    config = problem.config
    operands = (query, kv, key_start, key_end, *(carry or ()))
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

    def ring(arrivals=1):
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

    def body(*refs, **scratch_refs):
        forward_kernel.kernel(problem, *refs, **scratch_refs)

    call = compat.kernel(
        body,
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
    # In a scan that also stacks a result as residual, XLA would clone the whole kernel into a fusion that writes the stack.
    return lax.optimization_barrier(call(*operands))
