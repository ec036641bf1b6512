"""All-gather attention: every rank gathers all of KV at once and attends in two calls.

    start gathering KV;  the rank's own keys, which need no transfer;  resume on those of all other ranks, in rank order

On a balanced layout that is balanced work without hops. Costs O(S) memory for KV on every rank. One all-gather forward;
backward one again (KV is not kept) and one reduce-scatter of float32 dKV, which hides behind the gradients of the rank's own
keys. Blocks that take halves of the heads (`Backend.takes_halves`) get the own keys at both ends, so that the gather hides, too;
and where shards are so short that it outlasts a rank's own keys, halves of the heads are gathered one after the other: the second
travels while the first is worked on.

Source: Llama 3, arXiv 2407.21783, section 3.3.2.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax.context.shard import Shard
from ring_jax.flash import packed
from ring_jax.flash.api import Partial, Spec, delta_of, named
from ring_jax.flash.merge import carry_gradient
from ring_jax.flash.packed import Heads, seq_axis

T = TypeVar("T")
Bounds = tuple[jax.Array, jax.Array]  # of the local keys: first, and one past the last

# What a block does while NCCL gathers a byte (H200s on NVLink: 550 TFLOP/s, 150 GB/s).
_FLOPS_PER_BYTE = 3700


def _others(shard: Shard, start, end) -> Bounds:
    """Bounds on the keys of every rank, [C, B, T] each; those on the rank's own are empty."""
    sources = jnp.arange(shard.ranks, dtype=start.dtype)[:, None, None]
    bounds = shard.local_bounds(start[None], end[None], sources)
    first, last = (jnp.where(sources == shard.rank(), 0, x) for x in bounds)
    return first, last


def _in_one_call(spec: Spec, shard: Shard) -> bool:
    """A backend that knows the mask to be full reads no bounds, and minds neither order nor parts."""
    return shard.ranks == 1 or spec.backend.whole == "full"


def _shares(spec: Spec, shard: Shard, query, kv) -> list[tuple[Heads | None, jax.Array]]:
    """What to gather one after the other: halves of the heads where all of them take longer than attention to the rank's
    own keys (of which a causal mask leaves half), else all at once."""
    travel = (shard.ranks - 1) * kv.shape[-2] * kv.dtype.itemsize * _FLOPS_PER_BYTE
    work = query.shape[1] * query.shape[2]
    return packed.halve_heads(kv) if travel > work and spec.backend.takes_halves(query, kv) else [(None, kv)]


def _gather(shard: Shard, shares, own: Callable[[], T]) -> tuple[list[jax.Array], T]:
    """(what the ranks have of each share, own()): the first share travels beside own(), the others start after it."""
    gathered, result = [shard.gather(shares[0][1])], own()
    for _, kv in shares[1:]:
        # Or XLA would join the two gathers, or begin neither behind own().
        kv, gathered, result = lax.optimization_barrier((kv, gathered, result))
        gathered.append(shard.gather(kv))
    return gathered, result


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def all_gather(spec: Spec, shard: Shard, query, kv, start, end, carry: Partial | None) -> Partial:
    """(out in the query's dtype, float32 lse) of the local queries; start, end are global key bounds."""
    return _forward(spec, shard, query, kv, start, end, carry)


def _forward(spec: Spec, shard: Shard, query, kv, start, end, carry: Partial | None) -> Partial:
    own = shard.local_bounds(start, end, shard.rank())
    if _in_one_call(spec, shard):
        return spec.forward(query, shard.gather(kv, seq_axis(kv)), *own, carry, query.dtype)
    shares = _shares(spec, shard, query, kv)
    gathered, carry = _gather(shard, shares, lambda: spec.forward(query, kv, *own, carry))
    others = _others(shard, start, end)
    result: Any = None
    for (heads, _), kv in zip(shares, gathered, strict=True):
        result = spec.forward(query, kv, *others, carry, query.dtype, heads, result)
    return result


def _all_gather_fwd(spec, shard, query, kv, start, end, carry):
    out, lse = named(*_forward(spec, shard, query, kv, start, end, carry))
    return (out, lse), (query, kv, start, end, carry, out, lse)


def _all_gather_bwd(spec, shard, saved, cotangents):
    query, kv, start, end, carry, out, lse = saved
    # Tied to the cotangent, or XLA would merge this gather with the forward's and keep all of KV alive.
    kv, (dout, dlse) = lax.optimization_barrier((kv, cotangents))
    rows = lse, delta_of(out, dout, dlse), dout
    own = shard.local_bounds(start, end, shard.rank())
    if _in_one_call(spec, shard):
        dq, dkv = spec.backward(query, shard.gather(kv, seq_axis(kv)), *own, *rows)
        dkv = shard.sum_scatter(dkv, seq_axis(kv))
    else:
        dq, dkv = _gradients(spec, shard, query, kv, own, _others(shard, start, end), rows)
    dcarry = None if carry is None else carry_gradient(carry, *rows)
    return dq.astype(query.dtype), dkv.astype(kv.dtype), None, None, dcarry


def _gradients(spec: Spec, shard: Shard, query, kv, own: Bounds, others: Bounds, rows) -> Partial:
    """dq and dkv, float32. The rank's own keys come at both ends if they can be halved, else last: to sum what belongs to the
    others takes twice as long as to gather their keys."""
    lse, delta, dout = rows
    *early, late = packed.halve_heads(kv) if spec.backend.takes_halves(query, kv) else [(None, kv)]

    def own_keys(dq, shares):
        found = []
        for heads, share in shares:
            dq, dkv = spec.backward(query, share, *own, lse, delta, dout, dq, heads)
            found.append(dkv)
        return dq, found

    shares = _shares(spec, shard, query, kv)
    gathered, (dq, dkv_early) = _gather(shard, shares, lambda: own_keys(None, early))
    home: list[jax.Array] = []
    for (heads, _), share in zip(shares, gathered, strict=True):
        dq, dkv = spec.backward(query, share, *others, lse, delta, dout, dq, heads)
        if home:  # see `_gather`
            dkv, home = lax.optimization_barrier((dkv, home))
        home.append(shard.sum_scatter(dkv))
    dq, dkv_late = own_keys(dq, [late])
    return dq, jnp.concatenate(home, axis=-2) + jnp.concatenate(dkv_early + dkv_late, axis=-2)


all_gather.defvjp(_all_gather_fwd, _all_gather_bwd)
