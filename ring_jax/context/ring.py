"""Ring attention, pass-KV: the packed KV travels, queries and their partial results stay.

    hop i of C:  start the permute of KV to the next rank; resume (out, lse) on the KV that is here

Forward C - 1 permutes of KV. The backward is one rule around the whole ring, from the final out and
LSE: KV travels again and its float32 gradients follow and come home, C - 1 permutes each, dQ stays. A rank's own
keys come half of their heads first, where they hide the first permute of KV, and half last, where they hide the gradients'
way home; all last where halves are too little work, or the block takes none.

Source: Liu, Zaharia and Abbeel, Ring Attention with Blockwise Transformers, arXiv 2310.01889.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax.context import halves
from ring_jax.context.shard import Shard, rotate
from ring_jax.flash import packed
from ring_jax.flash.api import Partial, Spec, delta_of, named
from ring_jax.flash.merge import carry_gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def ring(spec: Spec, shard: Shard, query, kv, start, end, carry: Partial | None) -> Partial:
    """(out in the query's dtype, float32 lse) of the local queries; start, end are global key bounds."""
    return _forward(spec, shard, query, kv, start, end, carry)


def _forward(spec: Spec, shard: Shard, query, kv, start, end, carry: Partial | None) -> Partial:
    whole = spec.backend.whole == "causal"
    if not whole:
        # Bounds before the first permute, which would otherwise run beside them and nothing else.
        kv, own_bounds = lax.optimization_barrier((kv, shard.local_bounds(start, end, shard.rank())))

    def hop(kv, partial, source, own, final):
        if whole:
            return halves.forward(spec, shard, query, kv, start, end, partial, source, own), None
        here = own_bounds if own else shard.local_bounds(start, end, source)
        return spec.forward(query, kv, *here, partial, query.dtype if final else None), None

    (out, lse), _ = rotate(shard, spec.backend.unroll, hop, kv, carry)
    return out.astype(query.dtype), lse


def _ring_fwd(spec, shard, query, kv, start, end, carry):
    out, lse = named(*_forward(spec, shard, query, kv, start, end, carry))
    return (out, lse), (query, kv, start, end, carry, out, lse)


def _ring_bwd(spec, shard, saved, cotangents):
    query, kv, start, end, carry, out, lse = saved
    # Tied to the cotangent, or XLA would merge this rotation with the forward's and keep all of KV alive.
    kv, (dout, dlse) = lax.optimization_barrier((kv, cotangents))
    delta = delta_of(out, dout, dlse)
    whole = spec.backend.whole == "causal"
    both_ends = shard.ranks > 1 and spec.backend.takes_halves(query, kv)

    def hop(kv, stay, source, own, final):
        dq, early = stay
        if whole:
            part, dkv = halves.backward(spec, shard, query, kv, start, end, lse, delta, dout, source, own)
            return (part if dq is None else dq + part, None), dkv
        here = shard.local_bounds(start, end, source)
        if not (own and both_ends):
            dq, dkv = spec.backward(query, kv, *here, lse, delta, dout, dq)
            return (dq, early), dkv
        heads, kv = packed.halve_heads(kv)[1 if final else 0]
        dq, dkv = spec.backward(query, kv, *here, lse, delta, dout, dq, heads=heads)
        return (dq, None if final else dkv), jnp.concatenate([early, dkv], axis=-2) if final else None

    (dq, _), dkv = rotate(shard, spec.backend.unroll, hop, kv, (None, None), jnp.add, both_ends)
    dcarry = None if carry is None else carry_gradient(carry, lse, delta, dout)
    return dq.astype(query.dtype), dkv.astype(kv.dtype), None, None, dcarry


ring.defvjp(_ring_fwd, _ring_bwd)
