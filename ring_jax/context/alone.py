"""A context on one rank, where every layout is the natural order: what a layout got wrong shows against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ring_jax._checks import check_array, check_callable, check_number

if TYPE_CHECKING:
    from ring_jax.context.parallel import ContextParallel


def on_one_rank(context: ContextParallel) -> ContextParallel:
    """The same context over a mesh of the same axes, all of size one."""
    names = context.resolve_mesh().axis_names
    device = np.array(jax.devices()[0], dtype=object).reshape((1,) * len(names))
    return dataclasses.replace(context, mesh=Mesh(device, names, axis_types=(AxisType.Auto,) * len(names)))


def check_layout(context: ContextParallel, function: Callable, arrays: tuple, tolerance: float) -> float:
    """See `ContextParallel.check_layout`."""
    check_callable("function", function, "a function (context, *arrays) -> arrays")
    check_number("tolerance", tolerance, low=0)
    for x in jax.tree.leaves(arrays):
        check_array("arrays", x, kind="any")
    if context.is_manual:
        raise ValueError("check_layout calls the function itself: call it outside of shard_map and jit")
    alone, tree = jax.tree.flatten(function(on_one_rank(context), *arrays))
    spread, other_tree = jax.tree.flatten(function(context, *arrays))
    if bool(tree != other_tree):  # type: ignore[operator]
        raise ValueError(
            "the function gives other trees over this context and on one rank: return natural order from it"
        )
    largest = 0.0
    for one, many in zip(alone, spread, strict=True):
        check_array("what function returns", one, kind="any")
        check_array("what function returns", many, kind="any")
        if one.shape != many.shape:
            raise ValueError(
                f"the function gives shape {many.shape} over this context and {one.shape} on one rank: return natural order "
                "from it, cut to the real length (context.from_layout(x, seq_len))"
            )
        largest = max(largest, _difference(one, many))
    if not largest <= tolerance:
        raise ValueError(
            f"over {context.ranks()} context ranks in layout {context.layout} the results differ by {largest:.2g} of their largest "
            f"entry from those on one rank (tolerance {tolerance}): look for an array that did not go through context.to_layout, "
            "or positions other than context.positions"
        )
    return largest


def _difference(one: Any, many: Any) -> float:
    """The largest difference over the largest entry, where both are finite; infinite where only one of them is."""
    one, many = (np.asarray(x, np.float64) for x in (one, many))
    finite = np.isfinite(one)
    if not np.array_equal(finite, np.isfinite(many)):
        return np.inf
    scale = np.abs(one[finite]).max(initial=0.0)
    return float(np.abs(one[finite] - many[finite]).max(initial=0.0) / (scale or 1.0))
