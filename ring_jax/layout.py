"""Layouts: which context rank holds which position of the sequence.

All layouts here are *block-cyclic*: the sequence is cut into blocks of b positions, and block
j = position // b belongs to

    contiguous  rank j                          b = S / C
    striped     rank j mod C
    zigzag      the r with j mod 2C in {r, 2C-1-r}     b = S / 2C unless fixed

On every rank the local positions ascend, so how many of a rank's positions lie below a global
position g is a closed form (`count_below`). That one function turns global key intervals into local
ones, for any mask, without a table; it is all that the ring needs to know about a layout.

Sources: Brandon et al., Striped Attention (arXiv 2311.09431); the zigzag form of
zhuzilin/ring-flash-attention; vLLM RFC 37995 (zigzag with b = 1).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from ring_jax import _html, _repr
from ring_jax._checks import (
    Sizes,
    check_array,
    check_axis,
    check_count,
    check_index,
    check_instance,
    describe,
)

# A position, a rank or an index: a Python int, a NumPy array or a (traced) JAX array of int32.
Index = Any
LayoutName = Literal["contiguous", "striped", "zigzag"]


@runtime_checkable
class Layout(Protocol):
    """What the rest of the library asks of a layout. `length` is the padded length, `ranks` is C.

    Every rank holds length / C positions, and its local indices ascend with them. An `Index` comes as an int, a NumPy array or a
    (traced) JAX array of int32, and goes as the same.
    """

    def padded_length(self, seq_len: int, ranks: int) -> int:
        """Smallest length >= seq_len that this layout can divide over `ranks`; an even number of positions on each."""
        ...

    def block_size(self, length: int, ranks: int) -> int:
        """A number b >= 1 such that on every rank each run of local indices [i b, (i+1) b) is one run of neighbouring positions; it
        divides length / C. Larger ones make fewer pieces to move. Raises where the length does not divide."""
        ...

    def position(self, index: Index, rank: Index, length: int, ranks: int) -> Index:
        """Global position of local index `index` on `rank`; ascending in `index`."""
        ...

    def rank_of(self, position: Index, length: int, ranks: int) -> Index:
        """The rank that holds a global position."""
        ...

    def count_below(self, g: Index, rank: Index, length: int, ranks: int) -> Index:
        """How many of `rank`'s positions are < g, for 0 <= g <= length."""
        ...

    def positions(self, rank: Index, length: int, ranks: int) -> Index:
        """Global positions of all of `rank`'s local indices, int32 [length / ranks]."""
        ...

    def coarsen(self, factor: int) -> "Layout":
        """The layout that groups of `factor` neighbouring ranks hold together."""
        ...

    def restore(self, x: jax.Array, axis: int, ranks: int) -> jax.Array:
        """Put shards that were concatenated in rank order along `axis` into natural order."""
        ...

    def scatter(self, x: jax.Array, axis: int, ranks: int) -> jax.Array:
        """Inverse of `restore`: natural order to shards concatenated in rank order."""
        ...


def _clip(x: Index, low: int, high: int) -> Index:
    return jnp.clip(x, low, high) if isinstance(x, jax.Array) else np.clip(x, low, high)


