"""The mixture of experts token by token, without tricks: the definition that `ring_jax.moe.moe` is held to."""

import jax
import jax.numpy as jnp
from jax import lax


def reference(x, weights, *, top_k, renormalize=True, valid=None):
    """See `ring_jax.moe.moe`, for whole arrays on one device; y only. Copies the weights of every token: for tests."""

    def expert(token, e):
        gate, up = jnp.einsum("d,dcf->cf", token, weights.gate_up[e])
        return (jax.nn.silu(gate) * up) @ weights.down[e]

    def one(token):
        probs = jax.nn.softmax(token @ weights.router)
        chosen = jnp.argsort(-lax.stop_gradient(probs))[:top_k]
        factors = probs[chosen]
        if renormalize:
            factors = factors / factors.sum()
        return sum(factors[i] * expert(token, chosen[i]) for i in range(top_k))

    if valid is None:
        return lax.map(one, x)
    return jnp.where(valid[:, None], lax.map(one, jnp.where(valid[:, None], x, 0)), 0)
