"""The loss of a language model whose tokens lie over a mesh: cross entropy of every next token, chunk by chunk."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ring_jax._vma import align, pcast_to
from ring_jax.models.qwen3_5.forward import Wanted, scan_layers
from ring_jax.models.qwen3_5.layers import norm
from ring_jax.models.qwen3_5.pass_ import Pass, embed, lay_out
from ring_jax.models.qwen3_5.structure import Structure, head
from ring_jax.moe import load_balance_loss


def next_tokens(
    tokens: jax.Array, lengths: jax.Array | None, segment_ids: jax.Array | None, weights: jax.Array | None
) -> tuple[Any, ...]:
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


def _chunked(x: jax.Array, chunk: int) -> jax.Array:
    """[n, ...] as [chunks, chunk, ...], zeros at the end."""
    x = jnp.pad(x, [(0, -x.shape[0] % chunk)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, chunk, *x.shape[1:])


@dataclasses.dataclass(frozen=True)
class Loss:
    """Mean cross entropy over all ranks, logits formed `chunk` tokens at a time. Hashable."""

    model: Structure
    seq_len: int
    chunk: int

    def __repr__(self) -> str:  # jax's messages show it
        return f"loss of {self.model!r}"

    def __call__(
        self, params: Any, tokens: jax.Array, lengths: jax.Array | None, segment_ids: jax.Array | None, labels: Any
    ) -> jax.Array:
        model, wanted = self.model, Wanted(stats=self.model.config.experts is not None)
        tokens, here = lay_out(model, tokens, lengths, segment_ids, None, self.seq_len)
        x, left = scan_layers(model, params, embed(model, params, here, tokens), here, wanted)
        if model.sharding is not None:
            labels = tuple(model.sharding.context.to_layout(y) for y in labels)
        x = norm(x, params["final_norm"], model.config).reshape(-1, x.shape[-1])
        targets, weights = (y.reshape(-1) for y in labels)
        loss = _cross_entropy(x, head(params), targets, weights, here, self.chunk)
        if left.stats is not None:
            loss = loss + model.config.experts.aux_loss * load_balance_loss(left.stats)  # type: ignore[union-attr]
        return loss


@jax.custom_vjp
def _logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """In float32. Their gradient goes back in the dtype of x: products of float32 with 16 bits run as TF32, at a third of the speed
    (76 of 623 ms of loss and gradient of the 4B size, 8192 tokens, H100)."""
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _logits_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    return _logits(x, kernel), (x, kernel)


def _logits_backward(operands: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = operands
    gradient = gradient.astype(x.dtype)
    return jnp.matmul(gradient, kernel.T), jnp.matmul(x.T, gradient)


_logits.defvjp(_logits_forward, _logits_backward)


def _cross_entropy(
    x: jax.Array, kernel: jax.Array, targets: jax.Array, weights: Any, here: Pass, chunk: int
) -> jax.Array:
    chunk = min(chunk, x.shape[0])
    x, targets, weights = (_chunked(y, chunk) for y in (x, targets, weights))
    kernel = here.weight(kernel, 0, x.shape[-1], x)

    @jax.checkpoint
    def chunk_loss(total: jax.Array, operands: Any) -> tuple[jax.Array, None]:
        x, targets, weights = operands
        logits = _logits(*align(x, kernel.astype(x.dtype)))
        return total + jnp.sum(weights * here.cross_entropy(logits, targets)), None

    axes = here.token_axes()
    total, _ = jax.lax.scan(chunk_loss, pcast_to(jnp.zeros((), jnp.float32), axes), (x, targets, weights))
    count = pcast_to(jnp.sum(weights), axes)
    if axes:
        total, count = jax.lax.psum((total, count), axes)
    return total / jnp.where(count == 0, 1, count)
