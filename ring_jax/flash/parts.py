"""Keys in parts, for backends that take them in one piece: the block is resumed from part to part.

kv then has an axis of P parts before all others, and bounds are [P, B, T]: a row sees an interval of each part. That is what
an all-gather leaves, whose keys do not ascend. Like a ring's hops, the parts are scanned beyond two, and partials stay
in float32 between them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax._vma import pcast_to, varying_axes
from ring_jax.flash.merge import partial_dtype
from ring_jax.flash.packed import fold_parts, value_size

_UNROLLED = 2


def forward(one: Callable, query, kv, start, end, carry, out_dtype=None) -> tuple[jax.Array, jax.Array]:
    """(out, lse) over all parts; one(query, kv, start, end, carry, out_dtype) is the block on one of them."""
    parts = start.shape[0]
    if parts <= _UNROLLED:
        for part in range(parts):
            dtype = out_dtype if part + 1 == parts else None
            carry = one(query, kv[part], start[part], end[part], carry, dtype)
        return carry
    if carry is None:
        dtype, rows = partial_dtype(query.dtype), query.shape[:3]
        size = value_size(fold_parts(kv, (start, end))[0], query.shape[-1])
        carry = jnp.zeros((*rows, size), dtype), jnp.full(rows, -jnp.inf, dtype)

    def step(carry, part):
        return one(query, *part, carry, None), None

    carry = pcast_to(carry, varying_axes(query, kv, start, end, carry))
    (out, lse), _ = lax.scan(step, carry, (kv, start, end))
    return out.astype(out_dtype or out.dtype), lse


def backward(one: Callable, query, kv, start, end, lse, delta, dout, dq=None) -> tuple[jax.Array, jax.Array]:
    """(dq, dkv): the sum over the parts and `dq`, and the parts' own, stacked like kv.

    one(query, kv, start, end, lse, delta, dout, dq) gives those of one part.
    """
    parts = start.shape[0]
    if parts <= _UNROLLED:
        dkv = []
        for part in range(parts):
            dq, own = one(query, kv[part], start[part], end[part], lse, delta, dout, dq)
            dkv.append(own)
        return dq, jnp.stack(dkv)
    if dq is None:
        dq = jnp.zeros(query.shape, partial_dtype(query.dtype))
    dq = pcast_to(dq, varying_axes(query, kv, start, end, lse, delta, dout, dq))
    return lax.scan(lambda dq, part: one(query, *part, lse, delta, dout, dq), dq, (kv, start, end))
