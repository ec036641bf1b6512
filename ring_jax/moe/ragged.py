"""Tokens travel only to the ranks that hold their experts: one ragged all-to-all out, one back.

Each rank sorts its (token, rank) pairs by rank, a pair for every rank that holds at least one expert of the token, and
sends rank s the run of rows that is meant for it. Rows land in the order of the ranks that they come from. Sums return
the same way, and a token adds up the at most k rows that come back for it. Room is made for the rows of every rank's
every token, so any skew fits. The two directions are each other's transposes, which is their derivative rule.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax._mesh import Axis, axis_names
from ring_jax._vma import align, pcast_to
from ring_jax.moe.exchange import Here


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Route:
    """Where rows go. Runs are int32 [C], one for each rank.

    Args:
        tokens: int32 [N], token of each row to send, in the order of the receiving ranks; T where there is none.
        rows: int32 [T, k], row of each of a token's pairs; N where there is none.
        start, size: runs of rows for each rank. lands: where they begin there.
        from_start, from_size: runs of rows from each rank, as they lie here. returns: where they lay there.
    """

    tokens: jax.Array
    rows: jax.Array
    start: jax.Array
    size: jax.Array
    lands: jax.Array
    from_start: jax.Array
    from_size: jax.Array
    returns: jax.Array

    @classmethod
    def of(cls, ranks_of: jax.Array, ranks: int, axis: Axis) -> "Route":
        """From int32 [T, k], the rank of each of a token's experts; `ranks` for none."""
        tokens, per_token = ranks_of.shape
        earlier = jnp.tril(jnp.ones((1, per_token, per_token), bool), -1)
        again = (ranks_of[:, :, None] == ranks_of[:, None, :]) & earlier
        key = jnp.where(again.any(axis=2), jnp.full_like(ranks_of, ranks), ranks_of).reshape(-1)
        index = jnp.arange(key.size, dtype=jnp.int32)
        ascending, order = lax.sort((key, index), num_keys=1, is_stable=True)
        most = tokens * min(per_token, ranks)
        place = jnp.zeros_like(order).at[order].set(index, unique_indices=True)
        edges = jnp.searchsorted(
            ascending, jnp.arange(ranks, dtype=jnp.int32), side="right", method="scan_unrolled"
        ).astype(jnp.int32)
        start = jnp.concatenate([jnp.zeros_like(edges[:1]), edges[:-1]])
        size = edges - start
        swap = functools.partial(lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0, tiled=True)
        from_size, returns = jnp.split(swap(jnp.stack([size, start], axis=1)), 2, axis=1)
        from_size, returns = from_size[:, 0], returns[:, 0]
        from_start = jnp.cumsum(from_size, dtype=jnp.int32) - from_size
        return cls(
            jnp.where(ascending < ranks, order // per_token, tokens)[:most],
            jnp.where(key < ranks, place, most).reshape(tokens, per_token),
            start,
            size,
            swap(from_start),
            from_start,
            from_size,
            returns,
        )


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Every rank sees the tokens that have an expert there, see the module."""

    axis: Axis
    route: Route
    tensor: Axis | None = None

    @classmethod
    def of(cls, experts: jax.Array, count: int, axis: Axis, tensor: Axis | None = None) -> "Ragged":
        """From int32 [T, k] experts of the tokens here, `count` of them on each rank; beyond the last: none."""
        experts = pcast_to(experts, axis_names(axis))
        ranks = lax.axis_size(axis)
        return cls(axis, Route.of(jnp.minimum(experts // count, ranks), ranks, axis), tensor)

    def send(self, x: jax.Array) -> jax.Array:
        x, route = align(pcast_to(x, (*axis_names(self.axis), *axis_names(self.tensor))), self.route)
        return _send(self.axis, x, route)

    def combine(self, y: jax.Array) -> jax.Array:
        y, route = align(y, self.route)
        return Here(tensor=self.tensor).combine(_combine(self.axis, y, route))


def _travel(
    x: jax.Array, length: int, axis: Axis, start: jax.Array, size: jax.Array, lands: jax.Array, from_size: jax.Array
) -> jax.Array:
    (room, x) = align(jnp.zeros((length, *x.shape[1:]), x.dtype), x)
    return lax.ragged_all_to_all(x, room, start, size, lands, from_size, axis_name=axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _send(axis: Axis, x: jax.Array, route: Route) -> jax.Array:
    rows = x.at[route.tokens].get(mode="fill", fill_value=0)
    length = x.shape[0] * route.start.shape[0]
    return _travel(rows, length, axis, route.start, route.size, route.lands, route.from_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(axis: Axis, y: jax.Array, route: Route) -> jax.Array:
    length = route.tokens.shape[0]
    back = _travel(y, length, axis, route.from_start, route.from_size, route.returns, route.size)
    wide = jnp.float64 if y.dtype == jnp.float64 else jnp.float32
    total = sum(back.at[rows].get(mode="fill", fill_value=0).astype(wide) for rows in route.rows.T)
    return jnp.asarray(total).astype(y.dtype)


_send.defvjp(
    lambda axis, x, route: (_send(axis, x, route), route), lambda axis, route, d: (_combine(axis, d, route), None)
)
_combine.defvjp(
    lambda axis, y, route: (_combine(axis, y, route), route), lambda axis, route, d: (_send(axis, d, route), None)
)
