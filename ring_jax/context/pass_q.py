"""Ring attention, pass-Q: queries travel with their bounds, keys and values stay.

    hop i of C:  start the permute of the queries; attend to the KV that lives here; the partial result
                 follows its queries one hop behind, merging on the way, and comes home after C hops

Cheaper than pass-KV where the keys are many and the queries few: a short chunk after a long cached
prefix. Forward C - 1 permutes each of queries and bounds and of the partials (out and lse in one
array); backward C - 1 of (query, dO), of (lse, delta), of the bounds and of dQ; dKV stays. A rank's own queries come
last, and hide their partials' way home.

Source: Yang et al., Context Parallelism for Scalable Million-Token Inference, arXiv 2411.01783 (pass-Q;
there partials return in one all-to-all, here they ride the ring, which needs O(1) buffers).
"""

import jax
import jax.numpy as jnp

from ring_jax.context.shard import Shard, rotate
from ring_jax.flash.block import Block, differentiable
from ring_jax.flash.merge import merge_partials
from ring_jax.flash.operands import Bounds, Gradients, Partial, RowGradients
from ring_jax.layout import Index


def _join(out: jax.Array, lse: jax.Array) -> jax.Array:
    return jnp.concatenate([out, lse[..., None]], axis=-1)


def _split(partial: jax.Array) -> Partial:
    return partial[..., :-1], partial[..., -1]


def _forward(
    block: Block, shard: Shard, query: jax.Array, kv: jax.Array, bounds: Bounds, carry: Partial | None
) -> Partial:
    def hop(
        travel: tuple[jax.Array, jax.Array], stay: tuple[()], source: Index, own: bool, final: bool
    ) -> tuple[tuple[()], jax.Array]:
        query, bounds = travel
        here = shard.local_bounds(Bounds(*bounds), shard.rank())
        return stay, _join(*block.backend.forward(query, kv, here, None, block.options))

    def merge(a: jax.Array, b: jax.Array) -> jax.Array:
        return _join(*merge_partials(*_split(a), *_split(b)))

    travel = (query, jnp.stack(bounds))
    _, partial = rotate(shard, block.backend.unroll, hop, travel, (), merge)
    out, lse = _split(partial) if carry is None else merge_partials(*_split(partial), *carry)
    return out.astype(block.out_dtype(query)), lse


def _gradients(
    block: Block, shard: Shard, query: jax.Array, kv: jax.Array, bounds: Bounds, rows: RowGradients
) -> Gradients:
    head_size = query.shape[-1]

    def hop(
        travel: tuple[jax.Array, jax.Array, jax.Array], dkv: jax.Array | None, source: Index, own: bool, final: bool
    ) -> tuple[jax.Array, jax.Array]:
        query_dout, (lse, delta), bounds = travel
        query, dout = query_dout[..., :head_size], query_dout[..., head_size:]
        here = shard.local_bounds(Bounds(*bounds), shard.rank())
        dq, added = block.backend.backward(query, kv, here, RowGradients(lse, delta, dout), block.options)
        return added if dkv is None else dkv + added, dq

    query_dout = jnp.concatenate([query, rows.dout], axis=-1)
    travel = (query_dout, jnp.stack([rows.lse, rows.delta]), jnp.stack(bounds))
    dkv, dq = rotate(shard, block.backend.unroll, hop, travel, None, jnp.add)
    return dq, dkv


# (out in `Block.out_dtype`, float32 lse) of the local queries; bounds are of global key positions.
pass_q = differentiable(_forward, _gradients, tie="query")
