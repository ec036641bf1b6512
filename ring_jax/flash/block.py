"""The derivative rule of attention that is computed block by block: stated once, for the block and for every strategy.

Forward and backward are two functions without rules of their own. The rule saves the inputs, the final out and LSE; the backward
gets delta = rowsum(dO . O) - dLSE of each row, and the carry's cotangents follow from the LSE alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ring_jax.flash.backends import Backend
from ring_jax.flash.merge import carry_gradient, partial_dtype
from ring_jax.flash.operands import BlockOptions, Bounds, Gradients, Partial, RowGradients

OUT_NAME, LSE_NAME = "ring_jax_out", "ring_jax_lse"

# What the derivative rule keeps: query, kv, bounds, carry, out, lse.
_Saved = tuple[jax.Array, jax.Array, Bounds, Partial | None, jax.Array, jax.Array]


@dataclass(frozen=True)
class Block:
    """What computes attention to one array of keys. Hashable; a static argument.

    Attributes:
        backend: its two functions. options: what they are told.
        float_out: whether a strategy's out stays float32, to be resumed or merged; else it gets the query's dtype.
    """

    backend: Backend
    options: BlockOptions
    float_out: bool = False

    def out_dtype(self, query: jax.Array) -> jnp.dtype:
        """The dtype of a strategy's out."""
        return partial_dtype(query.dtype) if self.float_out else jnp.dtype(query.dtype)


def differentiable(
    forward: Callable[..., Partial], gradients: Callable[..., Gradients], *, tie: Literal["query", "kv"] | None = None
) -> Callable[..., Partial]:
    """attend(block, place, query, kv, bounds, carry) -> (out, lse), from its two halves.

    Args:
        forward: the same signature; `place` is static, a `Shard` for instance.
        gradients: (block, place, query, kv, bounds, rows) -> (dq, dkv).
        tie: which operand of the backward waits for the cotangent. Without that XLA merges what the backward sends between
            ranks with what the forward sent, and keeps all of it alive.
    """

    attend = jax.custom_vjp(forward, nondiff_argnums=(0, 1))

    def rule(
        block: Block, place: Any, query: jax.Array, kv: jax.Array, bounds: Bounds, carry: Partial | None
    ) -> tuple[Partial, _Saved]:
        # Named in the rule: inside the primal function of a custom VJP, remat policies do not see the names.
        out, lse = forward(block, place, query, kv, bounds, carry)
        out, lse = checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)
        return (out, lse), (query, kv, bounds, carry, out, lse)

    def pull(
        block: Block, place: Any, saved: _Saved, cotangents: Partial
    ) -> tuple[jax.Array, jax.Array, None, Partial | None]:
        query, kv, bounds, carry, out, lse = saved
        if tie == "kv":
            kv, cotangents = lax.optimization_barrier((kv, cotangents))
        elif tie == "query":
            query, cotangents = lax.optimization_barrier((query, cotangents))
        dout, dlse = cotangents
        delta = row_delta(out, dout, dlse)
        dcarry = None if carry is None else carry_gradient(carry, lse, delta, dout)
        if dout.dtype != query.dtype:
            # Kernels multiply dO in the inputs' dtype: delta must be that of the rounded dO, or what they share does not cancel.
            dout = dout.astype(query.dtype)
            delta = row_delta(out, dout, dlse)
        dq, dkv = gradients(block, place, query, kv, bounds, RowGradients(lse, delta, dout))
        return dq.astype(query.dtype), dkv.astype(kv.dtype), None, dcarry

    attend.defvjp(rule, pull)
    return attend


def row_delta(out: jax.Array, dout: jax.Array, dlse: jax.Array) -> jax.Array:
    """delta = rowsum(dO . O) - dLSE, float32 [B, T, N]."""
    return jnp.sum(dout.astype(dlse.dtype) * out.astype(dlse.dtype), axis=-1) - dlse


def _forward(
    block: Block, out_dtype: Any, query: jax.Array, kv: jax.Array, bounds: Bounds, carry: Partial | None
) -> Partial:
    return block.backend.forward(query, kv, bounds, carry, block.options, out_dtype=out_dtype)


def _gradients(
    block: Block, out_dtype: Any, query: jax.Array, kv: jax.Array, bounds: Bounds, rows: RowGradients
) -> Gradients:
    return block.backend.backward(query, kv, bounds, rows, block.options)


# One differentiable attention block on packed KV: (out, float32 lse). `place` is out's dtype, None for float32.
attention_block = differentiable(_forward, _gradients)
