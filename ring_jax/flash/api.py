"""`flash_attention`: one attention block over key intervals."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ring_jax._checks import check_array, check_instance, concrete, is_array, to_int32
from ring_jax._vma import align
from ring_jax.flash.backends import FixedMask, Implementation, check_inputs, check_options, select, with_batch
from ring_jax.flash.block import Block, attention_block
from ring_jax.flash.kv import pack, pack_like
from ring_jax.flash.merge import partial_dtype
from ring_jax.flash.operands import BlockOptions, Bounds

# Called eagerly a block would compile at every call, operation by operation.
_jitted_block = jax.jit(attention_block, static_argnums=(0, 1))


def flash_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K Hv"],
    key_start: Int[Array, "... T"],
    key_end: Int[Array, "... T"],
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    carry: tuple[Float[Array, "*B T N Hv"], Float[Array, "*B T N"]] | None = None,
    implementation: Implementation | None = None,
    deterministic: bool | None = None,
) -> tuple[Float[Array, "*B T N Hv"], Float[Array, "*B T N"]]:
    """Attention of every query row over one interval of keys, resumed from a carry.

        out_t = sum_s softmax(scale q_t . k_s) v_s,   s in [key_start_t, key_end_t)  (and what the carry saw)

    Args:
        query: [B, T, N, H], bfloat16, float16, float32 or float64.
        key, value: [B, S, K, H] and [B, S, K, Hv], same dtype; N a multiple of K (query head n reads head n // (N/K)).
            All three may lack the batch axis, as in jax.nn; results (and a carry) then lack it, too.
        key_start, key_end: int32 [B, T] (or [T], [1, T]): row t sees keys with start <= s < end. They are clipped to
            [0, S]; start >= end is an empty row. Neither may decrease along T, or kernels give wrong results (an error
            where values are known while tracing): let an empty row repeat a bound of its neighbour, not (0, 0).
        scale: multiplies the logits; default H ** -0.5.
        logits_soft_cap: cap c > 0 applied as c * tanh(logits / c).
        carry: float32 (out, lse) of the same rows over other keys, to resume from. (0, sink) adds an attention sink.
        implementation: "reference", "xla", ... or None for the best that runs here.
        deterministic: True for gradients that repeat bit by bit; False for the fastest; None for gradients that repeat
            unless that costs more than 10%: all but cuDNN's and, on Hopper, those of head sizes of which the larger is
            from 65 to 128, whose last bits differ from run to run. Results of the forward pass always repeat.

    Returns:
        (out, lse): float32 [B, T, N, Hv] and natural-log [B, T, N] (float64 for float64 inputs), a mergeable
        partial result. An empty row gives out 0 and lse -inf, with zero gradients, or its carry unchanged.

    Raises:
        TypeError: what is no array, number, flag or name. ValueError: shapes, dtypes or values that do not fit.
        NotImplementedError: a named implementation that cannot run these inputs on this device.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 4, 2, 8))
        >>> out, lse = flash_attention(x, x, x, jnp.zeros((1, 4), int), jnp.arange(1, 5)[None])
        >>> out.shape, lse.shape
        ((1, 4, 2, 8), (1, 4, 2))

    Source: Dao, FlashAttention-2, arXiv 2307.08691; the resumed form is Liu et al., Ring Attention, arXiv 2310.01889.
    """
    return _attend(query, key, value, key_start, key_end, scale, logits_soft_cap, carry, implementation, deterministic)


def rounded_attention(
    query: Array,
    key: Array,
    value: Array,
    key_start: Array,
    key_end: Array,
    *,
    carry: tuple[Array, Array] | None = None,
    implementation: Implementation | None = None,
) -> Array:
    """`flash_attention`'s out in the query's dtype, which kernels then write: half the bytes of a float32 array that is rounded by
    who reads it. Its gradient is that of the rounded out, as in a ring."""
    operands = query, key, value, key_start, key_end
    return _attend(*operands, None, None, carry, implementation, None, rounded=True)[0]


def _attend(
    query: Array,
    key: Array,
    value: Array,
    key_start: Array,
    key_end: Array,
    scale: float | None,
    logits_soft_cap: float | None,
    carry: tuple[Array, Array] | None,
    implementation: Implementation | None,
    deterministic: bool | None,
    *,
    rounded: bool = False,
) -> tuple[Array, Array]:
    """(out, lse) of `flash_attention`; rounded: out in the query's dtype."""
    query, key, value, unbatched = with_batch(query, key, value)
    check_inputs(query, key, value)
    options = BlockOptions.of_call(query.shape[-1], scale, logits_soft_cap, deterministic)
    check_options(implementation, deterministic)
    B, T, N, _ = query.shape
    S = key.shape[1]
    if carry is not None:
        check_instance("carry", carry, (tuple, list), "a pair (out, lse) of arrays")
        if len(carry) != 2:
            raise ValueError(f"carry must be a pair (out, lse) of arrays, got {len(carry)}")
        sizes = {"B": B, "T": T, "N": N, "Hv": value.shape[3]}
        out_in, lse_in = (x[None] if unbatched and is_array(x) else x for x in carry)
        carry = (out_in, lse_in)
        check_array("carry[0]", carry[0], "B T N Hv", sizes)
        check_array("carry[1]", carry[1], "B T N", sizes)
    _check_bounds(key_start, key_end, B, T, S)
    fixed_mask = _fixed_mask(key_start, key_end, T, S)
    block = Block(select(implementation, query, pack_like(key, value), options, fixed_mask), options)
    start, end = _clipped(key_start, key_end, B, T, S)
    kv = pack(key, value)
    acc_dtype = partial_dtype(query.dtype)
    if carry is not None:
        carry = (out_in.astype(acc_dtype), lse_in.astype(acc_dtype))
    if 0 in (B, T, N, S):
        out, lse = carry or (jnp.zeros((B, T, N, value.shape[3]), acc_dtype), jnp.full((B, T, N), -jnp.inf, acc_dtype))
    else:
        query, kv, start, end, carry = align(query, kv, start, end, carry)
        out, lse = _jitted_block(block, query.dtype if rounded else None, query, kv, Bounds(start, end), carry)
    out = out.astype(query.dtype) if rounded else out
    return (out[0], lse[0]) if unbatched else (out, lse)


