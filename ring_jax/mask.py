"""Masks: every query sees the keys of one interval [start, end) of global positions.

Causal, windowed, packed, padded and prefix masks are all of this kind, and intervals intersect with
max and min. So a `Mask` is a tuple of parts, `&` concatenates, and the attention kernels know no mask
kinds: they get two int32 bounds per query row, monotone along the rows.

Empty rows take start = end at a neighbouring bound, never (0, 0), so that bounds stay monotone: each
part alone has monotone bounds, max and min keep that, and so does end = max(end, start).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from ring_jax import _html, _repr
from ring_jax._checks import (
    INT32,
    as_integers,
    check_array,
    check_count,
    concrete,
    describe,
    is_array,
    static_length,
    to_int32,
)
from ring_jax.layout import Layout

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


_leaf = partial(jax.tree_util.register_dataclass, meta_fields=())


@partial(_leaf, data_fields=())
@dataclass(frozen=True)
class _Causal:
    def interval(self, q: Queries) -> Interval:
        return jnp.zeros_like(q.position), q.position + 1

    def __repr__(self) -> str:
        return "causal()"


@partial(_leaf, data_fields=("left", "right"))
@dataclass(frozen=True)
class _Window:
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


@partial(_leaf, data_fields=("n",))
@dataclass(frozen=True)
class _Prefix:
    n: Array  # int32 [1] or [B]

    def interval(self, q: Queries) -> Interval:
        return jnp.zeros_like(q.position), jnp.maximum(q.position + 1, self.n[:, None])

    def __repr__(self) -> str:
        return _repr.call("prefix", n=self.n)


@partial(_leaf, data_fields=("q", "kv", "left_padding"))
@dataclass(frozen=True)
class _Lengths:
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


@partial(_leaf, data_fields=("ids",))
@dataclass(frozen=True)
class _Segments:
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


@partial(_leaf, data_fields=("cu_q", "cu_kv"))
@dataclass(frozen=True)
class _CuSeqlens:
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


_Part = _Causal | _Window | _Prefix | _Lengths | _Segments | _CuSeqlens


@partial(_leaf, data_fields=("parts",))
@dataclass(frozen=True)
class Mask:
    """The keys that each query sees, as one interval; build it with `causal()`, `window()`,
    `documents()`, `lengths()`, `prefix()` and combine with `&`. `Mask()` sees everything.

    A pytree: lengths, borders and ids may be traced. All of them describe the sequence in natural order,
    whatever the layout of the arrays.

    Example:
        >>> mask = causal() & window(2, 0)
        >>> start, end = mask.interval(q_len=4, kv_len=4)
        >>> start.tolist(), end.tolist()
        ([[0, 0, 0, 1]], [[1, 2, 3, 4]])
    """

    parts: tuple[_Part, ...] = ()

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.parts)) or "Mask()"

    def _value(self) -> tuple[Any, ...]:
        leaves, tree = jax.tree.flatten(self)
        return tree, tuple((x.shape, x.tobytes()) if isinstance(x, np.ndarray) else id(x) for x in leaves)

    def __eq__(self, other: object) -> bool:
        """By value where the leaves are known (NumPy), else by identity of the arrays."""
        return isinstance(other, Mask) and self._value() == other._value()

    def __hash__(self) -> int:
        return hash(self._value())

    def __and__(self, other: "Mask") -> "Mask":
        """Both: a query sees the keys that both masks let it see."""
        if not isinstance(other, Mask):
            raise TypeError(f"a Mask combines with & with another Mask, got {describe(other)}")
        return Mask(_checked(_parts(self) + _parts(other)))

    def interval(
        self,
        index: "Int[Array, ' T'] | None" = None,
        *,
        q_len: int,
        kv_len: int,
        query_offset: "int | Array" = 0,
    ) -> "tuple[Int[Array, 'B T'], Int[Array, 'B T']]":
        """Global key bounds of every query: 0 <= start <= end <= kv_len, both monotone along T.

        Args:
            index: int32 [T], ascending indices in the query sequence (default: all of them); those >= q_len are
                padding and see nothing.
            q_len, kv_len: number of real queries and keys.
            query_offset: key position of query 0, >= 0; an integer or int32 [B].

        Returns:
            (start, end), int32 [B or 1, T]; B where some part differs between batch rows.
        """
        q_len, kv_len = static_length("q_len", q_len), static_length("kv_len", kv_len)
        if index is not None:
            check_array("index", index, "T", kind="integer")
        check_covers(self, kv_len)
        index = jnp.arange(q_len, dtype=jnp.int32) if index is None else index
        offset = per_row("query_offset", query_offset)
        index = to_int32(index)
        row = index[None, :]
        # Saturated below the largest int32, so that a query beyond all keys stays there, and one can be added.
        position = row + jnp.minimum(offset[:, None], INT32.max - 1 - row)
        queries = Queries(index, position, q_len, kv_len)
        start = jnp.where(index < q_len, 0, kv_len)[None, :].astype(jnp.int32)
        end = jnp.full_like(start, kv_len)
        for part in _parts(self):
            part_start, part_end = part.interval(queries)
            start, end = jnp.maximum(start, part_start), jnp.minimum(end, part_end)
        start, end = jnp.broadcast_arrays(start, end)
        start = jnp.clip(start, 0, kv_len)
        return start, jnp.maximum(end, start)

    def describe(self, q_len: int, kv_len: int | None = None, *, row: int = 0) -> str:
        """The mask drawn as text: a line for each query, ``#`` a key that it sees, ``.`` one that it does not.

        Args:
            q_len, kv_len: number of queries and keys (default: as many as queries). Long sequences are drawn in cells of
                several queries and keys, ``+`` where only some of their pairs are seen.
            row: of the batch, where the mask differs between its rows.

        Example:
            >>> print((causal() & window(2, 0)).describe(5))
            #....
            ##...
            ###..
            .###.
            ..###
        """
        q_len = static_length("q_len", q_len)
        kv_len = q_len if kv_len is None else static_length("kv_len", kv_len)
        rows = max([1] + [x.shape[0] for x in jax.tree.leaves(_parts(self))])
        row = check_count("row", row, 0, rows - 1)
        start, end = (np.asarray(x) for x in self.interval(q_len=q_len, kv_len=kv_len))
        return _repr.draw_mask(start[row], end[row], kv_len)

    _repr_html_ = _html.of_mask


@partial(jax.tree_util.register_dataclass, data_fields=("start", "end"), meta_fields=("layout", "q_len", "kv_len"))
@dataclass(frozen=True, eq=False)
class ResolvedMask:
    """A mask resolved to global key bounds in layout order, int32 [B or 1, T]: made once per step by
    `ContextParallel.resolve`, taken by `ring_attention(mask=...)` in every layer, together with what it was made for."""

    start: Array
    end: Array
    layout: Layout
    q_len: int
    kv_len: int
    __repr__ = _repr.of_fields


Integers = list[int] | list[list[int]]  # the short way to write what belongs into an array
MaskAndOffset = tuple[Mask, Array]  # a mask, and the key position of query 0 of each row, [1] or [B]


def _parts(mask: Mask) -> "tuple[_Part, ...]":
    """Its parts. Checked here and not when it is made: jax rebuilds pytrees around whatever leaves it has at hand."""
    if not isinstance(mask.parts, tuple) or not all(isinstance(part, _Part) for part in mask.parts):
        raise TypeError(f"the parts of a Mask come from causal(), window(), ...; got Mask({describe(mask.parts)})")
    return mask.parts


def check_covers(mask: Mask, kv_len: int) -> None:
    """Raises ValueError where segment ids are shorter than the keys."""
    for part in _parts(mask):
        if isinstance(part, _Segments) and part.ids.shape[1] < kv_len:
            raise ValueError(
                f"segment_ids cover {part.ids.shape[1]} of {kv_len} positions: they describe the whole sequence in natural order "
                "(also inside a shard_map, on every rank)"
            )


def _checked(parts: tuple[_Part, ...]) -> tuple[_Part, ...]:
    def has(*kinds: type) -> bool:
        return any(isinstance(p, kinds) for p in parts)

    if has(_Prefix) and has(_Window):
        raise NotImplementedError(
            "prefix(n) with window(...): a query would see the prefix and a separate window, which is two intervals of keys. "
            "Every mask here is one interval per query; drop one of the two."
        )
    if has(_Prefix) and has(_Causal):
        raise ValueError(
            "prefix(n) is causal attention that also sees the first n keys; intersecting it with causal() would hide them again. "
            "Use prefix(n) alone (and leave is_causal=False)."
        )
    if any(isinstance(p, _CuSeqlens) and p.cu_kv is not None for p in parts) and has(_Causal, _Window, _Prefix):
        raise NotImplementedError(
            "documents(cu_seqlens=, kv_cu_seqlens=) with causal(), window() or prefix(): these compare positions in one common sequence, "
            "but queries and keys are packed differently. Pack both alike (cu_seqlens only), or use query_offset."
        )
    return parts


def causal() -> Mask:
    """Query at position p sees keys [0, p + 1). Top-left aligned, as jax.nn; `query_offset` shifts p."""
    return Mask((_Causal(),))


def window(left: "int | Array | None", right: "int | Array | None" = None) -> Mask:
    """Sliding window: query at position p sees keys [p - left, p + right + 1).

    Args:
        left, right: number of neighbours seen on each side, >= 0; None means no limit. Integers or traced int32
            scalars (windows that differ between the layers of a scan).

    Raises:
        ValueError: for negative or non-integer widths.
    """
    widths = {"window(left)": left, "window(right)": right}
    for name, width in widths.items():
        if width is not None:
            as_integers(name, width, "()")
    return Mask((_Window(*(None if w is None else per_row(name, w) for name, w in widths.items())),))


def local_window(size: "int | tuple[int | None, int | None]") -> Mask:
    """`window` by jax.nn's `local_window_size`: one width for both sides, or (left, right)."""
    if is_array(size):
        size = as_integers("local_window_size", size, "() | 2")
    sides = tuple(size) if isinstance(size, (tuple, list)) or np.ndim(size) == 1 else (size, size)  # type: ignore[arg-type]
    if len(sides) != 2:
        raise ValueError(f"local_window_size takes an integer or (left, right), got {describe(size)}")
    for side in sides:
        if side is not None:
            per_row("local_window_size", as_integers("local_window_size", side, "()"))
    return window(*sides)


