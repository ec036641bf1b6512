"""A causal ring for blocks that know no bounds, only whole masks (cuDNN): every hop is cut into whole pieces.

Two-chunk zigzag: rank r holds the chunks r and 2C-1-r, its low and its high half. On its own keys it is causal. Of
the keys of another rank s, its high queries see all low keys; beside those its low queries see the low keys where
s < r, and its high queries the high keys where s > r. Which of the two is a value on the device, but both have one shape: the
operands are selected, so no branch makes the host wait, and every rank does the same work.

Contiguous: of the keys of rank s its queries see all where s < r, else nothing; that work is done and thrown away.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp

from ring_jax.context.shard import Shard
from ring_jax.flash.backends import CUDNN
from ring_jax.flash.block import Block
from ring_jax.flash.kv import seq_axis
from ring_jax.flash.merge import merge_partials
from ring_jax.flash.operands import Bounds, Gradients, Partial, RowGradients
from ring_jax.layout import Contiguous, Index, Layout, Zigzag

T = TypeVar("T")


def serves(layout: Layout) -> bool:
    """Whether a causal ring over this layout can be cut into whole pieces. By value: what derives from these may order otherwise."""
    return layout in (Contiguous(), Zigzag())


def forward(
    block: Block,
    shard: Shard,
    query: jax.Array,
    kv: jax.Array,
    bounds: Bounds,
    partial: Partial | None,
    source: Index,
    own: bool,
) -> Partial:
    """One hop: `partial` resumed on the KV of rank `source`; `own` says, statically, that it is this rank."""
    if own:
        return block.backend.forward(query, kv, bounds, partial, block.options)
    assert partial is not None
    attend, options = CUDNN["full"].forward, block.options
    earlier = source < shard.rank()
    if shard.layout == Contiguous():
        out, lse = attend(query, kv, bounds, None, options)
        return merge_partials(partial[0], partial[1], out, jnp.where(earlier, lse, -jnp.inf))
    q, k = (_halves(x, axis) for x, axis in ((query, 1), (kv, seq_axis(kv))))
    unread = Bounds(*(_halves(x, 1)[0] for x in bounds))
    (out_low, out_high), (lse_low, lse_high) = (_halves(x, 1) for x in partial)
    high = attend(q[1], k[0], unread, (out_high, lse_high), options)
    low = (out_low, lse_low)
    chosen = attend(_pick(earlier, *q), _pick(earlier, *k), unread, _pick(earlier, low, high), options)
    low, high = _pick(earlier, chosen, low), _pick(earlier, high, chosen)
    return _join(low[0], high[0]), _join(low[1], high[1])


def backward(
    block: Block,
    shard: Shard,
    query: jax.Array,
    kv: jax.Array,
    bounds: Bounds,
    rows: RowGradients,
    source: Index,
    own: bool,
) -> Gradients:
    """(dq, dkv) of one hop."""
    if own:
        return block.backend.backward(query, kv, bounds, rows, block.options)
    pull, options = CUDNN["full"].backward, block.options
    earlier = source < shard.rank()
    if shard.layout == Contiguous():
        grads = pull(query, kv, bounds, rows, options)
        return _pick(earlier, grads, jax.tree.map(jnp.zeros_like, grads))
    axis = seq_axis(kv)
    low, high = (jax.tree.map(lambda x, i=i: _halves(x, 1)[i], (query, rows)) for i in range(2))
    kv_low, kv_high = _halves(kv, axis)
    unread = Bounds(*(_halves(x, 1)[0] for x in bounds))
    dq, dkv = pull(high[0], kv_low, unread, high[1], options)
    query, rows = _pick(earlier, low, high)
    dq_chosen, dkv_chosen = pull(query, _pick(earlier, kv_low, kv_high), unread, rows, options)
    zero_q, zero_kv = jnp.zeros_like(dq), jnp.zeros_like(dkv)
    dq = _join(_pick(earlier, dq_chosen, zero_q), dq + _pick(earlier, zero_q, dq_chosen))
    dkv = _join(dkv + _pick(earlier, dkv_chosen, zero_kv), _pick(earlier, zero_kv, dkv_chosen), axis)
    return dq, dkv


def _halves(x: jax.Array, axis: int) -> list[jax.Array]:
    return jnp.split(x, 2, axis=axis)


def _join(low: jax.Array, high: jax.Array, axis: int = 1) -> jax.Array:
    return jnp.concatenate([low, high], axis=axis)


def _pick(condition: jax.Array, a: T, b: T) -> T:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
