"""Masks: every query sees the keys of one interval [start, end) of global positions.

Causal, windowed, packed, padded and prefix masks are all of this kind, and intervals intersect with
max and min. So a `Mask` is a tuple of terms, `&` concatenates, and the attention kernels know no mask
kinds: they get two int32 bounds per query row, monotone along the rows.

Empty rows take start = end at a neighbouring bound, never (0, 0), so that bounds stay monotone: each
term alone has monotone bounds, max and min keep that, and so does end = max(end, start).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ring_jax import _html, _repr
from ring_jax._checks import (
    INT32,
    as_integers,
    check_array,
    check_count,
    describe,
    is_array,
    static_length,
    to_int32,
)
from ring_jax._mask_terms import Causal, CuSeqlens, Lengths, Prefix, Queries, Segments, Term, Window, leaf
from ring_jax._segment_ids import Integers, borders, known_segment_ids, per_row
from ring_jax.layout import Layout


@partial(leaf, data_fields=("terms",))
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

    terms: tuple[Term, ...] = ()

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.terms)) or "Mask()"

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
        return Mask(_checked(_terms(self) + _terms(other)))

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
            (start, end), int32 [B or 1, T]; B where some term differs between batch rows.
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
        for term in _terms(self):
            term_start, term_end = term.interval(queries)
            start, end = jnp.maximum(start, term_start), jnp.minimum(end, term_end)
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
        rows = max([1] + [x.shape[0] for x in jax.tree.leaves(_terms(self))])
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


MaskAndOffset = tuple[Mask, Array]  # a mask, and the key position of query 0 of each row, [1] or [B]


def _terms(mask: Mask) -> "tuple[Term, ...]":
    """Its terms. Checked here and not when it is made: jax rebuilds pytrees around whatever leaves it has at hand."""
    if not isinstance(mask.terms, tuple) or not all(isinstance(term, Term) for term in mask.terms):
        raise TypeError(f"the terms of a Mask come from causal(), window(), ...; got Mask({describe(mask.terms)})")
    return mask.terms


def check_covers(mask: Mask, kv_len: int) -> None:
    """Raises ValueError where segment ids are shorter than the keys."""
    for term in _terms(mask):
        if isinstance(term, Segments) and term.ids.shape[1] < kv_len:
            raise ValueError(
                f"segment_ids cover {term.ids.shape[1]} of {kv_len} positions: they describe the whole sequence in natural order "
                "(also inside a shard_map, on every rank)"
            )


def _checked(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    def has(*kinds: type) -> bool:
        return any(isinstance(p, kinds) for p in terms)

    if has(Prefix) and has(Window):
        raise NotImplementedError(
            "prefix(n) with window(...): a query would see the prefix and a separate window, which is two intervals of keys. "
            "Every mask here is one interval per query; drop one of the two."
        )
    if has(Prefix) and has(Causal):
        raise ValueError(
            "prefix(n) is causal attention that also sees the first n keys; intersecting it with causal() would hide them again. "
            "Use prefix(n) alone (and leave is_causal=False)."
        )
    if any(isinstance(p, CuSeqlens) and p.cu_kv is not None for p in terms) and has(Causal, Window, Prefix):
        raise NotImplementedError(
            "documents(cu_seqlens=, kv_cu_seqlens=) with causal(), window() or prefix(): these compare positions in one common sequence, "
            "but queries and keys are packed differently. Pack both alike (cu_seqlens only), or use query_offset."
        )
    return terms


def causal() -> Mask:
    """Query at position p sees keys [0, p + 1). Top-left aligned, as jax.nn; `query_offset` shifts p."""
    return Mask((Causal(),))


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
    return Mask((Window(*(None if w is None else per_row(name, w) for name, w in widths.items())),))


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


def prefix(n: "int | np.integer | list[int] | Int[Array, ''] | Int[Array, ' B']") -> Mask:
    """Prefix-LM: causal, but the first `n` keys are visible to every query. `n`: int or int32 [B]."""
    return Mask((Prefix(per_row("prefix(n)", n)),))


def lengths(
    q: "int | np.integer | list[int] | Int[Array, ''] | Int[Array, ' _'] | None" = None,
    kv: "int | np.integer | list[int] | Int[Array, ''] | Int[Array, ' _'] | None" = None,
    *,
    left_padding: "int | np.integer | list[int] | Int[Array, ''] | Int[Array, ' _'] | None" = None,
) -> Mask:
    """Padding: per batch row, queries at index >= q[b] see nothing and keys at >= kv[b] are not seen.

    Args:
        q, kv: int32 [B] (or one integer): valid lengths, counted from the start of the row. None: all valid.
        left_padding: int32 [B]: the first left_padding[b] positions are padding, for queries and keys alike.
    """
    counts = {"q": q, "kv": kv, "left_padding": left_padding}
    return Mask((Lengths(**{key: None if n is None else per_row(f"lengths({key})", n) for key, n in counts.items()}),))


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
        return Mask((Segments(known_segment_ids(segment_ids)),))
    cu_q = borders("cu_seqlens", cu_seqlens)
    cu_kv = None if kv_cu_seqlens is None else borders("kv_cu_seqlens", kv_cu_seqlens)
    if cu_kv is not None and cu_kv.shape[-1] != cu_q.shape[-1]:
        raise ValueError(
            f"cu_seqlens and kv_cu_seqlens must describe the same number of documents, "
            f"got {cu_q.shape[-1] - 1} and {cu_kv.shape[-1] - 1}"
        )
    return Mask((CuSeqlens(cu_q, cu_kv),))