def prefix(n: "int | list[int] | Int[Array, ' B']") -> Mask:
    """Prefix-LM: causal, but the first `n` keys are visible to every query. `n`: int or int32 [B]."""
    return Mask((_Prefix(per_row("prefix(n)", n)),))


def lengths(
    q: "int | list[int] | Int[Array, ' B'] | None" = None,
    kv: "int | list[int] | Int[Array, ' B'] | None" = None,
    *,
    left_padding: "int | list[int] | Int[Array, ' B'] | None" = None,
) -> Mask:
    """Padding: per batch row, queries at index >= q[b] see nothing and keys at >= kv[b] are not seen.

    Args:
        q, kv: int32 [B] (or one integer): valid lengths, counted from the start of the row. None: all valid.
        left_padding: int32 [B]: the first left_padding[b] positions are padding, for queries and keys alike.
    """
    counts = {"q": q, "kv": kv, "left_padding": left_padding}
    return Mask((_Lengths(**{key: None if n is None else per_row(f"lengths({key})", n) for key, n in counts.items()}),))


def documents(
    *,
    segment_ids: "Integers | Int[Array, '*B S'] | None" = None,
    cu_seqlens: "Integers | Int[Array, '*B n'] | None" = None,
    kv_cu_seqlens: "Integers | Int[Array, '*B n'] | None" = None,
) -> Mask:
    """Packed documents: a query sees the keys of its own document only. Combine with `causal()` at will.

    Args:
        segment_ids: integers [S] or [B, S], natural order. Every run of equal ids is a document (ids need not be
            sorted); negative ids are padding. Padding ends a document, as another id does: [0, 0, -1, 0] is two. An id
            that comes back after another document ([0, 1, 0]) is an error where ids are known; under jit it is one more
            document, and `contiguous_segments` tells.
        cu_seqlens: int32 [n + 1] or [B, n + 1], ascending borders; document i is [cu[i], cu[i+1]), empty
            documents allowed; positions outside are padding. O(n) memory, where segment ids take O(S).
        kv_cu_seqlens: borders of the keys' documents where they differ from the queries' (cross attention);
            document i of the queries sees document i of the keys.

    Raises:
        ValueError: for neither or both forms, wrong dtype or shape, borders that descend, or an id that two
            separate runs use (checked where the values are known, that is outside jit).

    Source: FlashAttention's varlen interface (cu_seqlens); jax.nn and MaxText (segment ids).
    """
    if (segment_ids is None) == (cu_seqlens is None):
        raise ValueError("documents() takes exactly one of segment_ids= and cu_seqlens=")
    if segment_ids is not None:
        if kv_cu_seqlens is not None:
            raise ValueError(
                "documents(segment_ids=...) describes queries and keys alike; kv_cu_seqlens goes with cu_seqlens="
            )
        return Mask((_Segments(_segment_ids(segment_ids)),))
    cu_q = _borders("cu_seqlens", cu_seqlens)
    cu_kv = None if kv_cu_seqlens is None else _borders("kv_cu_seqlens", kv_cu_seqlens)
    if cu_kv is not None and cu_kv.shape[-1] != cu_q.shape[-1]:
        raise ValueError(
            f"cu_seqlens and kv_cu_seqlens must describe the same number of documents, "
            f"got {cu_q.shape[-1] - 1} and {cu_kv.shape[-1] - 1}"
        )
    return Mask((_CuSeqlens(cu_q, cu_kv),))


