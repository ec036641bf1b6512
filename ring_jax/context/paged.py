"""Pages over context ranks: which key lies where, writing new keys, and attention of new tokens to all of them.

A *super-page* is one page of p slots on each of the C ranks, under one id: tables and ids are the same on all ranks. Where a key
lies is a function of its position t alone, whatever the row and whatever the past:

    super-page t // (C p),   rank (t // p) mod C,   slot t mod p;       below n: p (n // C p) + clip(n mod C p - r p, 0, p)

so that a pool [..., 2, P, C p, K, H] sharded along its slots is the placement, a rank's keys ascend, and no rank counts anything.
Everything else here runs inside a shard_map that is manual over the context axis, on a rank's part of the pool
[..., 2, P, p, K, H]; page 0 is for whoever has nothing to write.

Sources: TensorRT-LLM's ledger in global tokens (PR 17866); vLLM RFC 37995 and PRs 23734, 34883 for the merges.
"""

import math
from dataclasses import dataclass
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from ring_jax._checks import (
    Sizes,
    check_array,
    check_choice,
    check_count,
    check_index,
    check_instance,
    check_mesh_axes,
    to_int32,
)
from ring_jax._mesh import Axis, axis_names
from ring_jax.context.merge import STRATEGIES, Outputs, merge_over_ranks
from ring_jax.flash import paged, reference
from ring_jax.flash.kv import pack
from ring_jax.flash.operands import BlockOptions, Bounds
from ring_jax.layout import Layout, as_layout

# A position, a length, a rank: a Python int, a NumPy array or a (traced) JAX array.
Index = Any


