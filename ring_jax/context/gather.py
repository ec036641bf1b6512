"""All-gather attention: every rank gathers all of KV once and makes one call over its own queries.

On a balanced layout that is one balanced call without hops: the best for short shards on NVLink. Costs
O(S) memory for KV on every rank. One all-gather forward; backward one again (KV is not kept) and one
reduce-scatter of float32 dKV.

Source: Llama 3, arXiv 2407.21783, section 3.3.2.
"""

import functools

import jax
from jax import lax

from ring_jax.context.shard import Shard
from ring_jax.flash.api import Partial, Spec, delta_of, named
from ring_jax.flash.merge import carry_gradient
from ring_jax.flash.packed import seq_axis


def _gathered(shard: Shard, kv):
    kv = lax.all_gather(kv, shard.axis, axis=seq_axis(kv), tiled=True)
    # Keys of several ranks do not ascend in rank order; bounds speak of natural order.
    return shard.layout.restore(kv, seq_axis(kv), shard.ranks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def all_gather(spec: Spec, shard: Shard, query, kv, start, end, carry: Partial | None) -> Partial:
    """(out in the query's dtype, float32 lse) of the local queries; start, end are global key bounds."""
    return _forward(spec, shard, query, kv, start, end, carry)


def _forward(spec: Spec, shard: Shard, query, kv, start, end, carry: Partial | None) -> Partial:
    return spec.forward(query, _gathered(shard, kv), start, end, carry, query.dtype)


def _all_gather_fwd(spec, shard, query, kv, start, end, carry):
    out, lse = named(*_forward(spec, shard, query, kv, start, end, carry))
    return (out, lse), (query, kv, start, end, carry, out, lse)


def _all_gather_bwd(spec, shard, saved, cotangents):
    query, kv, start, end, carry, out, lse = saved
    kv, (dout, dlse) = lax.optimization_barrier((kv, cotangents))
    delta = delta_of(out, dout, dlse)
    dq, dkv = spec.backward(query, _gathered(shard, kv), start, end, lse, delta, dout)
    axis = seq_axis(kv)
    dkv = lax.psum_scatter(shard.layout.scatter(dkv, axis, shard.ranks), shard.axis, scatter_dimension=axis, tiled=True)
    dcarry = None if carry is None else carry_gradient(carry, lse, delta, dout)
    return dq.astype(query.dtype), dkv.astype(kv.dtype), None, None, dcarry


all_gather.defvjp(_all_gather_fwd, _all_gather_bwd)
