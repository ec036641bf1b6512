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

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax.context.shard import Shard, rotate
from ring_jax.flash.api import Partial, Spec, delta_of, named
from ring_jax.flash.merge import carry_gradient, merge_partials


def _join(out, lse):
    return jnp.concatenate([out, lse[..., None]], axis=-1)


def _split(partial) -> Partial:
    return partial[..., :-1], partial[..., -1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def pass_q(spec: Spec, shard: Shard, query, kv, start, end, carry: Partial | None) -> Partial:
    """(out in the query's dtype, float32 lse) of the local queries; start, end are global key bounds."""
    return _forward(spec, shard, query, kv, start, end, carry)


def _forward(spec: Spec, shard: Shard, query, kv, start, end, carry: Partial | None) -> Partial:
    def hop(travel, stay, source, own, final):
        query, (start, end) = travel
        here = shard.local_bounds(start, end, shard.rank())
        return stay, _join(*spec.forward(query, kv, *here, None))

    def merge(a, b):
        return _join(*merge_partials(*_split(a), *_split(b)))

    travel = (query, jnp.stack([start, end]))
    _, partial = rotate(shard, spec.backend.unroll, hop, travel, (), merge)
    out, lse = _split(partial) if carry is None else merge_partials(*_split(partial), *carry)
    return out.astype(query.dtype), lse


def _pass_q_fwd(spec, shard, query, kv, start, end, carry):
    out, lse = named(*_forward(spec, shard, query, kv, start, end, carry))
    return (out, lse), (query, kv, start, end, carry, out, lse)


def _pass_q_bwd(spec, shard, saved, cotangents):
    query, kv, start, end, carry, out, lse = saved
    query, (dout, dlse) = lax.optimization_barrier((query, cotangents))
    delta = delta_of(out, dout, dlse)
    head_size = query.shape[-1]

    def hop(travel, dkv, source, own, final):
        query_dout, (lse, delta), (start, end) = travel
        query, dout = query_dout[..., :head_size], query_dout[..., head_size:]
        here = shard.local_bounds(start, end, shard.rank())
        dq, part = spec.backward(query, kv, *here, lse, delta, dout)
        return part if dkv is None else dkv + part, dq

    travel = (
        jnp.concatenate([query, dout.astype(query.dtype)], axis=-1),
        jnp.stack([lse, delta]),
        jnp.stack([start, end]),
    )
    dkv, dq = rotate(shard, spec.backend.unroll, hop, travel, None, jnp.add)
    dcarry = None if carry is None else carry_gradient(carry, lse, delta, dout)
    return dq.astype(query.dtype), dkv.astype(kv.dtype), None, None, dcarry


pass_q.defvjp(_pass_q_fwd, _pass_q_bwd)
