"""GDN layers, and the bare operation, over a context-parallel mesh axis: one shard_map around a partition entered and left."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ring_jax._checks import (
    check_array,
    check_callable,
    check_choice,
    check_count,
    check_instance,
    concrete,
    renamed_arguments,
)
from ring_jax._mesh import axis_size, run_sharded
from ring_jax._segment_ids import check_segment_ids
from ring_jax.context.parallel import ContextParallel
from ring_jax.context.shard import Shard
from ring_jax.gdn.checks import check_operands, check_segments, state_dtype
from ring_jax.gdn.cost import STRATEGIES, GDNShape
from ring_jax.gdn.heads import Heads
from ring_jax.gdn.partition import Partition, partition, resolve_strategy


@renamed_arguments(way="strategy")
def run(
    layers: Callable[[Any, jax.Array, Any, Partition], tuple[Any, ...]],
    params: Any,
    x: Any,
    *,
    context: ContextParallel,
    strategy: str = "auto",
    shape: GDNShape | None = None,
    caches: Any = None,
    segment_ids: jax.Array | None = None,
    seq_len: int | None = None,
) -> tuple[Any, Any]:
    """Runs GDN layers, and whatever acts on tokens one by one between them, over the context axis as one shard_map.

    Args:
        layers: `layers(params, x, caches, partition) -> (y, caches)`. Called with the tokens that lie here under the
            partition; mixers take it (`GatedDeltaNet(...)(x, cache, partition=partition)`), norms, MLPs and experts
            need no word of it. y and its leaves are [batch, tokens here, ...]. Compiled once for each such function, as by
            `jax.jit`: hand what changes between calls through `params`.
        params: pytree of what the layers need, the same on all ranks (close over no traced arrays).
        x: [B, T, ...] (or a pytree of such) in the order of `context.layout`.
        context: the mesh axes and the layout. Inside a shard_map that is manual over the axis, all arrays are local.
            Heads are not split over `head_axis` here: ranks along it do the same work.
        strategy: "batch", "head", "state", or "auto": the cheapest that can run, by `choose_strategy`, which needs `shape`.
        shape: of the run, for "auto" (batch and length are filled in from x).
        caches: pytree with the batch first (`GDNCache`s), the same on all context ranks; None to begin.
        segment_ids: int [B, T] in the order of the layout; negative: padding.
        seq_len: real length, where `to_layout` padded: later positions are padding.

    Returns:
        y in the order of the layout, and caches after the last valid token, again the same on all context ranks.

    Raises:
        ValueError: the strategy cannot serve the layout or the number of heads, or the length does not divide.

    Example:
        >>> import jax, jax.numpy as jnp, ring_jax
        >>> mesh = jax.make_mesh((1,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> cp = ring_jax.ContextParallel("context", mesh=mesh)
        >>> def layers(params, x, caches, partition):  # GDN layers call mix(params, x, cache, partition) here
        ...     return x * params, caches
        >>> y, cache = run(layers, jnp.float32(2), cp.to_layout(jnp.ones((1, 7, 4))), context=cp, strategy="state", seq_len=7)
        >>> y.shape
        (1, 8, 4)
    """
    check_instance("context", context, ContextParallel, "a ring_jax.ContextParallel")
    check_callable("layers", layers, "a function layers(params, x, caches, partition)")
    check_choice("strategy", strategy, ("auto", *STRATEGIES))
    check_instance("shape", shape, GDNShape, "a ring_jax.gdn.GDNShape", optional=True)
    batch, length = _check_leaves(x, caches)
    leaf = _first_leaf(x)
    ranks = context.ranks(leaf)
    manual = context.is_manual
    length = length * ranks if manual else length
    seq_len = None if seq_len is None else check_count("seq_len", seq_len, 0, length)
    check_segments(segment_ids, batch, leaf.shape[1], natural=False)
    shard = context.shard(length, leaf)
    _check_known_ids(segment_ids, shard, manual, seq_len)
    rows = batch if manual else _local_rows(batch, context, leaf)
    strategy = resolve_strategy(strategy, shape, rows, shard)

    local = _Run(layers, context, strategy, seq_len)
    args = (params, x, caches, segment_ids)
    if manual:
        return local(*args)
    tokens, row = P(context.batch_axis, context.axis), P(context.batch_axis)
    return run_sharded(local, context.resolve_mesh(leaf), (P(), tokens, row, tokens), (tokens, row), args)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What one rank does: the partition is entered, its layers run, it is left. Hashable: jit finds it again."""

    layers: Callable[..., Any]
    context: ContextParallel
    strategy: str
    seq_len: int | None

    def __call__(self, params: Any, x: jax.Array, caches: Any, ids: jax.Array | None) -> Any:
        leaf = _first_leaf(x)
        split = partition(self.context, leaf, strategy=self.strategy, segment_ids=ids, seq_len=self.seq_len)
        y, caches = self.layers(params, split.enter(x), split.enter_rows(caches), split)
        return split.leave(y), split.leave_rows(caches)

    def __repr__(self) -> str:  # jax's messages show it
        return "gated_delta_rule_over_ranks"


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The operation alone as the layers of `run`."""

    implementation: str | None
    scale: float | None

    def __call__(self, _: Any, operands: Any, state: jax.Array, partition: Partition) -> Any:
        options: Any = {"implementation": self.implementation, "scale": self.scale}
        return partition.gated_delta_rule(*operands, initial_state=state, **options)


def rule_over_ranks(
    operands: Any,
    *,
    context: ContextParallel,
    strategy: str,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    seq_len: int | None,
    scale: float | None,
    implementation: str | None,
) -> tuple[jax.Array, jax.Array]:
    """`ring_jax.gated_delta_rule(..., context=...)`: see there. Heads may be sharded over `context.head_axis`."""
    query, key, value, log_decay, beta = operands
    check_instance("context", context, ContextParallel, "a ring_jax.ContextParallel")
    check_operands(query, key, value, log_decay, beta, initial_state, segment_ids, natural=False)
    ranks, manual = context.ranks(query), context.is_manual
    shard = context.shard(query.shape[1] * (ranks if manual else 1), query)
    seq_len = None if seq_len is None else check_count("seq_len", seq_len, 0, shard.length)
    _check_known_ids(segment_ids, shard, manual, seq_len)
    mesh = None if manual else context.resolve_mesh(query)
    split = 1 if mesh is None else axis_size(mesh, context.head_axis)
    if key.shape[2] % split or value.shape[2] % split:
        raise ValueError(
            f"{key.shape[2]} key heads and {value.shape[2]} value heads do not divide over head_axis="
            f"{context.head_axis!r} of size {split}: leave head_axis out, or shard fewer ways"
        )
    if 0 in value.shape or 0 in key.shape:
        like = (key.shape[0], value.shape[2], key.shape[3], value.shape[3])
        empty = jnp.zeros(like, state_dtype(*operands)) if initial_state is None else initial_state
        return jnp.zeros_like(value), empty
    heads = Heads(key.shape[2] // split, value.shape[2] // split, key.shape[3], value.shape[3])
    rows = key.shape[0] if manual else _local_rows(key.shape[0], context, query)
    shape = GDNShape(rows, shard.length, heads, conv_width=1, itemsize=value.dtype.itemsize)
    strategy = resolve_strategy(strategy, shape, rows, shard)

    local = _Run(_Rule(implementation, scale), context, strategy, seq_len)
    args = (None, operands, initial_state, segment_ids)
    if mesh is None:
        return local(*args)
    tokens = P(context.batch_axis, context.axis, context.head_axis)
    state, ids = P(context.batch_axis, context.head_axis), P(context.batch_axis, context.axis)
    return run_sharded(local, mesh, (P(), tokens, state, ids), (tokens, state), args)


def _check_known_ids(ids: jax.Array | None, shard: Shard, manual: bool, seq_len: int | None) -> None:
    """`check_segment_ids` for ids in the order of the layout, of the whole sequence, but for padding beyond `seq_len`."""
    known = None if manual else concrete(ids)
    if known is not None:
        order = np.concatenate([shard.layout.positions(r, shard.length, shard.ranks) for r in range(shard.ranks)])
        check_segment_ids(known[:, np.argsort(order)][:, :seq_len])


def _local_rows(batch: int, context: ContextParallel, x: Any) -> int:
    size = axis_size(context.resolve_mesh(x), context.batch_axis)
    if batch % size:
        raise ValueError(
            f"a batch of {batch} does not divide over batch_axis={context.batch_axis!r} of size {size}: pad the batch "
            "(rows of negative segment ids cost nothing but time), or leave batch_axis out"
        )
    return batch // size


def _check_leaves(x: Any, caches: Any) -> tuple[int, int]:
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


def _first_leaf(x: Any) -> Any:
    return jax.tree.leaves(x)[0]
