"""The gated delta rule over a context-parallel mesh axis: three exact ways, each one shard_map for a run of layers.

    batch   one all-to-all makes whole rows of sequence shards, one brings them back; between them nothing moves
    head    an all-to-all (or a gather of the layer input) into each operation and an all-to-all out of it
    state   tokens stay where they are; one (d_k x (d_k + d_v)) float32 pair for each head and chunk passes between
            ranks, and a halo of W - 1 tokens for the convolution

Where the final state and the convolution tail lie, after each way: **on all context ranks alike**, natural heads and
features, rows sharded over `batch_axis` only. Initial states and tails are taken in the same form, so what one way
leaves any other continues, and decode, whose single token is on all context ranks, needs no communication at all.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from ring_jax._checks import check_array, check_callable, check_choice, check_count, check_flag, check_instance
from ring_jax._vma import pcast_to
from ring_jax.context.parallel import ContextParallel, axis_size, place
from ring_jax.context.shard import Shard, axis_names, axis_to_seq, seq_to_axis
from ring_jax.gdn import segments
from ring_jax.gdn.checks import check_operands, check_segments
from ring_jax.gdn.mixer import Heads
from ring_jax.gdn.plan import WAYS, GDNShape, choose_way
from ring_jax.gdn.ranks import Chunks
from ring_jax.gdn.spread import HeadSplit, OneDevice, Spread, StatePassing


def run(
    layers: Callable[[Any, jax.Array, Any, Spread], tuple[Any, ...]],
    params: Any,
    x: Any,
    *,
    context: ContextParallel,
    way: str = "auto",
    shape: GDNShape | None = None,
    caches: Any = None,
    segment_ids: jax.Array | None = None,
    seq_len: int | None = None,
    sums: bool = False,
) -> tuple[Any, ...]:
    """Runs GDN layers, and whatever acts on tokens one by one between them, over the context axis as one shard_map.

    Args:
        layers: `layers(params, x, caches, spread) -> (y, caches)`. Called with the tokens that lie here under
            `spread`; mixers take `spread` (`GatedDeltaNet(...)(x, cache, spread=spread)`), norms, MLPs and experts
            need no word of it. y and its leaves are [batch, tokens here, ...].
        params: pytree of what the layers need, the same on all ranks (close over no traced arrays).
        x: [B, T, ...] (or a pytree of such) in the order of `context.layout`.
        context: the mesh axes and the layout. Inside a shard_map that is manual over the axis, all arrays are local.
            Heads are not split over `head_axis` here: ranks along it do the same work.
        way: "batch", "head", "state", or "auto": the cheapest that can run, by `plan.choose_way`, which needs `shape`.
        shape: of the run, for "auto" (batch and length are filled in from x).
        caches: pytree with the batch first (`GDNCache`s), the same on all context ranks; None to begin.
        segment_ids: int [B, T] in the order of the layout; negative: padding.
        seq_len: real length, where `to_layout` padded: later positions are padding.
        sums: `layers` returns a third pytree, of sums over the valid tokens here (statistics of a router).

    Returns:
        y in the order of the layout, and caches after the last valid token, again the same on all context ranks; with
        `sums` also those, summed over all tokens (inside a shard_map: over those of its context ranks).

    Raises:
        ValueError: the way cannot serve the layout or the number of heads, or the length does not divide.

    Example:
        >>> y, cache = run(lambda p, x, c, spread: mixer(p, x, c, spread), params, cp.to_layout(x), context=cp,
        ...                way="state", seq_len=x.shape[1])  # doctest: +SKIP
    """
    check_instance("context", context, ContextParallel, "a ring_jax.ContextParallel")
    check_callable("layers", layers, "a function layers(params, x, caches, spread)")
    check_choice("way", way, ("auto", *WAYS))
    check_instance("shape", shape, GDNShape, "a ring_jax.gdn.GDNShape", optional=True)
    check_flag("sums", sums)
    batch, length = _check_leaves(x, caches)
    leaf = _first_leaf(x)
    ranks = context.ranks(leaf)
    manual = context.is_manual
    length = length * ranks if manual else length
    seq_len = None if seq_len is None else check_count("seq_len", seq_len, 0, length)
    check_segments(segment_ids, batch, leaf.shape[1])
    shard = context.shard(length, leaf)
    rows = batch if manual else _local_rows(batch, context, leaf)
    way = _resolve_way(way, shape, rows, shard)

    def local(params, x, caches, ids):
        y, caches, *totals = _run_local(layers, params, x, caches, ids, shard=shard, way=way, seq_len=seq_len)
        if not sums:
            return y, caches
        axes = axis_names(shard.axis) + (() if manual else axis_names(context.batch_axis))
        (totals,) = pcast_to(totals, axes)
        return y, caches, lax.psum(totals, axes)

    if manual:
        return local(params, x, caches, segment_ids)
    mesh = context.resolve_mesh(leaf)
    tokens, row = P(context.batch_axis, context.axis), P(context.batch_axis)
    specs = (P(), tokens, row, tokens)
    args = (params, x, caches, segment_ids)
    args = tuple(place(a, mesh, s) for a, s in zip(args, specs, strict=True))
    out_specs = (tokens, row, P()) if sums else (tokens, row)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out_specs)(*args)


def gated_delta_rule_across(operands, *, context: ContextParallel, way: str, initial_state, segment_ids, **options):
    """`ring_jax.gated_delta_rule(..., context=...)`: see there. Heads may be sharded over `context.head_axis`."""
    query, key, value, log_decay, beta = operands
    check_instance("context", context, ContextParallel, "a ring_jax.ContextParallel")
    check_operands(query, key, value, log_decay, beta, initial_state, segment_ids)
    ranks, manual = context.ranks(query), context.is_manual
    shard = context.shard(query.shape[1] * (ranks if manual else 1), query)
    mesh = None if manual else context.resolve_mesh(query)
    split = 1 if mesh is None else axis_size(mesh, context.head_axis)
    if key.shape[2] % split or value.shape[2] % split:
        raise ValueError(
            f"{key.shape[2]} key heads and {value.shape[2]} value heads do not divide over head_axis="
            f"{context.head_axis!r} of size {split}: leave head_axis out, or shard fewer ways"
        )
    heads = Heads(key.shape[2] // split, value.shape[2] // split, key.shape[3], value.shape[3])
    rows = key.shape[0] if manual else _local_rows(key.shape[0], context, query)
    shape = GDNShape(rows, shard.length, heads, conv_width=1, itemsize=value.dtype.itemsize)
    way = _resolve_way(way, shape, rows, shard)

    def layer(_, operands, state, spread):
        return spread.gated_delta_rule(*operands, initial_state=state, **options)

    def local(operands, state, ids):
        return _run_local(layer, None, operands, state, ids, shard=shard, way=way, seq_len=None)

    args = (operands, initial_state, segment_ids)
    if manual:
        return local(*args)
    tokens = P(context.batch_axis, context.axis, context.head_axis)
    state, ids = P(context.batch_axis, context.head_axis), P(context.batch_axis, context.axis)
    specs = (tokens, state, ids)
    args = tuple(place(a, mesh, s) for a, s in zip(args, specs, strict=True))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(tokens, state))(*args)


def _run_local(layers, params, x, caches, ids, *, shard: Shard, way: str, seq_len: int | None):
    """The body of the shard_map: local tokens in, local tokens out, whole caches in and out."""
    ids = _mask_padding(ids, _first_leaf(x), shard, seq_len)
    if shard.ranks == 1:
        y, caches, *sums = layers(params, x, caches, OneDevice(ids))
        return y, lax.psum(caches, shard.axis), *sums  # of one rank: only to say that it is the same on all
    if way == "state":
        return layers(params, x, caches, StatePassing.of(shard, ids))
    natural = None
    if ids is not None:
        natural = lax.all_gather(ids, shard.axis, axis=1, tiled=True, to="invarying")
        natural = shard.layout.restore(natural, 1, shard.ranks)
    if way == "head":
        return layers(params, x, caches, HeadSplit(shard, ids, natural))
    return _run_rows(layers, params, x, caches, natural, shard)


def _run_rows(layers, params, x, caches, ids, shard: Shard):
    """The batch split: whole rows here, rows of padding where they do not divide."""
    batch = _first_leaf(x).shape[0]
    rows = -(-batch // shard.ranks)
    padded = rows * shard.ranks

    def own(leaf):
        leaf = _pad_rows(leaf, padded)
        return lax.dynamic_slice_in_dim(leaf, shard.rank() * rows, rows, 0)

    if ids is None and padded != batch:
        ids = jnp.zeros((batch, _first_leaf(x).shape[1] * shard.ranks), jnp.int32)
    if ids is not None:
        ids = own(_pad_rows(ids, padded, segments.PADDING))
    x = jax.tree.map(lambda leaf: seq_to_axis(_pad_rows(leaf, padded), shard, 0), x)
    y, caches, *sums = layers(params, x, jax.tree.map(own, caches), OneDevice(ids))
    y = jax.tree.map(lambda leaf: axis_to_seq(leaf, shard, 0)[:batch], y)
    whole = [lax.all_gather(leaf, shard.axis, axis=0, tiled=True, to="invarying") for leaf in jax.tree.leaves(caches)]
    return y, jax.tree.unflatten(jax.tree.structure(caches), [leaf[:batch] for leaf in whole]), *sums


def _mask_padding(ids, x, shard: Shard, seq_len: int | None):
    if seq_len is None or seq_len == shard.length:
        return ids
    positions = shard.positions()
    if ids is None:
        ids = jnp.zeros(x.shape[:2], jnp.int32)
    return jnp.where(positions < seq_len, ids.astype(jnp.int32), segments.PADDING)


def _pad_rows(x, rows: int, value: int = 0):
    widths = [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, widths, constant_values=value) if rows != x.shape[0] else x


def _resolve_way(way: str, shape: GDNShape | None, rows: int, shard: Shard) -> str:
    """`way` by name, checked against the layout; "auto" by cost."""
    if way == "auto":
        if shard.ranks == 1:
            return "batch"
        if shape is None:
            raise ValueError(f"way='auto' weighs bytes against FLOPs: pass shape=GDNShape(...), or name one of {WAYS}")
        shape = dataclasses.replace(shape, batch=rows, length=shard.length)
        return choose_way(shape, shard.ranks, shard.layout)[0]
    if way == "state":
        Chunks.of(shard)
    return way


def _local_rows(batch: int, context: ContextParallel, x) -> int:
    size = axis_size(context.resolve_mesh(x), context.batch_axis)
    if batch % size:
        raise ValueError(
            f"a batch of {batch} does not divide over batch_axis={context.batch_axis!r} of size {size}: pad the batch "
            "(rows of negative segment ids cost nothing but time), or leave batch_axis out"
        )
    return batch // size


def _check_leaves(x, caches) -> tuple[int, int]:
    """(batch, tokens here) of the arrays in x, which must agree; caches have the same batch."""
    leaves = jax.tree.leaves(x)
    if not leaves:
        raise ValueError("x must hold at least one array [B, T, ...], got none")
    for leaf in leaves:
        check_array("x", leaf, kind="any")
        if leaf.ndim < 2 or leaf.shape[:2] != leaves[0].shape[:2]:
            shapes = [leaf.shape for leaf in leaves]
            raise ValueError(f"x must be [B, T, ...], all leaves with the same B and T, got shapes {shapes}")
    for leaf in jax.tree.leaves(caches):
        check_array("caches", leaf, kind="any")
        if leaf.ndim == 0 or leaf.shape[0] != leaves[0].shape[0]:
            raise ValueError(f"caches must have the batch {leaves[0].shape[0]} in front, got shape {leaf.shape}")
    return leaves[0].shape[:2]


def _first_leaf(x):
    return jax.tree.leaves(x)[0]
