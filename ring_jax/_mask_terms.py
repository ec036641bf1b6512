"""What masks are made of: each term gives every query one interval of keys, [start, end), monotone along the queries."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ring_jax import _repr

Interval = tuple[Array, Array]


@dataclass(frozen=True)
class Queries:
    """Which queries a mask is asked about: their indices, global positions and the lengths in play.

    index: int32 [T], position of each query in the query sequence (>= q_len: padding).
    position: int32 [1 or B, T], index + query_offset: the query's place among the keys.
    q_len, kv_len: number of real queries and keys.
    """

    index: Array
    position: Array
    q_len: int
    kv_len: int


leaf = partial(jax.tree_util.register_dataclass, meta_fields=())


@partial(leaf, data_fields=())
@dataclass(frozen=True)
class Causal:
    def interval(self, q: Queries) -> Interval:
        return jnp.zeros_like(q.position), q.position + 1

    def __repr__(self) -> str:
        return "causal()"


@partial(leaf, data_fields=("left", "right"))
@dataclass(frozen=True)
class Window:
    left: Array | None  # each int32 [1]
    right: Array | None

    def interval(self, q: Queries) -> Interval:
        start = jnp.zeros_like(q.position) if self.left is None else q.position - self.left[:, None]
        if self.right is None:
            return start, jnp.full_like(q.position, q.kv_len)
        # Clipped before they are added: a width of 2^31 - 1 means no limit.
        position = jnp.minimum(q.position, q.kv_len)
        return start, position + jnp.minimum(self.right[:, None], q.kv_len - position) + 1

    def __repr__(self) -> str:
        return _repr.call("window", left=self.left, right=self.right)


@partial(leaf, data_fields=("n",))
@dataclass(frozen=True)
class Prefix:
    n: Array  # int32 [1] or [B]

    def interval(self, q: Queries) -> Interval:
        return jnp.zeros_like(q.position), jnp.maximum(q.position + 1, self.n[:, None])

    def __repr__(self) -> str:
        return _repr.call("prefix", n=self.n)


@partial(leaf, data_fields=("q", "kv", "left_padding"))
@dataclass(frozen=True)
class Lengths:
    q: Array | None  # each int32 [1] or [B]
    kv: Array | None
    left_padding: Array | None

    def interval(self, q: Queries) -> Interval:
        start, end = jnp.zeros_like(q.position), jnp.full_like(q.position, q.kv_len)
        if self.q is not None:
            start = jnp.where(q.index[None, :] < self.q[:, None], start, q.kv_len)
        if self.kv is not None:
            end = jnp.minimum(end, self.kv[:, None])
        if self.left_padding is not None:
            left = self.left_padding[:, None]
            start, end = jnp.maximum(start, left), jnp.where(q.position < left, 0, end)
        return start, end

    def __repr__(self) -> str:
        return _repr.call("lengths", q=self.q, kv=self.kv, left_padding=self.left_padding)


@partial(leaf, data_fields=("ids",))
@dataclass(frozen=True)
class Segments:
    ids: Array  # int32 [1 or B, S], natural order

    def interval(self, q: Queries) -> Interval:
        ids = jnp.asarray(self.ids)
        length = ids.shape[1]
        index = lax.broadcasted_iota(jnp.int32, ids.shape, 1)
        # Padding is a run like any other: it ends the document before it.
        border = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
        first = lax.cummax(jnp.where(border, index, 0), axis=1)
        last = jnp.concatenate([border[:, 1:], jnp.ones_like(border[:, :1])], axis=1)
        after = lax.cummin(jnp.where(last, index + 1, length), axis=1, reverse=True)
        after = jnp.where(ids < 0, first, after)
        # Positions beyond the ids are padding: an empty row at the end.
        first, after = (jnp.pad(x, ((0, 0), (0, 1)), constant_values=length) for x in (first, after))
        where = jnp.clip(q.position, 0, length)
        rows = max(first.shape[0], where.shape[0])
        where = jnp.broadcast_to(where, (rows, where.shape[1]))
        return tuple(
            jnp.take_along_axis(jnp.broadcast_to(x, (rows, length + 1)), where, axis=1) for x in (first, after)
        )  # type: ignore[return-value]

    def __repr__(self) -> str:
        return _repr.call("documents", segment_ids=self.ids)


@partial(leaf, data_fields=("cu_q", "cu_kv"))
@dataclass(frozen=True)
class CuSeqlens:
    cu_q: Array  # int32 [1 or B, n+1]
    cu_kv: Array | None

    def interval(self, q: Queries) -> Interval:
        cu_q = self.cu_q
        cu_kv = cu_q if self.cu_kv is None else self.cu_kv
        n = cu_q.shape[1] - 1
        rows = max(cu_q.shape[0], q.position.shape[0], cu_kv.shape[0])

        def one(cu_q: jax.Array, cu_kv: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
            # side="right" lands on the last of equal borders: documents of length zero hold nobody.
            document = jnp.searchsorted(cu_q, position, side="right").astype(jnp.int32) - 1
            start = cu_kv[jnp.clip(document, 0, n)]
            end = cu_kv[jnp.clip(document + 1, 0, n)]
            return start, jnp.where(document < 0, start, end)

        args = (jnp.broadcast_to(x, (rows, x.shape[1])) for x in (cu_q, cu_kv, q.position))
        return jax.vmap(one)(*args)

    def __repr__(self) -> str:
        return _repr.call("documents", cu_seqlens=self.cu_q, kv_cu_seqlens=self.cu_kv)


Term = Causal | Window | Prefix | Lengths | Segments | CuSeqlens
