"""The Hopper forward of the gated delta rule as a function of arrays: what it takes, padding, and its two kernels."""

import dataclasses

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from ring_jax._arrays import Shaped
from ring_jax.gdn.hopper import forward_kernel, prepare, transition_kernel
from ring_jax.gdn.hopper.config import CHUNK, SHARED_MEMORY_BYTES, ForwardConfig, forward_config
from ring_jax.gdn.hopper.gates import chunked_rows, document_starts
from ring_jax.gdn.segments import blank_padding
from ring_jax.mosaic import compat

SIZES = (64, 128)


def unsupported_reason(
    query: Shaped,
    key: Shaped,
    value: Shaped,
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
    pieces: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule, see `ring_jax.gated_delta_rule`.

    Args:
        query, key: [B, T, K, dk] bfloat16 or float16. Where beta |key|^2 is more than 2 the rule itself is unstable, and
            what grows may overflow the float16 of `prepare`; keys of unit length are far from there.
        value: [B, T, N, dv], the same dtype, N a multiple of K.
        log_decay, beta: [B, T, N]; computed with in float32.
        scale: factor of the query.
        initial_state: [B, N, dk, dv] float32, or zeros.
        segment_ids: int [B, T], negative on padding, where the other arrays may hold anything.
        config: None takes the one that should be fastest.
        pieces: into how many the sequence is cut, so that they run at the same time; likewise.

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
    best, cuts = forward_config(key_size, value_size, batch * heads, pl.cdiv(time, CHUNK))
    config, pieces = config or best, pieces or (1 if config else cuts)
    if (used := config.shared_memory_bytes(key_size)) > SHARED_MEMORY_BYTES:
        raise ValueError(f"{config} needs {used} bytes of shared memory for {key_size=}")
    query, key, value, inverse, gates, starts = prepared(query, key, value, log_decay, beta, segment_ids)
    initial = None
    if initial_state is not None:
        initial = jnp.swapaxes(initial_state, 2, 3)[:, :, None]
    problem = forward_kernel.Problem(
        batch=batch,
        time=key.shape[1],
        key_heads=key_heads,
        heads=heads,
        key_size=key_size,
        value_size=value_size,
        scale=float(scale),
        initial=initial is not None or pieces > 1,
        documents=starts is not None,
        dtype=jnp.dtype(key.dtype),
        config=config,
        pieces=pieces,
    )
    # Rounding up may leave fewer pieces than asked for.
    problem = dataclasses.replace(problem, pieces=pl.cdiv(problem.chunks, problem.length))
    if problem.pieces > 1:
        through = _transition(key, value, inverse, gates, problem.pieces - 1, problem.length)
        initial = _entering(initial, through, value_size)
    out, final = forward_kernel.forward(problem, query, key, value, inverse, gates, starts, initial)
    return out[:, :time], jnp.swapaxes(final, 2, 3)


def transition(
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(M, B) of S_out = M S_in + B over the whole array, float32 [B, N, dk, dk] and [B, N, dk, dv], as `chunked.transition`."""
    reason = unsupported_reason(key, key, value)
    if reason is not None:
        raise NotImplementedError(f"the Hopper kernel of the gated delta rule {reason}")
    _, key, value, inverse, gates, _ = prepared(None, key, value, log_decay, beta, segment_ids)
    through = _transition(key, value, inverse, gates, 1, gates.shape[2])[:, :, 0]
    through = jnp.swapaxes(through, 2, 3)
    return through[..., value.shape[3] :], through[..., : value.shape[3]]


def prepared(query, key, value, log_decay, beta, segment_ids, *, backward: bool = False):
    """The operands as TMA can read them, and what `prepare` and `gates` make of them."""
    operands = [key, value, log_decay, beta, *([] if query is None else [query])]
    key, value, log_decay, beta, *rest = blank_padding(segment_ids, *operands)
    starts = None if segment_ids is None else document_starts(segment_ids)
    # TMA reads whole tiles, of an array whose length is a multiple of 8.
    key, value, *rest = (lengthened(x) for x in (key, value, *rest))
    batch, time, key_heads, key_size = key.shape
    problem = prepare.Problem(
        batch=batch,
        chunks=pl.cdiv(time, CHUNK),
        key_heads=key_heads,
        group=value.shape[2] // key_heads,
        key_size=key_size,
        documents=starts is not None,
        dtype=jnp.dtype(key.dtype),
        backward=backward,
    )
    inverse, gates = prepare.prepare(problem, key, chunked_rows(log_decay, beta), starts)
    return *(rest or [None]), key, value, inverse, gates, starts


def _transition(key, value, inverse, gates, pieces: int, length: int):
    """Of the first pieces of `length` chunks: [B, N, pieces, dv + dk, dk], B and M transposed."""
    problem = transition_kernel.Problem(
        batch=key.shape[0],
        chunks=min(gates.shape[2], pieces * length),
        key_heads=key.shape[2],
        heads=value.shape[2],
        key_size=key.shape[3],
        value_size=value.shape[3],
        pieces=pieces,
        length=length,
        dtype=jnp.dtype(key.dtype),
    )
    return transition_kernel.transition(problem, key, value, inverse, gates)


def _entering(initial, through, value_size: int):
    """The states, transposed, with which the pieces begin: [B, N, pieces, dv, dk]."""
    added, carried = through[:, :, :, :value_size], through[:, :, :, value_size:]
    state = jnp.zeros_like(added[:, :, 0]) if initial is None else initial[:, :, 0]
    states = [state]
    for piece in range(through.shape[2]):
        state = jnp.matmul(state, carried[:, :, piece], precision=lax.Precision.HIGHEST) + added[:, :, piece]
        states.append(state)
    return jnp.stack(states, axis=2)


def lengthened(x: jax.Array) -> jax.Array:
    """[B, T, ...] as TMA can read it, in tiles of a chunk: zeros at the end."""
    length = max(pl.cdiv(x.shape[1], 8) * 8, CHUNK)
    return x if length == x.shape[1] else jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
