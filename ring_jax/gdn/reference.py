"""The gated delta rule token by token, without tricks: the definition that the other implementations are held to.

    S <- exp(g_t) S;   u = beta_t (v_t - S^T k_t);   S <- S + k_t u^T;   o_t = scale S^T q_t

S in R^{d_k x d_v} for each value head. Source: Yang et al., Gated Delta Networks (arXiv 2412.06464); as in
transformers' `torch_recurrent_gated_delta_rule`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax._vma import align
from ring_jax.gdn.checks import state_dtype
from ring_jax.gdn.segments import document_index

HIGHEST = lax.Precision.HIGHEST


def reference(
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
    """See `ring_jax.gated_delta_rule`. Saves one state per token for the backward pass: for tests only."""
    dtype = state_dtype(query, key, value, log_decay, beta)
    repeats = value.shape[2] // key.shape[2]
    q, k = (jnp.repeat(x.astype(dtype), repeats, axis=2) for x in (query, key))
    v, g, beta = (x.astype(dtype) for x in (value, log_decay, beta))
    restarts = jnp.zeros(key.shape[:2], bool)
    if segment_ids is not None:
        documents = document_index(segment_ids)
        restarts = jnp.diff(documents, axis=1, prepend=0) > 0

    def token(state: jax.Array, xs: Any) -> tuple[jax.Array, jax.Array]:
        q, k, v, g, beta, restart = xs  # [B, N, ...]
        state = jnp.where(restart[:, None, None, None], jnp.zeros_like(state), state)
        state = jnp.exp(g)[..., None, None] * state
        u = beta[..., None] * (v - jnp.einsum("bnkv,bnk->bnv", state, k, precision=HIGHEST))
        state = state + k[..., :, None] * u[..., None, :]
        return state, jnp.einsum("bnkv,bnk->bnv", state, q, precision=HIGHEST)

    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q * scale, k, v, g, beta, restarts))
    initial_state, xs = align(initial_state, xs)
    state, out = lax.scan(token, initial_state, xs)
    return jnp.moveaxis(out, 0, 1).astype(value.dtype), state
