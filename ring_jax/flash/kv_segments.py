"""Keys in segments, for blocks that take them in one piece: the block is resumed from segment to segment.

kv then has an axis of P segments before all others, and bounds are [P, B, T]: a row sees an interval of each segment. That is
what an all-gather leaves, whose keys do not ascend. Like a ring's hops, the segments are scanned beyond two, and partials stay
in float32 between them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from ring_jax._vma import pcast_to, varying_axes
from ring_jax.flash.kv import fold_segments, value_size
from ring_jax.flash.merge import partial_dtype
from ring_jax.flash.operands import Bounds, Gradients, Partial, RowGradients

_UNROLLED = 2


def forward(
    one: Callable[..., Partial],
    query: jax.Array,
    kv: jax.Array,
    bounds: Bounds,
    carry: Partial | None,
    out_dtype: DTypeLike | None = None,
) -> Partial:
    """(out, lse) over all segments; one(query, kv, bounds, carry, out_dtype) is the block on one of them."""
    start, end = bounds
    segments = start.shape[0]
    if segments <= _UNROLLED:
        for i in range(segments):
            dtype = out_dtype if i + 1 == segments else None
            carry = one(query, kv[i], Bounds(start[i], end[i]), carry, dtype)
        assert carry is not None
        return carry
    if carry is None:
        dtype, rows = partial_dtype(query.dtype), query.shape[:3]
        size = value_size(fold_segments(kv, bounds)[0], query.shape[-1])
        carry = jnp.zeros((*rows, size), dtype), jnp.full(rows, -jnp.inf, dtype)

    def step(carry: Partial, segment: tuple[jax.Array, Bounds]) -> tuple[Partial, None]:
        return one(query, *segment, carry, None), None

    carry = pcast_to(carry, varying_axes(query, kv, start, end, carry))
    (out, lse), _ = lax.scan(step, carry, (kv, bounds))
    return out.astype(out_dtype or out.dtype), lse


def backward(
    one: Callable[..., Gradients],
    query: jax.Array,
    kv: jax.Array,
    bounds: Bounds,
    rows: RowGradients,
    dq: jax.Array | None = None,
) -> Gradients:
    """(dq, dkv): the sum over the segments and `dq`, and the segments' own, stacked like kv.

    one(query, kv, bounds, rows, dq) gives those of one segment.
    """
    segments = bounds.start.shape[0]
    if segments <= _UNROLLED:
        dkv = []
        for i in range(segments):
            dq, own = one(query, kv[i], Bounds(bounds.start[i], bounds.end[i]), rows, dq)
            dkv.append(own)
        assert dq is not None
        return dq, jnp.stack(dkv)
    if dq is None:
        dq = jnp.zeros(query.shape, partial_dtype(query.dtype))
    dq = pcast_to(dq, varying_axes(query, kv, bounds, rows, dq))
    return lax.scan(lambda dq, segment: one(query, *segment, rows, dq), dq, (kv, bounds))
