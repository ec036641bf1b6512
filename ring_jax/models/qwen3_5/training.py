"""The loss of a language model whose tokens lie over a mesh: cross entropy of every next token, chunk by chunk."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from ring_jax._vma import pcast_to
from ring_jax.models.qwen3_5.layers import norm
from ring_jax.models.qwen3_5.passes import Ask, encode, head
from ring_jax.moe import load_balance_loss


def next_tokens(tokens, lengths, segment_ids, weights):
    """(the token after each, float32 weight of predicting it), natural order [B, S]."""
    batch, length = tokens.shape
    after = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))  # noqa: E731
    counts = jnp.broadcast_to((jnp.arange(length) < length - 1)[None], tokens.shape)
    if lengths is not None:
        counts &= jnp.arange(1, length + 1, dtype=lengths.dtype)[None] < lengths[:, None]
    if segment_ids is not None:
        counts &= (segment_ids >= 0) & (segment_ids == after(segment_ids))
    weight = counts.astype(jnp.float32)
    return after(tokens), weight if weights is None else weight * after(weights).astype(jnp.float32)


def _chunked(x, chunk: int):
    """[n, ...] as [chunks, chunk, ...], zeros at the end."""
    x = jnp.pad(x, [(0, -x.shape[0] % chunk)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, chunk, *x.shape[1:])


def local_loss(params, tokens, lengths, segment_ids, labels, graph, ask: Ask) -> jax.Array:
    """Mean cross entropy over all ranks, logits formed chunk by chunk."""
    model = nnx.merge(graph, nnx.State(params))
    here, x, left = encode(model, tokens, lengths, segment_ids, ask)
    if model.sharding is not None:
        labels = tuple(model.sharding.context.to_layout(y) for y in labels)
    targets, weights = (y.reshape(-1) for y in labels)
    x = norm(x, model.final_norm, model.config).reshape(-1, x.shape[-1])
    chunk = min(ask.chunk, x.shape[0])
    x, targets, weights = (_chunked(y, chunk) for y in (x, targets, weights))
    kernel = here.weight(head(model), 0, x.shape[-1], x)

    @jax.checkpoint
    def chunk_loss(total, operands):
        x, targets, weights = operands
        logits = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        return total + jnp.sum(weights * here.cross_entropy(logits, targets)), None

    axes = here.token_axes()
    total, _ = jax.lax.scan(chunk_loss, pcast_to(jnp.zeros((), jnp.float32), axes), (x, targets, weights))
    count = pcast_to(jnp.sum(weights), axes)
    if axes:
        total, count = jax.lax.psum((total, count), axes)
    loss = total / jnp.where(count == 0, 1, count)
    if left.stats is not None:
        experts = model.config.experts
        loss = loss + experts.aux_loss * load_balance_loss(left.stats)
    return loss
