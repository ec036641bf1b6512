"""The Hopper forward of the gated delta rule as a function of arrays: what it takes, padding, and its two kernels."""

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from ring_jax.gdn.hopper import forward_kernel, prepare
from ring_jax.gdn.hopper.config import CHUNK, SHARED_MEMORY_BYTES, ForwardConfig, forward_config
from ring_jax.gdn.hopper.gates import chunked_rows, document_starts
from ring_jax.gdn.segments import blank_padding
from ring_jax.mosaic import compat

SIZES = (64, 128)


def unsupported_reason(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    compute_capability: str | None = None,
) -> str | None:
    """Why `forward` cannot take these arguments, or None. `compute_capability` is the GPU's, such as "9.0"."""
    if compute_capability is not None and compute_capability != "9.0":
        return f"needs a Hopper GPU (compute capability 9.0), this is {compute_capability}"
    if not compat.INTERPRET_AVAILABLE or jax.__version_info__ < (0, 11, 2):
        return f"needs jax 0.11.2 or later, this is {jax.__version__}"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, got {query.dtype}"
    if key.dtype != query.dtype or value.dtype != query.dtype:
        return f"query, key and value must share a dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
    if key.shape[3] not in SIZES or value.shape[3] not in SIZES:
        return f"head sizes must be 64 or 128, got {key.shape[3]} for keys and {value.shape[3]} for values"
    if value.shape[2] % key.shape[2]:
        return f"value heads must be a multiple of key heads, got {value.shape[2]} and {key.shape[2]}"
    if 0 in query.shape or 0 in value.shape:
        return f"empty arrays, got {query.shape} and {value.shape}"
    return None


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    *,
    scale: float,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    config: ForwardConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule, see `ring_jax.gated_delta_rule`.

    Args:
        query, key: [B, T, K, dk] bfloat16 or float16.
        value: [B, T, N, dv], the same dtype, N a multiple of K.
        log_decay, beta: [B, T, N]; computed with in float32.
        scale: factor of the query.
        initial_state: [B, N, dk, dv] float32, or zeros.
        segment_ids: int [B, T], negative on padding, where the other arrays may hold anything.
        config: None takes the tuned one.

    Returns:
        out [B, T, N, dv] in the input dtype, and the final state [B, N, dk, dv] in float32.

    Raises:
        NotImplementedError: if `unsupported_reason` gives one.
    """
    reason = unsupported_reason(query, key, value, scale=scale)
    if reason is not None:
        raise NotImplementedError(f"the Hopper kernel of the gated delta rule {reason}")
    batch, time, key_heads, key_size = key.shape
    heads, value_size = value.shape[2:]
    config = config or forward_config(key_size, value_size, batch * heads)
    if (used := config.shared_memory_bytes(key_size)) > SHARED_MEMORY_BYTES:
        raise ValueError(f"{config} needs {used} bytes of shared memory for {key_size=}")
    query, key, value, log_decay, beta = blank_padding(segment_ids, query, key, value, log_decay, beta)
    starts = None if segment_ids is None else document_starts(segment_ids)
    # TMA reads whole tiles, of an array whose length is a multiple of 8.
    query, key, value = (_lengthened(x) for x in (query, key, value))
    problem = forward_kernel.Problem(
        batch=batch,
        time=key.shape[1],
        key_heads=key_heads,
        heads=heads,
        key_size=key_size,
        value_size=value_size,
        scale=float(scale),
        initial=initial_state is not None,
        documents=starts is not None,
        dtype=jnp.dtype(key.dtype),
        config=config,
    )
    preparation = prepare.Problem(
        batch, problem.chunks, key_heads, heads // key_heads, key_size, problem.documents, problem.dtype
    )
    inverse, gates = prepare.prepare(preparation, key, chunked_rows(log_decay, beta), starts)
    initial = None if initial_state is None else jnp.swapaxes(initial_state, 2, 3)
    out, final = forward_kernel.forward(problem, query, key, value, inverse, gates, starts, initial)
    return out[:, :time], jnp.swapaxes(final, 2, 3)


def _lengthened(x: jax.Array) -> jax.Array:
    length = max(pl.cdiv(x.shape[1], 8) * 8, CHUNK)
    return x if length == x.shape[1] else jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
