"""Varying-manual-axes bookkeeping: what shard_map's check_vma wants to know about our loops and rules."""

from typing import Any, TypeVar

import jax
from jax import lax

T = TypeVar("T")


def varying_axes(*trees: Any) -> frozenset[str]:
    """The manual mesh axes over which any leaf of `trees` varies (empty outside a checked shard_map)."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(trees)))


def pcast_to(tree: T, axes: frozenset[str] | tuple[str, ...]) -> T:
    """Every leaf cast to vary over `axes` as well. Its transpose is the psum that a replicated input needs:
    cast before a custom VJP, so that the rule itself never has to sum over ranks."""

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(set(axes) - jax.typeof(x).manual_axis_type.varying))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def align(*trees: Any) -> tuple[Any, ...]:
    """All `trees` cast to vary over the union of their axes."""
    axes = varying_axes(*trees)
    return tuple(pcast_to(tree, axes) for tree in trees)