@dataclass(frozen=True)
class Placement:
    """Where the key at a position lies.

    Attributes:
        ranks: C, of the context axis.
        page: p, slots of a page on one rank.

    Example:
        >>> placement = Placement(ranks=2, page=4)
        >>> placement.locate(13)
        (1, 1, 1)
        >>> [placement.local_length(13, rank) for rank in range(2)], placement.pages(13)
        ([8, 5], 2)
    """

    ranks: int
    page: int

    def __post_init__(self) -> None:
        check_count("Placement(ranks=...)", self.ranks, 1)
        check_count("Placement(page=...)", self.page, 1)

    @property
    def tokens(self) -> int:
        """Of a super-page."""
        return self.ranks * self.page

    def pages(self, length: Index) -> Index:
        """Super-pages that hold `length` tokens."""
        check_index("length", length)
        return -(-length // self.tokens)

    def locate(self, position: Index) -> tuple[Index, Index, Index]:
        """(which super-page of the row, rank, slot on that rank) of a position."""
        check_index("position", position)
        return position // self.tokens, (position // self.page) % self.ranks, position % self.page

    def position(self, index: Index, rank: Index) -> Index:
        """The position of a rank's key number `index`: slot index mod p of the row's super-page index // p."""
        check_index("index", index)
        check_index("rank", rank, self.ranks)
        return index // self.page * self.tokens + rank * self.page + index % self.page

    def local_length(self, length: Index, rank: Index) -> Index:
        """How many of a row's first `length` keys lie on `rank`."""
        check_index("length", length)
        check_index("rank", rank, self.ranks)
        full, rest = length // self.tokens, length % self.tokens
        clip = jnp.clip if any(isinstance(x, jax.Array) for x in (length, rank)) else np.clip
        part = clip(rest - rank * self.page, 0, self.page)
        return full * self.page + (int(part) if isinstance(part, np.integer) else part)


def most_owned(placement: Placement, length: int) -> int:
    """The most keys that one rank holds of any `length` tokens in sequence."""
    return length // placement.tokens * placement.page + min(length % placement.tokens, placement.page)


def write_pages(
    pages: Float[Array, "*layers 2 P p K H"],
    new: Float[Array, "*layers 2 R T K H"],
    table: Int[Array, "R n"],
    positions: Int[Array, "R T"],
    placement: Placement,
    rank: Index = 0,
) -> Float[Array, "*layers 2 P p K H"]:
    """The pool with the keys and values of new tokens of all layers in their slots: one scatter, in place where `pages` is donated.

    Args:
        pages: this rank's part of the pool, [..., 2, P, p, K, H].
        new: keys and values of tokens that this rank may hold, [..., 2, R, T, K, H]; cast to the dtype of the pool.
        table: super-page ids, int [R, n]; a token beyond it, or of a page that is not there, is dropped.
        positions: of the tokens in their rows, int [R, T], in any order. What lies on another rank, or below 0, is dropped.
        placement: over the context axis. rank: this one.

    Raises:
        TypeError: what is no array, placement or rank. ValueError: shapes and dtypes that do not fit.

    Example:
        >>> pages = write_pages(
        ...     jnp.zeros((2, 3, 4, 1, 1)),  # 3 pages of 4 slots, of one rank
        ...     jnp.ones((2, 1, 2, 1, 1)),
        ...     jnp.array([[2, 1]]),
        ...     jnp.array([[3, 4]]),
        ...     Placement(ranks=1, page=4),
        ... )
        >>> pages[0, :, :, 0, 0].astype(int).tolist()
        [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    """
    *_, P, p, K, H = paged.check_pages(pages, table)
    _check_page(pages, placement)
    check_index("rank", rank, placement.ranks)
    check_array("positions", positions, "R T", sizes := Sizes(R=table.shape[0]), kind="integer")
    check_array("new", new)
    expected = (*pages.shape[:-4], sizes["R"], sizes["T"], K, H)
    if new.shape != expected:
        raise ValueError(f"new must have shape {expected} for these pages and positions, got {new.shape}")
    table, positions = jnp.asarray(to_int32(table)), jnp.asarray(to_int32(positions))
    which, owner, slot = placement.locate(jnp.maximum(positions, 0))
    ids = jnp.take_along_axis(table, jnp.clip(which, 0, table.shape[1] - 1), axis=1)
    kept = (positions >= 0) & (owner == rank) & (which < table.shape[1]) & (ids >= 0) & (ids < P)
    # Rows of one flat array: indices into several of its axes would have XLA transpose the pool.
    stacked = math.prod(pages.shape[:-4])
    base = jnp.arange(stacked, dtype=jnp.int32) * (P * p)
    # Beyond the pool, so that it is dropped; a negative index would count from the end.
    index = jnp.where(kept, ids * p + slot, stacked * P * p)[None] + jnp.where(kept[None], base[:, None, None], 0)
    flat = jnp.asarray(pages).reshape(-1, K, H)
    new = new.astype(pages.dtype).reshape(stacked, *new.shape[-4:])
    return flat.at[index].set(new, mode="drop").reshape(pages.shape)


def to_owners(
    new: Float[Array, "*layers R t K H"],
    start: Int[Array, " R"],
    lengths: Int[Array, " R"],
    placement: Placement,
    layout: Layout | str | None,
    axis: Axis | None,
) -> tuple[Float[Array, "*layers R T K H"], Int[Array, "R T"]]:
    """A chunk's keys and values, moved from where its layout has them to the ranks whose pages they belong to: one all-to-all of
    all layers, of at most C/(C-1) times what has to move where blocks of the layout are multiples of a super-page.

    Args:
        new: this rank's shard [..., R, t, K, H] of a chunk of C t tokens a row, in `layout`.
        start: position of each chunk's first token. lengths: how many of its C t tokens are real.
        layout, axis: of the chunk over the context axis; None on one device.

    Returns:
        (new, positions) for `write_pages`: those of this rank, and others with positions of -1.

    Raises:
        TypeError, ValueError: as `write_pages`; an axis that is none here, or of another size than the placement's.

    Example:
        >>> new, positions = to_owners(
        ...     jnp.ones((2, 1, 4, 1, 1)), jnp.array([7]), jnp.array([3]), Placement(ranks=1, page=4), None, None
        ... )
        >>> positions.tolist()
        [[7, 8, 9, -1]]
    """
    check_array("new", new)
    if new.ndim < 4:
        raise ValueError(f"new must have shape [..., R, t, K, H], got {new.shape}")
    sizes, here = Sizes(R=new.shape[-4]), new.shape[-3]
    for name, x in (("start", start), ("lengths", lengths)):
        check_array(name, x, "R", sizes, kind="integer")
    ranks = _ranks(placement, axis)
    layout = None if axis is None else as_layout(layout)  # type: ignore[arg-type]
    start, lengths = jnp.asarray(to_int32(start)), jnp.asarray(to_int32(lengths))
    if axis is None or layout is None or ranks == 1:
        order = jnp.arange(here, dtype=jnp.int32)[None]
        return new, jnp.where(order < lengths[:, None], start[:, None] + order, -1)
    total, rank = here * ranks, lax.axis_index(axis)
    size = layout.block_size(total, ranks)
    blocks = here // size

    most = jnp.arange(most_owned(placement, size), dtype=jnp.int32)[None, None]
    of_block = jnp.arange(blocks, dtype=jnp.int32) * size

    def owned(source: Any, owner: Any) -> tuple[jax.Array, jax.Array]:
        """Positions [R, blocks, most] of the tokens of rank `source` that `owner` keeps, -1 beyond the last; and their places
        in the shard."""
        begin = start[:, None] + layout.position(of_block, source, total, ranks)[None]
        position = placement.position(placement.local_length(begin, owner)[..., None] + most, owner)
        end = jnp.minimum(begin + size, (start + lengths)[:, None])[..., None]
        place = position - begin[..., None] + of_block[None, :, None]
        return jnp.where(position < end, position, -1), jnp.clip(place, 0, here - 1)

    every = jnp.arange(ranks, dtype=jnp.int32)
    rows = new.shape[-4]
    _, places = jax.vmap(lambda owner: owned(rank, owner))(every)
    places = jnp.moveaxis(places.reshape(ranks, rows, -1), 0, 1).reshape(rows, -1)  # owner after owner
    leaving = jnp.take_along_axis(new, places.reshape(*(1,) * (new.ndim - 4), *places.shape, 1, 1), axis=-3)
    arrived = lax.all_to_all(leaving, axis, new.ndim - 3, new.ndim - 3, tiled=True)
    positions, _ = jax.vmap(lambda source: owned(source, rank))(every)
    return arrived, jnp.moveaxis(positions.reshape(ranks, rows, -1), 0, 1).reshape(rows, -1)


def decode_attention(
    query: Float[Array, "R T N H"],
    key: Float[Array, "R T K H"],
    value: Float[Array, "R T K H"],
    pages: Float[Array, "*layers 2 P p K H"],
    table: Int[Array, "R n"],
    lengths: Int[Array, " R"],
    *,
    layer: int | Int[Array, ""] = 0,
    placement: Placement,
    axis: Axis | None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    outputs: Outputs = "same",
    strategy: str = "auto",
    implementation: str | None = None,
) -> Float[Array, "R T _ H"]:
    """Causal attention of T new tokens to the `lengths` before them, which lie in pages over the ranks, and to themselves.

    Args:
        query, key, value: of the new tokens, the same on all ranks.
        pages: this rank's part of the pool, which does not hold the new tokens yet.
        table: super-page ids [R, n]. lengths: tokens of each row before the new ones, over all ranks.
        layer: as in `ring_jax.flash.paged.paged_attention`, and scale, logits_soft_cap and implementation.
        placement, axis: of the pages over the context axis; None on one device.
        outputs: "same" gives every rank all heads, "heads" each its share of N / C.
        strategy: how partial results meet, a name of `context.merge.STRATEGIES`, or "auto" by bytes.

    Returns:
        out [R, T, N, H] (N / C heads with outputs="heads") in the query's dtype.

    Raises:
        TypeError, ValueError: as `write_pages`; unknown names; heads that do not divide where they must.
        NotImplementedError: a named implementation that cannot run here.

    Example:
        >>> query, new = jnp.ones((1, 1, 2, 8)), jnp.ones((1, 1, 1, 8))
        >>> pages, table = jnp.ones((2, 3, 4, 1, 8)), jnp.array([[2, 1]])
        >>> placement = Placement(ranks=1, page=4)
        >>> decode_attention(query, new, new, pages, table, jnp.array([5]), placement=placement, axis=None).shape
        (1, 1, 2, 8)
    """
    check_choice("outputs", outputs, get_args(Outputs))
    check_choice("strategy", strategy, ("auto", *STRATEGIES))
    check_array("query", query, "R T N H", sizes := Sizes())
    check_array("key", key, "R T K H", sizes)
    check_array("value", value, "R T K H", sizes)
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value must share one dtype, got {query.dtype}, {key.dtype} and {value.dtype}")
    paged.check_pages(pages, table, sizes)
    check_array("lengths", lengths, "R", sizes, kind="integer")
    _check_page(pages, placement)
    ranks = _ranks(placement, axis)
    if outputs == "heads" and sizes["N"] % ranks:
        raise ValueError(f"outputs='heads' shares out {sizes['N']} query heads, which do not divide over {ranks} ranks")
    rank = jnp.int32(0) if axis is None else lax.axis_index(axis)
    here = placement.local_length(jnp.asarray(to_int32(lengths)), rank)
    options = BlockOptions.of_call(query.shape[-1], scale, logits_soft_cap, None)
    partial = paged.paged_attention(
        query,
        pages,
        table,
        here,
        layer=layer,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        implementation=implementation,
    )
    # The first rank counts the new tokens, so that they are seen once.
    end = jnp.where(rank == 0, jnp.arange(1, query.shape[1] + 1, dtype=jnp.int32), 0)
    end = jnp.broadcast_to(end, query.shape[:2])
    partial = reference.forward(query, pack(key, value), Bounds(jnp.zeros_like(end), end), partial, options)
    if axis is None:
        return partial[0].astype(query.dtype)
    return merge_over_ranks(*partial, axis, outputs=outputs, strategy=strategy, dtype=query.dtype)


def _check_page(pages: Any, placement: Placement) -> None:
    check_instance("placement", placement, Placement, "a ring_jax.pages.Placement")
    if pages.shape[-3] != placement.page:
        raise ValueError(f"pages have {pages.shape[-3]} slots on this rank, and {placement} says {placement.page}")


def _ranks(placement: Placement, axis: Axis | None) -> int:
    """Of the context axis, which must be the placement's."""
    check_instance("placement", placement, Placement, "a ring_jax.pages.Placement")
    if axis is None:
        if placement.ranks != 1:
            raise ValueError(f"axis must name the context axis that {placement} is over, got None")
        return 1
    check_mesh_axes("axis", axis)
    try:
        ranks = lax.axis_size(axis_names(axis))
    except NameError:
        raise ValueError(f"axis {axis!r} is no mesh axis here: call this inside a shard_map over it") from None
    if ranks != placement.ranks:
        raise ValueError(f"axis {axis!r} has {ranks} ranks, and {placement} says {placement.ranks}")
    return ranks
