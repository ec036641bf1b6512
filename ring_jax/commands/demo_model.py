"""The byte-level transformer of ``ring-jax demo``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import ring_jax
from ring_jax.nn.attention import Attention

VOCABULARY = 256


class Block(nnx.Module):
    """Pre-norm attention and a gated MLP."""

    def __init__(self, features: int, num_heads: int, context: ring_jax.ContextParallel | None, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(features, rngs=rngs)
        self.attention = Attention(
            features, num_heads, num_kv_heads=num_heads // 2, qk_norm=True, context=context, rngs=rngs
        )
        self.mlp_norm = nnx.RMSNorm(features, rngs=rngs)
        self.up = nnx.Linear(features, 4 * features, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(2 * features, features, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], seq_len: int | None) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), seq_len=seq_len)
        gate, up = jnp.split(self.up(self.mlp_norm(x)), 2, axis=-1)
        return x + self.down(jax.nn.silu(gate) * up)


class ByteModel(nnx.Module):
    """Bytes [B, T] to logits [B, T, 256], in the order of the context's layout."""

    def __init__(
        self,
        features: int = 64,
        num_heads: int = 2,
        num_layers: int = 2,
        *,
        context: ring_jax.ContextParallel | None,
        rngs: nnx.Rngs,
    ):
        self.embed = nnx.Embed(VOCABULARY, features, rngs=rngs)
        self.blocks = nnx.List([Block(features, num_heads, context, rngs) for _ in range(num_layers)])
        self.norm = nnx.RMSNorm(features, rngs=rngs)
        self.head = nnx.Linear(features, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"], seq_len: int | None = None) -> Float[Array, "B T V"]:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, seq_len)
        return self.head(self.norm(x))

    def set_context(self, context: ring_jax.ContextParallel | None) -> None:
        """Spreads attention over another context; None for one device."""
        for block in self.blocks:
            block.attention.context = context


def cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], weights: Float[Array, "B T"]
) -> Float[Array, ""]:
    """Mean of -log p(target) in nats over the tokens with weight 1."""
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(log_p * weights) / jnp.sum(weights)


def loss_fn(
    model: ByteModel, inputs: Int[Array, "B T"], targets: Int[Array, "B T"], weights: Float[Array, "B T"], seq_len: int
) -> Float[Array, ""]:
    """Cross entropy of the next byte."""
    return cross_entropy(model(inputs, seq_len), targets, weights)
