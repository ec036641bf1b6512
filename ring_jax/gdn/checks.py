"""What the gated delta rule accepts, and the errors for what it does not."""

import jax
import jax.numpy as jnp

from ring_jax.mask import check_segment_ids


def state_dtype(*arrays: jax.Array) -> jnp.dtype:
    """The dtype of states and of all arithmetic: float64 if any array is float64, else float32."""
    wide = any(x.dtype == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def widened(x: jax.Array) -> jax.Array:
    """x in float32, or in float64 where it is so."""
    return x.astype(state_dtype(x))


def check_operands(query, key, value, log_decay, beta, initial_state, segment_ids, natural: bool = True) -> None:
    """Raises ValueError unless the operands of one gated delta rule fit together; `natural` as in `check_segments`."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [batch, time, heads, head size], got shape {x.shape}")
        _check_float(name, x)
    batch, time, key_heads, dk = key.shape
    value_heads, dv = value.shape[2:]
    _check_shape("query", query, key.shape, "the shape of key")
    _check_shape("value", value, (batch, time, value_heads, dv), "the batch and time of key")
    if value_heads % key_heads if key_heads else value_heads:
        raise ValueError(
            f"the number of value heads must be a multiple of the number of key heads, got {value_heads} value heads "
            f"and {key_heads} key heads: key head h serves value heads h*r ... h*r + r - 1, r = value heads / key heads"
        )
    per_head = (batch, time, value_heads)
    _check_shape("log_decay", log_decay, per_head, "[batch, time, value heads]")
    _check_shape("beta", beta, per_head, "[batch, time, value heads]")
    _check_float("beta", beta)
    dtype = state_dtype(query, key, value, log_decay, beta)
    if log_decay.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"log_decay must be float32, got {log_decay.dtype}: it is summed over the sequence, so compute "
            "-exp(A_log) * softplus(a + dt_bias) in float32 (a cast of a rounded value would keep the rounding)"
        )
    if initial_state is not None:
        _check_shape("initial_state", initial_state, (batch, value_heads, dk, dv), "[batch, value heads, d_k, d_v]")
        if initial_state.dtype != dtype:
            raise ValueError(f"initial_state must be {dtype}, got {initial_state.dtype}: states are never rounded")
    check_segments(segment_ids, batch, time, natural)


def check_segments(segment_ids, batch: int, time: int, natural: bool = True) -> None:
    """Raises ValueError unless `segment_ids` is None or an integer array [batch, time]; in natural order also where an id that
    is known comes back after another document."""
    if segment_ids is None:
        return
    _check_shape("segment_ids", segment_ids, (batch, time), "[batch, time]")
    if not jnp.issubdtype(segment_ids.dtype, jnp.signedinteger):
        raise ValueError(f"segment_ids must be signed integers (negative: padding), got {segment_ids.dtype}")
    if natural:
        check_segment_ids(segment_ids)


def _check_shape(name: str, x, expected: tuple[int, ...], meaning: str) -> None:
    if x.shape != expected:
        raise ValueError(f"{name} must have shape {expected} ({meaning}), got {x.shape}")


def _check_float(name: str, x) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be a floating-point array, got {x.dtype}: cast it first")
