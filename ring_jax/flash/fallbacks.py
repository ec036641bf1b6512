"""What a backend that computes one plain block lacks of the contract of `flash.backends`, in terms of that block.

`complete` puts these around a backend where it is registered, so that strategies never ask what a backend can do:

- keys in segments: the block is resumed from segment to segment;
- a share of the KV heads: queries, rows and results are sliced;
- dq to add to: added.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ring_jax._vma import pcast_to, varying_axes
from ring_jax.flash import kv_segments
from ring_jax.flash.kv import HeadSlice
from ring_jax.flash.operands import BlockOptions, Bounds, Gradients, Partial, RowGradients


def complete_forward(one: Callable[..., Partial]) -> Callable[..., Partial]:
    """`one(query, kv, bounds, carry, options, out_dtype=)` as the forward function of a backend."""

    def forward(
        query: jax.Array,
        kv: jax.Array,
        bounds: Bounds,
        carry: Partial | None,
        options: BlockOptions,
        *,
        out_dtype: Any = None,
        heads: HeadSlice | None = None,
        into: Partial | None = None,
    ) -> Partial:
        def plain(
            query: jax.Array, kv: jax.Array, bounds: Bounds, carry: Partial | None, out_dtype: DTypeLike | None
        ) -> Partial:
            return one(query, kv, bounds, carry, options, out_dtype=out_dtype)

        run = plain if bounds.start.ndim == 2 else lambda *x: kv_segments.forward(plain, *x)
        if heads is None:
            return run(query, kv, bounds, carry, out_dtype)
        mine = heads.query_heads(query, kv)
        carry = None if carry is None else (carry[0][:, :, mine], carry[1][:, :, mine])
        out, lse = run(query[:, :, mine], kv, bounds, carry, out_dtype)
        if into is None:  # the other heads are undefined
            shape, axes = (*query.shape[:3], out.shape[-1]), varying_axes(out, lse)
            into = pcast_to((jnp.zeros(shape, out.dtype), jnp.zeros(shape[:3], lse.dtype)), axes)
        return into[0].at[:, :, mine].set(out), into[1].at[:, :, mine].set(lse)

    return forward


def complete_backward(one: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """`one(query, kv, bounds, rows, options)` as the backward function of a backend."""

    def backward(
        query: jax.Array,
        kv: jax.Array,
        bounds: Bounds,
        rows: RowGradients,
        options: BlockOptions,
        *,
        dq: jax.Array | None = None,
        heads: HeadSlice | None = None,
    ) -> Gradients:
        def plain(
            query: jax.Array, kv: jax.Array, bounds: Bounds, rows: RowGradients, dq: jax.Array | None
        ) -> tuple[jax.Array, jax.Array]:
            added, dkv = one(query, kv, bounds, rows, options)
            return added if dq is None else dq + added, dkv

        run = plain if bounds.start.ndim == 2 else lambda *x: kv_segments.backward(plain, *x)
        if heads is None:
            return run(query, kv, bounds, rows, dq)
        mine = heads.query_heads(query, kv)
        added, dkv = run(query[:, :, mine], kv, bounds, RowGradients(*(x[:, :, mine] for x in rows)), None)
        if dq is None:
            dq = pcast_to(jnp.zeros(query.shape, added.dtype), varying_axes(added))
        return dq.at[:, :, mine].add(added), dkv

    return backward
