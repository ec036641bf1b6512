"""What the Hopper kernels compute, in plain JAX: float32 throughout, with operands rounded where the kernels round them.

The kernels' errors are held to this form's, chunk by chunk (see `forward_kernel` for the formulas): T, P, and for every product
that reads them the state, y, u and u to_end have 16 bits; sums, decays and the state that goes on have 32.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax._arrays import rounded_to
from ring_jax.gdn.hopper.config import CHUNK
from ring_jax.gdn.hopper.gates import chunked_rows, document_starts, gate_rows
from ring_jax.gdn.inverse import unit_lower_inverse
from ring_jax.gdn.segments import blank_padding

HIGHEST = lax.Precision.HIGHEST


def rounded_forward(query, key, value, log_decay, beta, *, scale, initial_state=None, segment_ids=None):
    """As `launch.forward`."""
    dtype = value.dtype
    time, repeats = value.shape[1], value.shape[2] // key.shape[2]
    operands = blank_padding(segment_ids, query, key, value, log_decay, beta)
    query, key, value, log_decay, beta = operands
    starts = None if segment_ids is None else document_starts(segment_ids)[:, None]
    gates = gate_rows(chunked_rows(log_decay, beta), starts)
    q, k = (jnp.repeat(_chunks(x), repeats, axis=1) for x in (query, key))
    v = _chunks(value)  # [B, N, chunks, 64, d]
    batch, heads, chunks = v.shape[:3]
    total, from_start, to_end, strength = (gates[..., i, :] for i in range(4))
    square = (batch, heads, chunks, CHUNK, CHUNK)
    row, column = (lax.broadcasted_iota(jnp.int32, square, axis) for axis in (3, 4))
    visible = row >= column
    if starts is not None:
        visible = visible & (starts[..., None] <= column)
    decay = jnp.exp2(jnp.where(visible, total[..., :, None] - total[..., None, :], 0))
    decay = jnp.where(visible, decay, 0)

    narrow = partial(rounded_to, dtype=dtype)
    strict = jnp.tril(strength[..., None] * _einsum("...id,...jd->...ij", k, k) * decay, -1)
    inverse = narrow(unit_lower_inverse(strict) * strength[..., None, :])
    scores = narrow(scale * _einsum("...id,...jd->...ij", q, k) * decay)

    def chunk(state, xs):
        q, k, v, inverse, scores, from_start, to_end = xs
        read = narrow(state)
        y = narrow(v - from_start[..., None] * _einsum("...id,...dv->...iv", k, read))
        u = _einsum("...ij,...jv->...iv", inverse, y)
        out = scale * from_start[..., None] * _einsum("...id,...dv->...iv", q, read)
        out = out + _einsum("...ij,...jv->...iv", scores, narrow(u))
        state = from_start[..., -1, None, None] * state
        return state + _einsum("...id,...iv->...dv", k, narrow(to_end[..., None] * u)), out.astype(dtype)

    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, k.shape[-1], v.shape[-1]), jnp.float32)
    xs = (q, k, v, inverse, scores, from_start, to_end)
    state, out = lax.scan(chunk, initial_state, jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), xs))
    out = jnp.moveaxis(out, 0, 2).reshape(batch, heads, chunks * CHUNK, -1)
    return jnp.moveaxis(out, 1, 2)[:, :time], state


def _einsum(formula, *operands):
    return jnp.einsum(formula, *operands, precision=HIGHEST)


def _chunks(x):
    """[B, T, N, d] to float32 [B, N, chunks, 64, d], zeros at the end."""
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -x.shape[1] % CHUNK), (0, 0), (0, 0)))
    return jnp.moveaxis(x, 2, 1).reshape(x.shape[0], x.shape[2], -1, CHUNK, x.shape[3])
