"""One rank's view of a sequence spread over a mesh axis, and the collectives that strategies share.

Everything here runs inside a shard_map that is manual over the context axis.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from ring_jax._mesh import Axis
from ring_jax.flash.operands import Bounds
from ring_jax.layout import Index, Layout
from ring_jax.mask import Mask, MaskAndOffset, ResolvedMask

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Shard:
    """Where a sequence lies: `length` positions (padded) in `layout` over the `ranks` of mesh axis `axis`."""

    axis: Axis
    ranks: int
    layout: Layout
    length: int

    def rank(self) -> jax.Array:
        return lax.axis_index(self.axis)

    def positions(self) -> jax.Array:
        """Global positions of this rank's local indices, int32 [length / ranks]."""
        return self.layout.positions(self.rank(), self.length, self.ranks)

    def bounds(self, mask: Mask, q_len: int, kv_len: int, query_offset: int | Array) -> Bounds:
        """Global key bounds of this rank's queries under `mask`, int32 [B or 1, length / ranks] each."""
        return Bounds(*mask.interval(self.positions(), q_len=q_len, kv_len=kv_len, query_offset=query_offset))

    def local_bounds(self, bounds: Bounds, source: jax.Array) -> Bounds:
        """Global key bounds as bounds on the local key indices of rank `source`."""
        return Bounds(*(self.layout.count_below(x, source, self.length, self.ranks) for x in bounds))

    def shift(self, tree: T) -> T:
        """Every array of `tree` sent to the next rank of the ring."""
        ring = [(r, (r + 1) % self.ranks) for r in range(self.ranks)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, ring), tree)

    def gather(self, x: jax.Array, along: int | None = None) -> jax.Array:
        """What all ranks have: [C, ...], or one after the other along an axis of x.

        Always tiled, as `sum_scatter`: jax's batching rule of the other scatter, which is also the derivative of the other
        gather, loses track of the mapped axis (docs/upstream/psum_scatter_vmap.py).
        """
        return lax.all_gather(x[None] if along is None else x, self.axis, axis=along or 0, tiled=True)

    def sum_scatter(self, x: jax.Array, along: int | None = None) -> jax.Array:
        """What `gather` would give of this rank, summed over all ranks."""
        own = lax.psum_scatter(x, self.axis, scatter_dimension=along or 0, tiled=True)
        return own if along is not None else lax.squeeze(own, (0,))


def rotate(
    shard: Shard,
    unroll: int,
    hop: Callable[[T, Any, Index, bool, bool], tuple[Any, Any]],
    travel: T,
    stay: Any,
    combine: Callable[[Any, Any], Any] | None = None,
    both_ends: bool = False,
) -> tuple[Any, Any]:
    """Walk `travel` once around the ring; the engine of `ring` and `pass_q`, forward and backward.

    At every hop, `hop(travel, stay, source, own, final) -> (stay, result)` works on what has come from rank `source`; `own`
    (it is this rank) and `final` are static. `stay` is kept here. With `combine`, the result belongs to rank `source`: it
    follows its `travel` one hop behind, joined to others by `combine(arrived, result)`, and comes home at the end.

    | `combine` | `both_ends` | order of hops | permutes | a rank's own hop hides |
    | --- | --- | --- | --- | --- |
    | None | | own, C - 1 others | C - 1 of `travel` | the first permute |
    | given | False | C - 1 others, own | C - 1 of each | the results' way home, which takes longer |
    | given | True | own, C - 1 others, own | C - 1 of each | both; the first of the two has result None |

    Each permute of `travel` starts before the hop that it runs beside, and so does that of the results. Up to `unroll` ranks the
    hops are unrolled; beyond, they are a scan, whose compile time does not grow with C.

    Returns (stay, the result that belongs to this rank).
    """
    C, rank, own = shard.ranks, shard.rank(), travel

    def one(i: Index, state: Any, final: bool) -> Any:
        travel, stay, results = state
        arriving = shard.shift(results)
        departing = None if final else shard.shift(travel)
        stay, result = hop(travel, stay, (rank - i) % C, False, final)
        results = combine(arriving, result) if combine and arriving is not None else result
        # Without the barrier all permutes are ready at once: memory would not fall as 1/C.
        return lax.optimization_barrier((departing, stay, results)) if not final else (None, stay, results)

    results = None
    if C > 1:
        departing = shard.shift(travel)
        if combine is None or both_ends:
            stay, _ = hop(own, stay, rank, True, False)
        state, begun = lax.optimization_barrier((departing, stay, None)), 1
        if C > unroll:
            if combine and C > 2:  # no results arrive yet
                state, begun = one(1, state, final=False), 2
            if begun < C - 1:
                hops = jnp.arange(begun, C - 1, dtype=jnp.int32)
                state, _ = lax.scan(lambda s, i: (one(i, s, final=False), None), state, hops)
                begun = C - 1
        for i in range(begun, C):
            state = one(i, state, final=i == C - 1)
        _, stay, results = state
        if combine:
            # Or the rank's own hop could run at any time, and its result would be held until the end.
            own, stay, results = lax.optimization_barrier((own, stay, results))
        results = shard.shift(results)
    if combine or C == 1:
        stay, result = hop(own, stay, rank, True, True)
        results = combine(results, result) if combine and results is not None else result
    return stay, results


def seq_to_axis(x: jax.Array, shard: Shard, split_axis: int, seq_axis: int = 1) -> jax.Array:
    """One all-to-all: sequence shards become shards of `split_axis` (batch or heads), with the whole
    sequence here in natural order. x.shape[split_axis] must divide by the ranks."""
    x = lax.all_to_all(x, shard.axis, split_axis, seq_axis, tiled=True)
    return shard.layout.restore(x, seq_axis, shard.ranks)


def axis_to_seq(x: jax.Array, shard: Shard, split_axis: int, seq_axis: int = 1) -> jax.Array:
    """Inverse of `seq_to_axis`: natural order, sharded along `split_axis`, back to sequence shards in the layout."""
    x = shard.layout.scatter(x, seq_axis, shard.ranks)
    return lax.all_to_all(x, shard.axis, seq_axis, split_axis, tiled=True)


def resolve(mask_and_offset: MaskAndOffset, shard: Shard, q_len: int, kv_len: int) -> ResolvedMask:
    """Key bounds of the rank's queries, and what they are of."""
    mask, offset = mask_and_offset
    return ResolvedMask(*shard.bounds(mask, q_len, kv_len, offset), shard.layout, q_len, kv_len)


def mask_specs(tree: T, batch: int, batch_axis: Axis | None) -> T:
    """PartitionSpecs of mask leaves, whose leading axis is 1 or the batch."""

    def spec(x: Array) -> P:
        if x.shape[0] not in (1, batch):
            raise ValueError(f"a mask made for batch size {x.shape[0]} does not fit batch size {batch}")
        return P(batch_axis if x.shape[0] > 1 else None)

    return jax.tree.map(spec, tree)