@dataclass(frozen=True)
class BlockCyclic:
    """The closed formulas that contiguous, striped and zigzag share.

    Each rank holds `_folds` blocks of every period of `_folds * C` blocks: block `rank`, and where
    the sequence is folded also its mirror image `2C - 1 - rank`.
    """

    _folds: ClassVar[int] = 1

    def block_size(self, length: int, ranks: int) -> int:
        """Block size b for this padded length; raises where the length does not divide."""
        raise NotImplementedError

    def padded_length(self, seq_len: int, ranks: int) -> int:
        """Smallest length >= seq_len that this layout can divide over `ranks`."""
        raise NotImplementedError

    def coarsen(self, factor: int) -> "Layout":
        """The layout that groups of `factor` neighbouring ranks hold together."""
        raise NotImplementedError

    def position(self, index: Index, rank: Index, length: int, ranks: int) -> Index:
        """Global position of local index `index` on `rank`; ascending in `index`."""
        b = self.block_size(length, ranks)
        check_index("index", index, length // ranks)
        check_index("rank", rank, ranks)
        period, within = index // (self._folds * b), index % (self._folds * b)
        mirrored = within // b
        block = rank + mirrored * (2 * ranks - 1 - 2 * rank)
        return (period * (self._folds * ranks) + block) * b + within % b

    def rank_of(self, position: Index, length: int, ranks: int) -> Index:
        """The rank that holds a global position."""
        b = self.block_size(length, ranks)
        check_index("position", position, length)
        block = (position // b) % (self._folds * ranks)
        mirrored = block // ranks
        return block + mirrored * (2 * ranks - 1 - 2 * block)

    def local_index(self, position: Index, length: int, ranks: int) -> Index:
        """The index of a global position on the rank that holds it."""
        return self.count_below(position, self.rank_of(position, length, ranks), length, ranks)

    def count_below(self, g: Index, rank: Index, length: int, ranks: int) -> Index:
        """How many of `rank`'s positions are < g, for 0 <= g <= length."""
        b = self.block_size(length, ranks)
        check_index("g", g, length + 1)
        check_index("rank", rank, ranks)
        full, rest = g // (self._folds * ranks * b), g % (self._folds * ranks * b)
        count = full * (self._folds * b) + _clip(rest - rank * b, 0, b)
        if self._folds == 2:
            count = count + _clip(rest - (2 * ranks - 1 - rank) * b, 0, b)
        return count

    def positions(self, rank: Index, length: int, ranks: int) -> Index:
        """Global positions of all of `rank`'s local indices, int32 [length / ranks]."""
        arange = jnp.arange if isinstance(rank, jax.Array) else np.arange
        index = arange(_shard_length(self, length, ranks), dtype=np.int32)
        return self.position(index, rank, length, ranks)

    def restore(self, x: jax.Array, axis: int, ranks: int) -> jax.Array:
        """Put shards that were concatenated in rank order along `axis` into natural order."""
        return self._permute_blocks(x, axis, ranks, to_natural=True)

    def scatter(self, x: jax.Array, axis: int, ranks: int) -> jax.Array:
        """Inverse of `restore`: natural order to shards concatenated in rank order."""
        return self._permute_blocks(x, axis, ranks, to_natural=False)

    def describe(self, seq_len: int, ranks: int) -> str:
        """Which positions each rank holds, a line each, in the order in which they lie there.

        Example:
            >>> print(Zigzag().describe(7, 2))
            Zigzag(block=None) over 2 ranks, 7 positions, padded to 8
            rank 0: 0-1 6-7
            rank 1: 2-5
        """
        return _repr.draw_layout(self, seq_len, ranks)

    _repr_html_ = _html.of_layout

    def _permute_blocks(self, x: jax.Array, axis: int, ranks: int, to_natural: bool) -> jax.Array:
        # Blocks move whole: a transpose [C, period, fold] <-> [period, C, fold] and a static
        # permutation of the C * folds blocks of a period. No element-wise gather.
        check_array("x", x, kind="any")
        axis = check_axis("axis", axis, x.ndim)
        length, folds = x.shape[axis], self._folds
        b = self.block_size(length, ranks)
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        held = np.arange(ranks)[:, None]
        if folds == 2:
            held = np.concatenate([held, 2 * ranks - 1 - held], axis=1)
        held = held.reshape(-1)  # natural block of each (rank, fold)
        periods = length // (ranks * folds * b)
        rank_order = (ranks, periods, folds, b)
        lead = len(before)
        if to_natural:
            x = x.reshape(*before, *rank_order, *after)
            x = jnp.moveaxis(x, lead + 1, lead).reshape(*before, periods, ranks * folds, b, *after)
            x = jnp.take(x, np.argsort(held), axis=lead + 1, unique_indices=True, mode="clip")
        else:
            x = x.reshape(*before, periods, ranks * folds, b, *after)
            x = jnp.take(x, held, axis=lead + 1, unique_indices=True, mode="clip")
            x = x.reshape(*before, periods, ranks, folds, b, *after)
            x = jnp.moveaxis(x, lead, lead + 1)
        return x.reshape(*before, length, *after)


def _shard_length(layout: Layout, length: int, ranks: int) -> int:
    padded = layout.padded_length(length, ranks)
    if padded != length:
        raise ValueError(
            f"a sequence of length {length} does not divide over {ranks} context ranks in layout {layout}: "
            f"the next length that does is {padded}. Lay the array out with ContextParallel.to_layout, which pads "
            f"it, and pass seq_len={length} so that the padding is masked."
        )
    return length // ranks


def _round_up(seq_len: int, ranks: int, per_rank: int) -> int:
    """The next multiple of `per_rank` positions on each of `ranks`."""
    seq_len, ranks = check_count("seq_len", seq_len), check_count("ranks", ranks, 1)
    multiple = ranks * per_rank
    return -(-seq_len // multiple) * multiple


@dataclass(frozen=True)
class Contiguous(BlockCyclic):
    """Rank r holds positions [r S/C, (r+1) S/C): the order in which JAX shards an array.

    Causal attention leaves the first ranks idle in this layout; use `Zigzag` for it.

    Example:
        >>> [Contiguous().positions(r, 8, 2).tolist() for r in range(2)]
        [[0, 1, 2, 3], [4, 5, 6, 7]]
    """

    def padded_length(self, seq_len: int, ranks: int) -> int:
        """Smallest length >= seq_len that divides into two chunks on each of `ranks`."""
        return _round_up(seq_len, ranks, 2)

    def block_size(self, length: int, ranks: int) -> int:
        """Positions of a rank."""
        return max(_shard_length(self, length, ranks), 1)

    def coarsen(self, factor: int) -> "Contiguous":
        """The layout that groups of `factor` neighbouring ranks hold together: the same."""
        check_count("factor", factor, 1)
        return self


@dataclass(frozen=True)
class Striped(BlockCyclic):
    """Blocks of `block` positions dealt to the ranks in turn.

    Source: Brandon et al., Striped Attention, arXiv 2311.09431.

    Example:
        >>> [Striped().positions(r, 8, 2).tolist() for r in range(2)]
        [[0, 2, 4, 6], [1, 3, 5, 7]]
    """

    block: int = 1

    def __post_init__(self) -> None:
        check_count("Striped(block=...)", self.block, 1)

    def padded_length(self, seq_len: int, ranks: int) -> int:
        """Smallest length >= seq_len that gives each of `ranks` whole blocks."""
        # An even number of blocks or positions per rank, so that the default pads as the others do.
        return _round_up(seq_len, ranks, math.lcm(2, self.block))

    def block_size(self, length: int, ranks: int) -> int:
        """`block`, where `length` divides."""
        _shard_length(self, length, ranks)
        return self.block

    def coarsen(self, factor: int) -> "Striped":
        """The layout that groups of `factor` neighbouring ranks hold together: larger blocks."""
        return Striped(self.block * check_count("factor", factor, 1))


@dataclass(frozen=True)
class Zigzag(BlockCyclic):
    """Blocks dealt forth and back: rank r holds the blocks j with j mod 2C in {r, 2C-1-r}.

    Every rank gets the same causal work. `block=None` is the two-chunk form (b = S / 2C), `block=1` the
    token-interleaved form of vLLM RFC 37995. A fixed block serves sequences that grow, and `block=128`
    balances packed documents best.

    Example:
        >>> [Zigzag().positions(r, 8, 2).tolist() for r in range(2)]
        [[0, 1, 6, 7], [2, 3, 4, 5]]
        >>> [Zigzag(block=1).positions(r, 8, 2).tolist() for r in range(2)]
        [[0, 3, 4, 7], [1, 2, 5, 6]]
    """

    block: int | None = None
    _folds: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.block is not None:
            check_count("Zigzag(block=...)", self.block, 1, advice="None is the two-chunk form")

    def padded_length(self, seq_len: int, ranks: int) -> int:
        """Smallest length >= seq_len that gives each of `ranks` whole blocks, as many forth as back."""
        return _round_up(seq_len, ranks, 2 * (self.block or 1))

    def block_size(self, length: int, ranks: int) -> int:
        """`block`, or half of a rank's positions; raises where `length` does not divide."""
        _shard_length(self, length, ranks)
        return self.block or max(length // (2 * ranks), 1)

    def coarsen(self, factor: int) -> "Zigzag":
        """The layout that groups of `factor` neighbouring ranks hold together: larger blocks."""
        check_count("factor", factor, 1)
        return self if self.block is None else Zigzag(self.block * factor)


_BY_NAME: dict[str, Layout] = {"contiguous": Contiguous(), "striped": Striped(), "zigzag": Zigzag()}


def as_layout(layout: "Layout | str") -> Layout:
    """The layout that a name ("contiguous", "striped", "zigzag") or a `Layout` value stands for."""
    if isinstance(layout, str):
        if layout not in _BY_NAME:
            raise ValueError(
                f"unknown layout {layout!r}: expected one of {sorted(_BY_NAME)} or a Layout such as Zigzag(block=128)"
            )
        return _BY_NAME[layout]
    if isinstance(layout, type) or not isinstance(layout, Layout):
        raise TypeError(f"layout must be a name or a value such as Zigzag(), got {describe(layout)}{_lacking(layout)}")
    return layout


def _lacking(layout: Any) -> str:
    """Of something with a part of a layout's methods: which are not there."""
    asked = [name for name in vars(Layout) if not name.startswith("_")]
    lacking = [name for name in asked if not hasattr(layout, name)]
    partly = not isinstance(layout, type) and 0 < len(lacking) < len(asked)
    return f", which lacks the methods {', '.join(lacking)} of ring_jax.Layout" if partly else ""


def work_per_rank(starts: np.ndarray, ends: np.ndarray, layout: "Layout | LayoutName", ranks: int) -> Sequence[int]:
    """Number of visible (query, key) pairs whose query each rank holds.

    Args:
        starts, ends: global key interval of every query in natural order, int [S] (see `Mask.interval`).
        layout: the layout of the queries.
        ranks: number of context ranks.

    Returns:
        A list of `ranks` integers; the slowest rank sets the pace, so max / mean is the imbalance.

    Example:
        >>> work_per_rank(np.zeros(8, int), np.arange(1, 9), "zigzag", 2)
        [18, 18]
    """
    layout = as_layout(layout)
    check_count("ranks", ranks, 1)
    sizes = Sizes()
    for name, x in (("starts", starts), ("ends", ends)):
        check_array(name, x, "S", sizes, kind="integer")
        check_instance(name, x, (np.ndarray, jax.Array), "known outside of jit")
        if np.any(np.asarray(x) < 0):
            raise ValueError(f"{name} must be >= 0, got {np.min(np.asarray(x))}")
    pairs = np.maximum(np.asarray(ends, np.int64) - np.asarray(starts, np.int64), 0)
    length = layout.padded_length(len(pairs), ranks)
    rank = layout.rank_of(np.arange(len(pairs)), length, ranks)
    return [int(n) for n in np.bincount(rank, weights=pairs, minlength=ranks)]
