"""What the gated delta rule accepts, and the errors for what it does not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ring_jax._checks import Sizes, check_array
from ring_jax._segment_ids import check_segment_ids


def state_dtype(*arrays: Array) -> jnp.dtype:
    """The dtype of states and of all arithmetic: float64 if any array is float64, else float32."""
    wide = any(x.dtype == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def widened(x: jax.Array) -> jax.Array:
    """x in float32, or in float64 where it is so."""
    return x.astype(state_dtype(x))


def check_operands(
    query: Any,
    key: Any,
    value: Any,
    log_decay: Any,
    beta: Any,
    initial_state: Any,
    segment_ids: Any,
    natural: bool = True,
) -> None:
    """Raises unless the operands of one gated delta rule fit together; `natural` as in `check_segments`."""
    sizes = Sizes()
    check_array("key", key, "B T K dk", sizes)
    check_array("query", query, "B T K dk", sizes, advice="query must have the shape of key")
    check_array("value", value, "B T N dv", sizes, advice="value must have the batch and time of key")
    value_heads, key_heads = sizes["N"], sizes["K"]
    if value_heads % key_heads if key_heads else value_heads:
        raise ValueError(
            f"the number of value heads must be a multiple of the number of key heads, got {value_heads} value heads "
            f"and {key_heads} key heads: key head h serves value heads h*r ... h*r + r - 1, r = value heads / key heads"
        )
    if sizes["dk"] == 0:
        raise ValueError(f"query and key must have a head size of at least 1, got shape {key.shape}")
    for name, x in (("log_decay", log_decay), ("beta", beta)):
        check_array(name, x, "B T N", sizes, advice="one for each value head")
    dtype = state_dtype(query, key, value, log_decay, beta)
    if log_decay.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"log_decay must be float32, got {log_decay.dtype}: it is summed over the sequence, so compute "
            "-exp(A_log) * softplus(a + dt_bias) in float32 (a cast of a rounded value would keep the rounding)"
        )
    # Reading an array on a device would make the host wait for it, so only NumPy's are read.
    if isinstance(log_decay, np.ndarray) and not np.all(log_decay <= 0):
        raise ValueError(
            f"log_decay must be <= 0 (a decay of at most 1), got up to {np.max(log_decay)}: it is the logarithm of the decay"
        )
    if initial_state is not None:
        check_array("initial_state", initial_state, "B N dk dv", sizes)
        if initial_state.dtype != dtype:
            raise ValueError(f"initial_state must be {dtype}, got {initial_state.dtype}: states are never rounded")
    check_segments(segment_ids, sizes["B"], sizes["T"], natural)


def check_segments(segment_ids: Any, batch: int, time: int, natural: bool = True) -> None:
    """Raises unless `segment_ids` is None or a signed integer array [batch, time], negative ids being padding; in natural order
    also where an id that is known comes back after another document."""
    if segment_ids is not None:
        check_array("segment_ids", segment_ids, "B T", {"B": batch, "T": time}, kind="signed")
        if natural:
            check_segment_ids(segment_ids)
