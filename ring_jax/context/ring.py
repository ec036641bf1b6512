"""Ring attention, pass-KV: the packed KV travels, queries and their partial results stay.

    hop i of C:  start the permute of KV to the next rank; resume (out, lse) on the KV that is here

Forward C - 1 permutes of KV. The backward is one rule around the whole ring, from the final out and
LSE: KV travels again and its float32 gradients follow and come home, C - 1 permutes each, dQ stays. A rank's own
keys come half of their heads first, where they hide the first permute of KV, and half last, where they hide the gradients'
way home; all last where halves are too little work, or the block takes none.

Source: Liu, Zaharia and Abbeel, Ring Attention with Blockwise Transformers, arXiv 2310.01889.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax.context import cudnn_ring
from ring_jax.context.shard import Shard, rotate
from ring_jax.flash.block import Block, differentiable
from ring_jax.flash.kv import halve_heads
from ring_jax.flash.operands import Bounds, Gradients, Partial, RowGradients
from ring_jax.layout import Index


def _forward(
    block: Block, shard: Shard, query: jax.Array, kv: jax.Array, bounds: Bounds, carry: Partial | None
) -> Partial:
    fixed_causal = block.backend.fixed_mask == "causal"
    if not fixed_causal:
        # Bounds before the first permute, which would otherwise run beside them and nothing else.
        kv, own_bounds = lax.optimization_barrier((kv, shard.local_bounds(bounds, shard.rank())))

    def hop(kv: jax.Array, partial: Partial | None, source: Index, own: bool, final: bool) -> tuple[Partial, None]:
        if fixed_causal:
            return cudnn_ring.forward(block, shard, query, kv, bounds, partial, source, own), None
        here = own_bounds if own else shard.local_bounds(bounds, source)
        out_dtype = block.out_dtype(query) if final else None
        return block.backend.forward(query, kv, here, partial, block.options, out_dtype=out_dtype), None

    (out, lse), _ = rotate(shard, block.backend.unroll, hop, kv, carry)
    return out.astype(block.out_dtype(query)), lse


def _gradients(
    block: Block, shard: Shard, query: jax.Array, kv: jax.Array, bounds: Bounds, rows: RowGradients
) -> Gradients:
    fixed_causal = block.backend.fixed_mask == "causal"
    both_ends = shard.ranks > 1 and block.backend.can_split_heads(query, kv)

    def hop(
        kv: jax.Array, stay: tuple[jax.Array | None, jax.Array | None], source: Index, own: bool, final: bool
    ) -> tuple[tuple[jax.Array | None, jax.Array | None], jax.Array | None]:
        dq, early = stay
        if fixed_causal:
            added, dkv = cudnn_ring.backward(block, shard, query, kv, bounds, rows, source, own)
            return (added if dq is None else dq + added, None), dkv
        here = shard.local_bounds(bounds, source)
        if not (own and both_ends):
            dq, dkv = block.backend.backward(query, kv, here, rows, block.options, dq=dq)
            return (dq, early), dkv
        first_half, last_half = halve_heads(kv)
        heads, kv = last_half if final else first_half
        dq, dkv = block.backend.backward(query, kv, here, rows, block.options, dq=dq, heads=heads)
        if not final:
            return (dq, dkv), None
        assert early is not None
        return (dq, None), jnp.concatenate([early, dkv], axis=-2)

    (dq, _), dkv = rotate(shard, block.backend.unroll, hop, kv, (None, None), jnp.add, both_ends)
    return dq, dkv


# (out in `Block.out_dtype`, float32 lse) of the local queries; bounds are of global key positions.
ring = differentiable(_forward, _gradients, tie="kv")
