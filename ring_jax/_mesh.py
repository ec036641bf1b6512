"""Mesh plumbing that knows neither attention nor layouts: axis names, resharding, and a jitted shard_map."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Axis = str | tuple[str, ...]
AnyMesh = Mesh | AbstractMesh
T = TypeVar("T")


def axis_names(axis: Axis | None) -> tuple[str, ...]:
    """The mesh axes that `axis` means, as a tuple; () for None."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def axis_size(mesh: AnyMesh, axis: Axis | None) -> int:
    """Number of devices along `axis` (a name, a tuple or None)."""
    return math.prod(mesh.shape[a] for a in axis_names(axis))


def mesh_of_ids(ids: list[int], shape: tuple[int, ...], axis_names: tuple[str, ...], kinds: list[str]) -> Mesh:
    """The mesh of a pickle, over the devices of these ids in this process."""
    devices = {d.id: d for d in jax.devices()}
    missing = sorted(set(ids) - set(devices))
    if missing:
        raise ValueError(
            f"this ContextParallel was pickled with a mesh of devices {ids}, and this process has no {missing}: pickle one "
            "without a mesh (dataclasses.replace(context, mesh=None)) and run under jax.set_mesh here"
        )
    found = np.array([devices[i] for i in ids], dtype=object).reshape(shape)
    return Mesh(found, axis_names, axis_types=tuple(AxisType[kind] for kind in kinds))


@dataclasses.dataclass(frozen=True)
class HashablePartial:
    """`fn` with static trailing arguments; unlike functools.partial it compares by value, so jit's cache finds it."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]

    def __call__(self, *operands: Any) -> Any:
        return self.fn(*operands, *self.args)

    def __repr__(self) -> str:  # jax's messages show it; the arguments may be a whole model's structure
        return getattr(self.fn, "__name__", type(self.fn).__name__)


def run_sharded(
    local: Callable[..., Any], mesh: AnyMesh, in_specs: Any, out_specs: Any, operands: tuple[Any, ...]
) -> Any:
    """A jitted, fully manual shard_map of `local` (hashable) over `operands`, which are resharded first where the
    mesh is Explicit. Eager calls hit jit's cache too: op by op, a ring would take seconds."""
    leaves, tree = jax.tree.flatten(in_specs, is_leaf=lambda x: isinstance(x, P))
    return _run_sharded(local, mesh, tuple(leaves), tree, out_specs, reshard_explicit(operands, mesh, in_specs))


@functools.partial(jax.jit, static_argnums=range(5))
def _run_sharded(
    local: Callable[..., Any],
    mesh: AnyMesh,
    leaves: tuple[P, ...],
    tree: Any,
    out_specs: Any,
    operands: tuple[Any, ...],
) -> Any:
    in_specs = jax.tree.unflatten(tree, leaves)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(*operands)


def reshard_explicit(tree: T, mesh: AnyMesh, specs: Any) -> T:
    """Reshard arrays to a shard_map's in_specs (which may stand for whole parts of the tree) where mesh axes are Explicit:
    there the specs only assert. On Auto axes they are constraints, and nothing is to be done."""
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    if not explicit:
        return tree

    def only_explicit(axis: Axis | None) -> Axis | None:
        names = tuple(a for a in axis_names(axis) if a in explicit)
        return names if len(names) > 1 else names[0] if names else None

    def move(x: jax.Array, spec: P) -> jax.Array:
        return jax.sharding.reshard(x, NamedSharding(mesh, P(*map(only_explicit, spec))))

    each = lambda spec, part: jax.tree.map(lambda x: move(x, spec), part)  # noqa: E731
    return jax.tree.map(each, specs, tree, is_leaf=lambda x: isinstance(x, P))
