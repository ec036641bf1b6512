"""Paged attention on one device: a few new queries against keys that lie in pages of a pool.

    out = softmax(scale q K^T) V  over the keys that the pages of a row's table hold, up to the row's length

Key s of row r is slot s mod p of page table[r, s // p]. The pool holds the pages of all layers and is handed over whole with a
layer's index: XLA copies the slice of an array that a kernel gets. The backends:

    reference  page by page, materialised, at highest precision: the oracle
    xla        gathers the pages, then `few.attend_parts`; runs anywhere
    mosaic     the Hopper kernel, `flash/hopper/paged_kernel.py`

Source: Kwon et al., PagedAttention, arXiv 2309.06180; Flash-Decoding, Dao et al. 2023, for the split over keys.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from ring_jax._checks import Sizes, check_array, check_choice, check_count, is_array, to_int32
from ring_jax.flash import few, reference
from ring_jax.flash.hopper import paged_launch
from ring_jax.flash.kv import pack
from ring_jax.flash.operands import BlockOptions, Bounds, Partial


def gather_pages(
    pages: Float[Array, "*layers 2 P p K H"],
    table: Int[Array, "R n"],
    layer: int | Int[Array, ""] = 0,
) -> Float[Array, "2 R S K H"]:
    """The keys and values of each row's pages one after the other, S = n p.

    Args:
        pages: the pool, of any number of leading axes.
        table: page ids. Of a page that is not there (an id below 0 or from P up) all is zero.
        layer: counted over all leading axes together; clipped to those that are there where traced.

    Example:
        >>> pages = jnp.arange(6.0).reshape(2, 3, 1, 1, 1)
        >>> gather_pages(pages, jnp.array([[2, 1, 7]]))[:, 0, :, 0, 0].tolist()
        [[2.0, 1.0, 0.0], [5.0, 4.0, 0.0]]
    """
    *_, P, p, K, H = check_pages(pages, table)
    table, layers = to_int32(table), math.prod(pages.shape[:-5])
    first = (2 * _layer_index(layer, layers) + jnp.arange(2, dtype=jnp.int32)) * P
    there = _is_page(table, P)
    # Rows of one flat array: indices into several of its axes would have XLA transpose the pool.
    index = jnp.where(there[None], first[:, None, None] + table[None], -1)
    flat = jnp.asarray(pages).reshape(-1, p, K, H)
    return flat.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False).reshape(2, len(table), -1, K, H)


def paged_attention(
    query: Float[Array, "R T N H"],
    pages: Float[Array, "*layers 2 P p K H"],
    table: Int[Array, "R n"],
    lengths: Int[Array, " R"],
    *,
    layer: int | Int[Array, ""] = 0,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    implementation: str | None = None,
) -> tuple[Float32[Array, "R T N H"], Float32[Array, "R T N"]]:
    """Attention of a few queries to the first `lengths` keys of each row's pages.

    All queries of a row see the same keys: those before the new tokens. Join the new tokens' own keys to the result, which
    is a partial one, with `ring_jax.merge_partials`; over ranks, `ring_jax.context.paged.decode_attention` does both.
    No gradient.

    Args:
        query: [R, T, N, H]; T is 1 or a few, N a multiple of K.
        pages: keys and values of all layers, [..., 2, P, p, K, H], in the dtype of the query.
        table: page ids, int [R, n]: key s of row r is slot s mod p of page table[r, s // p]. Only the first
            ceil(lengths / p) ids of a row are read. A row ends before a page that is not there (an id below 0 or from P up).
        lengths: int [R], at most n p (more are as many), 0 for a row that sees nothing.
        layer: which layer's pages, counted over all leading axes of `pages` together; clipped to those that are there
            where it is traced.
        scale: multiplies the logits; default H ** -0.5.
        logits_soft_cap: cap c > 0 applied as c * tanh(logits / c).
        implementation: "reference", "xla", "mosaic", or None for the best that runs here.

    Returns:
        (out, lse): float32 [R, T, N, H] and natural-log [R, T, N]; 0 and -inf where a row sees no key. Slots from
        `lengths` on may hold anything, NaN included.

    Raises:
        TypeError: what is no array, number or name. ValueError: shapes, dtypes or values that do not fit.
        NotImplementedError: a named implementation that cannot run these inputs on this device.

    Example:
        >>> pages = jnp.ones((2, 4, 8, 2, 16))  # 4 pages of 8 slots, 2 heads of 16
        >>> table, lengths = jnp.array([[3, 1], [2, 0]]), jnp.array([11, 0])
        >>> out, lse = paged_attention(jnp.ones((2, 1, 4, 16)), pages, table, lengths)
        >>> out[:, 0, 0, 0].tolist(), round(float(lse[0, 0, 0]), 3)
        ([1.0, 0.0], 6.398)

    Source: Kwon et al., Efficient Memory Management for LLM Serving with PagedAttention, arXiv 2309.06180.
    """
    check_array("query", query, "R T N H", sizes := Sizes())
    *_, K, H = check_pages(pages, table, sizes)
    check_array("lengths", lengths, "R", sizes, kind="integer")
    if query.dtype != pages.dtype:
        raise ValueError(f"query and pages must share one dtype, got {query.dtype} and {pages.dtype}: cast the query")
    if query.shape[2] % K if K else query.shape[2]:
        raise ValueError(f"{query.shape[2]} query heads cannot share {K} key-value heads: N must be a multiple of K")
    options = BlockOptions.of_call(H, scale, logits_soft_cap, None)
    backend = select(implementation, query, pages, options)
    layer = _layer_index(layer, math.prod(pages.shape[:-5]))
    if 0 in query.shape or 0 in table.shape or 0 in pages.shape:
        return jnp.zeros(query.shape, jnp.float32), jnp.full(query.shape[:3], -jnp.inf, jnp.float32)
    table, lengths = jnp.asarray(to_int32(table)), jnp.asarray(to_int32(lengths))
    lengths = jnp.clip(lengths, 0, _pages_there(table, pages.shape[-4]) * pages.shape[-3])
    return _run(backend, options, query, pages, table, lengths, layer)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    backend: Any, options: Any, query: jax.Array, pages: Any, table: jax.Array, lengths: jax.Array, layer: Any
) -> Any:
    return backend.forward(query, pages, table, lengths, layer, options)


def _reference(
    query: jax.Array, pages: Any, table: jax.Array, lengths: jax.Array, layer: Any, options: BlockOptions
) -> Partial:
    """Row by row, page by page."""
    P, p = pages.shape[-4:-2]
    pages = lax.dynamic_index_in_dim(pages.reshape(-1, *pages.shape[-5:]), layer, keepdims=False)
    carry = jnp.zeros(query.shape, jnp.float32), jnp.full(query.shape[:3], -jnp.inf, jnp.float32)
    for i in range(table.shape[1]):
        page = pages[:, jnp.clip(table[:, i], 0, P - 1)]
        seen = jnp.clip(lengths - i * p, 0, p)
        slots = jnp.arange(p, dtype=jnp.int32)[None] < seen[:, None]
        page = jnp.where(slots[None, ..., None, None], page, 0)
        end = jnp.broadcast_to(seen[:, None], query.shape[:2])
        out, lse = reference.forward(query, pack(*page), Bounds(jnp.zeros_like(end), end), carry, options)
        carry = out.astype(jnp.float32), lse.astype(jnp.float32)
    return carry


def _xla(
    query: jax.Array, pages: Any, table: jax.Array, lengths: jax.Array, layer: Any, options: BlockOptions
) -> Partial:
    kv = gather_pages(pages, table, layer)
    seen = jnp.arange(kv.shape[2], dtype=jnp.int32)[None] < lengths[:, None]
    value = jnp.where(seen[..., None, None], kv[1], 0)  # 0 x NaN is NaN
    return few.attend_parts(query, [(kv[0], value, seen)], scale=options.scale, logits_soft_cap=options.logits_soft_cap)


@dataclasses.dataclass(frozen=True)
class Backend:
    """forward(query, pages, table, lengths, layer, options) -> (out, lse), of checked operands that are not empty, lengths within
    the pages that are there, all indices int32."""

    forward: Callable[..., Partial]
    # Why it cannot run these inputs here, or None.
    unsupported_reason: Callable[[Any, Any, BlockOptions], str | None] = lambda query, pages, options: None


BACKENDS = {
    "reference": Backend(_reference),
    "xla": Backend(_xla),
    "mosaic": Backend(paged_launch.forward, paged_launch.unsupported_reason),
}

# What implementation=None tries, best first; the last runs anything.
PREFERENCE = ("mosaic", "xla")


def select(implementation: str | None, query: Any, pages: Any, options: BlockOptions) -> Backend:
    """The backend that `implementation` names, or the best that runs here for None; query and pages may be shapes.

    Raises:
        ValueError: unknown name. NotImplementedError: a named backend cannot run these inputs on this device.
    """
    check_choice("implementation", implementation, BACKENDS, optional=True)
    if implementation is None:
        able = (name for name in PREFERENCE if BACKENDS[name].unsupported_reason(query, pages, options) is None)
        return BACKENDS[next(able)]
    if (reason := BACKENDS[implementation].unsupported_reason(query, pages, options)) is not None:
        raise NotImplementedError(
            f"implementation={implementation!r} cannot run here: {reason}. None lets ring_jax choose"
        )
    return BACKENDS[implementation]


def check_pages(pages: Any, table: Any, sizes: Sizes | None = None) -> tuple[int, ...]:
    """The shape of the pool, which must fit the `sizes` known so far (R, K and H)."""
    check_array("pages", pages)
    if pages.ndim < 5 or pages.shape[-5] != 2:
        raise ValueError(f"pages must have shape [..., 2, P, p, K, H]: keys and values, got {pages.shape}")
    for axis, size in zip("KH", pages.shape[-2:], strict=True):
        if sizes is not None and sizes.setdefault(axis, size) != size:
            raise ValueError(
                f"pages must have {axis}={sizes[axis]} in [..., 2, P, p, K, H], as query and key have, got {pages.shape}"
            )
    check_array("table", table, "R n", sizes, kind="integer")
    return pages.shape


def _is_page(ids: Any, pages: int) -> Any:
    return (ids >= 0) & (ids < pages)


def _pages_there(table: jax.Array, pages: int) -> jax.Array:
    """How many pages each row has before one that is not there."""
    gaps = jnp.where(_is_page(table, pages), table.shape[1], jnp.arange(table.shape[1], dtype=jnp.int32)[None])
    return jnp.min(gaps, axis=1)


def _layer_index(layer: Any, layers: int) -> jax.Array:
    if is_array(layer):
        check_array("layer", layer, "", kind="integer")
        return jnp.clip(jnp.asarray(to_int32(layer)), 0, layers - 1)
    return jnp.int32(check_count("layer", layer, 0, max(layers - 1, 0)))
