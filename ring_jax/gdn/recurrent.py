"""The gated delta rule for one or a few tokens: decode.

The recurrence of `reference.py`, unrolled, with the state read once per token for both S^T k and S^T q:

    o_t = exp(g_t) S^T q_t + (k_t . q_t) u_t

so that neither product waits for the updated state. A decay near one is applied as S + expm1(g) S: exp(g) rounded to
float32 errs by the same 3e-8 at every token, and at g = -1e-4 that adds up over thousands of them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax._vma import align
from ring_jax.gdn.checks import state_dtype
from ring_jax.gdn.segments import document_index

HIGHEST = lax.Precision.HIGHEST
SLOW = -0.5  # log decays above it are applied as a change of the state
UNROLLED = 8  # tokens that are written out one after the other; more go through a loop


def recurrent(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    *,
    scale: float,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """See `ring_jax.gated_delta_rule`. Its backward pass keeps one state per token: train with `chunked`."""
    dtype = state_dtype(query, key, value, log_decay, beta)
    batch, time, heads, dk = key.shape
    repeats, dv = value.shape[2] // heads, value.shape[3]
    g = log_decay.astype(dtype)
    slow = g > SLOW
    change = jnp.where(slow, jnp.expm1(g), jnp.exp(g))
    if segment_ids is not None:
        restarts = (jnp.diff(document_index(segment_ids), axis=1, prepend=0) > 0)[..., None]
        slow, change = slow & ~restarts, jnp.where(restarts, 0, change)
    q, k, v = query.astype(dtype) * scale, key.astype(dtype), value.astype(dtype)
    per_head = (batch, time, heads, repeats)
    per_token = q, k, v.reshape(*per_head, dv), slow.reshape(per_head), change.reshape(per_head)
    xs = (*per_token, beta.astype(dtype).reshape(per_head))
    state = initial_state.reshape(batch, heads, repeats, dk, dv)
    state, xs = align(state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), xs))
    state, out = lax.scan(_token, state, xs, unroll=time if time <= UNROLLED else 1)
    out = jnp.moveaxis(out, 0, 1).reshape(batch, time, heads * repeats, dv)
    return out.astype(value.dtype), state.reshape(initial_state.shape)


def _token(state: jax.Array, xs: Any) -> tuple[jax.Array, jax.Array]:
    q, k, v, slow, change, beta = xs  # [B, K, dk] twice, [B, K, R, dv], [B, K, R]...; state [B, K, R, dk, dv]
    changed = change[..., None, None] * state
    state = jnp.where(slow[..., None, None], state + changed, changed)
    # Sums rather than products: XLA makes one pass over the state of both, and writes no decayed state for them.
    read_k, read_q = (jnp.sum(state * x[:, :, None, :, None], axis=3) for x in (k, q))
    u = beta[..., None] * (v - read_k)
    overlap = jnp.einsum("bkd,bkd->bk", k, q, precision=HIGHEST)
    state = state + k[:, :, None, :, None] * u[..., None, :]
    return state, read_q + overlap[:, :, None, None] * u