def per_row(name: str, n: Any) -> Array:
    """A count >= 0 as int32 [1] or [B], saturated: NumPy while it is known, so that masks made at import touch no device."""
    if type(n) is int and n >= 0:  # the usual offset, in every eager call
        return np.full(1, min(n, INT32.max), np.int32)  # type: ignore[return-value]
    n = as_integers(name, n, "() | B")
    n = n if isinstance(n, jax.Array) else np.asarray(n)
    known = concrete(n)
    if known is not None and np.any(known < 0):
        raise ValueError(f"{name} must be >= 0, got {known}")
    return to_int32(n.reshape(-1))


def _rows(name: str, x: Any) -> Array:
    """Integers [n] or [B, n] as [1 or B, n], of the dtype that they have."""
    x = as_integers(name, x, "n | B n")
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    return x[None] if x.ndim == 1 else x


def _segment_ids(ids: Any) -> Array:
    out = _rows("segment_ids", ids)
    check_segment_ids(out)
    # Ids are only compared: traced ones keep a wider dtype, in which no two of them become one.
    return to_int32(out) if concrete(out) is not None else out


def check_segment_ids(ids: Any) -> None:
    """Raises ValueError where integer ids [B, S] are known and do not fit into int32, or come back after another document."""
    known = concrete(ids)
    if known is None or not known.size:
        return
    low, high = int(known.min()), int(known.max())
    if low < INT32.min or high > INT32.max:
        raise ValueError(f"segment_ids must fit into int32, got values from {low} to {high}: number the documents anew")
    for row in known:
        row = row[row >= 0]
        runs = row[np.append(True, row[1:] != row[:-1])] if len(row) else row
        values, counts = np.unique(runs, return_counts=True)
        if np.any(counts > 1):
            raise ValueError(
                f"segment_ids: segment id {values[counts > 1][0]} is used by two separate runs, its tokens would see two intervals: "
                "give every document one contiguous run of its own id."
            )


