"""All-gather attention: every rank gathers all of KV at once and attends in two calls.

    start gathering KV;  the rank's own keys, which need no transfer;  resume on those of all other ranks, in rank order

On a balanced layout that is balanced work without hops. Costs O(S) memory for KV on every rank. One all-gather forward;
backward one again (KV is not kept) and one reduce-scatter of float32 dKV, which hides behind the gradients of the
rank's own keys.

Source: Llama 3, arXiv 2407.21783, section 3.3.2.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax.context.shard import Shard
from ring_jax.flash.api import Partial, Spec, delta_of, named
from ring_jax.flash.merge import carry_gradient
from ring_jax.flash.packed import seq_axis


def _others(shard: Shard, start, end) -> list[jax.Array]:
    """Bounds on the keys of every rank, [C, B, T] each; those on the rank's own are empty."""
    sources = jnp.arange(shard.ranks, dtype=start.dtype)[:, None, None]
    return [jnp.where(sources == shard.rank(), 0, x) for x in shard.local_bounds(start, end, sources)]


def _in_one_call(spec: Spec, shard: Shard) -> bool:
    """A backend that knows the mask to be full reads no bounds, and minds neither order nor parts."""
    return shard.ranks == 1 or spec.backend.whole == "full"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def all_gather(spec: Spec, shard: Shard, query, kv, start, end, carry: Partial | None) -> Partial:
    """(out in the query's dtype, float32 lse) of the local queries; start, end are global key bounds."""
    return _forward(spec, shard, query, kv, start, end, carry)


def _forward(spec: Spec, shard: Shard, query, kv, start, end, carry: Partial | None) -> Partial:
    own = shard.local_bounds(start, end, shard.rank())
    if _in_one_call(spec, shard):
        kv = lax.all_gather(kv, shard.axis, axis=seq_axis(kv), tiled=True)
        return spec.forward(query, kv, *own, carry, query.dtype)
    gathered = lax.all_gather(kv, shard.axis)
    carry = spec.forward(query, kv, *own, carry)
    first, last = _others(shard, start, end)
    return spec.forward(query, gathered, first, last, carry, query.dtype)


def _all_gather_fwd(spec, shard, query, kv, start, end, carry):
    out, lse = named(*_forward(spec, shard, query, kv, start, end, carry))
    return (out, lse), (query, kv, start, end, carry, out, lse)


def _all_gather_bwd(spec, shard, saved, cotangents):
    query, kv, start, end, carry, out, lse = saved
    # Tied to the cotangent, or XLA would merge this gather with the forward's and keep all of KV alive.
    kv, (dout, dlse) = lax.optimization_barrier((kv, cotangents))
    delta = delta_of(out, dout, dlse)
    own = shard.local_bounds(start, end, shard.rank())
    axis = seq_axis(kv)
    if _in_one_call(spec, shard):
        gathered = lax.all_gather(kv, shard.axis, axis=axis, tiled=True)
        dq, dkv = spec.backward(query, gathered, *own, lse, delta, dout)
        dkv = lax.psum_scatter(dkv, shard.axis, scatter_dimension=axis, tiled=True)
    else:
        dq, dkv = spec.backward(query, lax.all_gather(kv, shard.axis), *_others(shard, start, end), lse, delta, dout)
        dkv = lax.psum_scatter(dkv, shard.axis)
        # The rank's own keys last: to sum what belongs to the others is twice the gather, and hides behind them.
        dq, dkv_own = spec.backward(query, kv, *own, lse, delta, dout, dq)
        dkv += dkv_own
    dcarry = None if carry is None else carry_gradient(carry, lse, delta, dout)
    return dq.astype(query.dtype), dkv.astype(kv.dtype), None, None, dcarry


all_gather.defvjp(_all_gather_fwd, _all_gather_bwd)
