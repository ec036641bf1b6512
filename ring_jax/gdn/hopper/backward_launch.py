"""The Hopper backward of the gated delta rule as a function of arrays: padding, its kernels, and what remains for XLA."""

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from ring_jax.gdn.hopper import gradient_kernel, recurrence_kernel
from ring_jax.gdn.hopper.config import CHUNK, ForwardConfig
from ring_jax.gdn.hopper.gates import document_spans
from ring_jax.gdn.hopper.launch import lengthened, prepared
from ring_jax.gdn.segments import blank_padding

CONFIG = ForwardConfig(state_warpgroups=1, state_registers=240)


def backward(operands, cotangents, *, scale: float, initial_state: jax.Array | None, segment_ids: jax.Array | None):
    """Gradients of `launch.forward`.

    Args:
        operands: query, key, value, log_decay, beta, as it takes them.
        cotangents: of its two results.
        scale, initial_state, segment_ids: as there.

    Returns:
        Gradients of the operands in their dtypes, and of the initial state (float32 [B, N, dk, dv]), given or not.
    """
    _, _, value, log_decay, beta = operands
    batch, time, heads, value_size = value.shape
    (out_gradient,) = blank_padding(segment_ids, cotangents[0].astype(value.dtype))
    out_gradient = lengthened(out_gradient)
    query, key, value, inverse, gates, starts = prepared(*operands, segment_ids, backward=True)
    key_heads, key_size = key.shape[2:]
    shared = dict(
        batch=batch,
        key_heads=key_heads,
        key_size=key_size,
        value_size=value_size,
        scale=float(scale),
        documents=starts is not None,
        dtype=jnp.dtype(key.dtype),
    )
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_size, value_size), jnp.float32)
    initial, last = (jnp.swapaxes(x.astype(jnp.float32), 2, 3) for x in (initial_state, cotangents[1]))
    problem = recurrence_kernel.Problem(time=key.shape[1], heads=heads, config=CONFIG, **shared)
    states, z, ends, dv, state_gradient = recurrence_kernel.recurrences(
        problem, query, key, value, out_gradient, inverse, gates, starts, initial, last
    )
    problem = gradient_kernel.Problem(chunks=pl.cdiv(time, CHUNK), group=heads // key_heads, **shared)
    spans = None if starts is None else document_spans(starts)
    dq, dk, rows = gradient_kernel.gradients(problem, query, key, out_gradient, z, dv, states, ends, gates, spans)
    narrow = gradient_kernel.decay_gradient(rows, gates)
    narrow = (jnp.moveaxis(x.reshape(batch, heads, -1)[:, :, :time], 1, 2) for x in narrow)
    narrow = blank_padding(segment_ids, *narrow)
    gradients = [x[:, :time] for x in (dq, dk, dv)]
    gradients += [x.astype(y.dtype) for x, y in zip(narrow, (log_decay, beta), strict=True)]
    return (*gradients, jnp.swapaxes(state_gradient, 2, 3))
