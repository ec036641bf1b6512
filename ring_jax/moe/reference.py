"""The mixture of experts token by token, without tricks: the definition that `ring_jax.moe.moe` is held to."""

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax.moe.layer import MoEWeights


def reference(
    x: jax.Array, weights: MoEWeights, *, top_k: int, renormalize: bool = True, valid: jax.Array | None = None
) -> jax.Array:
    """See `ring_jax.moe.moe`, for whole arrays on one device; y only. Copies the weights of every token: for tests."""

    def expert(token: jax.Array, e: jax.Array) -> jax.Array:
        gate, up = jnp.einsum("d,dcf->cf", token, weights.gate_up[e])
        return (jax.nn.silu(gate) * up) @ weights.down[e]

    def one(token: jax.Array) -> jax.Array:
        probs = jax.nn.softmax(token @ weights.router)
        chosen = jnp.argsort(-lax.stop_gradient(probs))[:top_k]
        factors = probs[chosen]
        if renormalize:
            factors = factors / factors.sum()
        return jnp.asarray(sum(factors[i] * expert(token, chosen[i]) for i in range(top_k)))

    if valid is None:
        return lax.map(one, x)
    return jnp.where(valid[:, None], lax.map(one, jnp.where(valid[:, None], x, 0)), 0)