def contiguous_segments(segment_ids: "Integers | Int[Array, 'B S']") -> "Bool[Array, ' B']":
    """Whether no id of a row comes back after another document, for ids that are traced.

    Where ids are known, an id that comes back is an error. Under jit it silently begins one more document; this says so there:

        loss = jnp.where(contiguous_segments(ids).all(), loss, jnp.nan)
        checkify.check(contiguous_segments(ids).all(), "a segment id is used by two documents")

    Args:
        segment_ids: integers [B, S] in natural order, negative for padding.

    Returns:
        bool [B].

    Example:
        >>> contiguous_segments(np.array([[5, 5, -1, 2], [0, 1, 0, 1]])).tolist()
        [True, False]
    """
    ids = jnp.asarray(_rows("segment_ids", segment_ids))
    index = lax.broadcasted_iota(jnp.int32, ids.shape, 1)
    last = lax.cummax(jnp.where(ids >= 0, index, -1), axis=1)  # index of the last valid token so far
    before = jnp.pad(last, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    previous = jnp.take_along_axis(ids, jnp.maximum(before, 0), axis=1)
    starts = (ids >= 0) & ((before < 0) | (previous != ids))
    found = jnp.sort(jnp.where(starts, ids, jnp.full_like(ids, -1)), axis=1)
    return ~((found[:, 1:] == found[:, :-1]) & (found[:, 1:] >= 0)).any(axis=1)


def _borders(name: str, cu: Any) -> Array:
    out = to_int32(_rows(name, cu))
    known = concrete(out)
    if out.shape[-1] < 2:
        raise ValueError(f"{name} needs at least two borders [start, end], got shape {out.shape}")
    if known is not None and np.any(np.diff(known, axis=-1) < 0):
        raise ValueError(f"{name} must not descend, got {known}")
    return out