def _fixed_mask(key_start: Array, key_end: Array, T: int, S: int) -> FixedMask | None:
    """Which fixed mask the bounds are, where their values are known now."""
    start, end = concrete(key_start), concrete(key_end)
    if start is None or end is None or np.any(start > 0):
        return None
    if np.all(end >= S):
        return "full"
    return "causal" if np.all(np.minimum(end, S) == np.minimum(np.arange(1, T + 1), S)) else None


def _check_bounds(key_start: Array, key_end: Array, B: int, T: int, S: int) -> None:
    for name, x in (("key_start", key_start), ("key_end", key_end)):
        check_array(name, x, kind="integer")
        if x.shape not in ((T,), (1, T), (B, T)):
            raise ValueError(
                f"{name} must have shape {(B, T)} (or {(1, T)}, {(T,)}) for query [B, T, ...], got {x.shape}"
            )
    low, high = concrete(key_start), concrete(key_end)
    if low is not None and high is not None:
        low, high = np.clip(low, 0, S), np.clip(high, 0, S)
        _check_ascending("key_start", low)
        _check_ascending("key_end", np.maximum(low, high))


def _clipped(key_start: Array, key_end: Array, B: int, T: int, S: int) -> tuple[jax.Array, jax.Array]:
    """Bounds as int32 [B, T], 0 <= start <= end <= S."""
    start, end = (jnp.clip(jnp.asarray(to_int32(x)), 0, S) for x in (key_start, key_end))
    start, end = (jnp.broadcast_to(x if x.ndim == 2 else x[None], (B, T)) for x in (start, end))
    return start, jnp.maximum(start, end)


def _check_ascending(name: str, bound: np.ndarray) -> None:
    falls = np.atleast_2d(np.diff(bound, axis=-1) < 0)
    if falls.any():
        row = int(np.argmax(falls.any(axis=0)))
        raise ValueError(
            f"{name} must not decrease along the rows, but row {row + 1} has less than row {row}: order the rows by position, and "
            "let rows that see nothing repeat a bound of their neighbour"
        )
