"""A context on one rank, where every layout is the natural order: what a layout got wrong shows against it."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ring_jax._arrays import on_host
from ring_jax._checks import check_array, check_callable, check_number
from ring_jax._mesh import AnyMesh

Context = TypeVar("Context")


def mesh_of_one(mesh: AnyMesh) -> Mesh:
    """A mesh of the same axes, all of size one."""
    names = mesh.axis_names
    device = np.array(jax.local_devices()[0], dtype=object).reshape((1,) * len(names))
    return Mesh(device, names, axis_types=(AxisType.Auto,) * len(names))


def largest_difference(
    function: Callable[..., Any], here: Context, alone: Context, arrays: tuple[Any, ...], tolerance: float, where: str
) -> float:
    """Between function(here, *arrays) and function(alone, *arrays); see `ContextParallel.check_layout`.

    Args:
        here, alone: the context, and the same on one rank. where: what `here` is, for the message.
    """
    check_callable("function", function, "a function (context, *arrays) -> arrays")
    check_number("tolerance", tolerance, low=0)
    for x in jax.tree.leaves(arrays):
        check_array("arrays", x, kind="any")
    expected, tree = jax.tree.flatten(function(alone, *arrays))
    spread, other_tree = jax.tree.flatten(function(here, *arrays))
    if bool(tree != other_tree):  # type: ignore[operator]
        raise ValueError(
            "the function gives other trees over this context and on one rank: return natural order from it"
        )
    largest = 0.0
    for one, many in zip(expected, spread, strict=True):
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
            f"over {where} the results differ by {largest:.2g} of their largest "
            f"entry from those on one rank (tolerance {tolerance}): look for an array that did not go through context.to_layout, "
            "or positions other than context.positions"
        )
    return largest


def _difference(one: Any, many: Any) -> float:
    """The largest difference over the largest entry, where both are finite; infinite where only one of them is."""
    one, many = (on_host(x).astype(np.float64) for x in (one, many))
    finite = np.isfinite(one)
    if not np.array_equal(finite, np.isfinite(many)):
        return np.inf
    scale = np.abs(one[finite]).max(initial=0.0)
    return float(np.abs(one[finite] - many[finite]).max(initial=0.0) / (scale or 1.0))
