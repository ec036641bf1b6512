"""How a model's parameters and activations lie on a mesh: one value names the mesh axes."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from ring_jax import _repr
from ring_jax._checks import (
    check_choice,
    check_count,
    check_instance,
    check_mesh_axes,
    renamed_arguments,
)
from ring_jax._mesh import Axis, axis_names, axis_size
from ring_jax.context import ContextParallel
from ring_jax.gdn.cost import STRATEGIES
from ring_jax.models.qwen3_5.config import Config

# Dimensions of parameters. The reduced dimension of every product can lie over the `weights` axis too, so that a rank
# that has the whole of x multiplies its part and sums, and one that has its own tokens gathers the weight first.
REDUCED = "reduced"  # input of a projection whose output is split over heads or MLP features
HEADS, KEY_VALUE_HEADS, LINEAR_HEADS, FEATURES, VOCABULARY = "heads", "kv_heads", "linear_heads", "features", "vocab"
EXPERTS = "experts"
REDUCED_HEADS, REDUCED_FEATURES = "reduced_heads", "reduced_features"  # input of an output projection
WHOLE = None

_NAMES = (
    REDUCED,
    HEADS,
    KEY_VALUE_HEADS,
    LINEAR_HEADS,
    FEATURES,
    VOCABULARY,
    EXPERTS,
    REDUCED_HEADS,
    REDUCED_FEATURES,
)
_TENSOR = {HEADS, KEY_VALUE_HEADS, LINEAR_HEADS, FEATURES, VOCABULARY, REDUCED_HEADS, REDUCED_FEATURES}
_WEIGHTS = {REDUCED, REDUCED_HEADS, REDUCED_FEATURES}


@dataclasses.dataclass(frozen=True)
class Sharding:
    """Mesh axes of a model. Hashable.

    Args:
        context: sequence (`axis`, `layout`, `strategy`), data (`batch_axis`), tensor (`head_axis`: heads, MLP
            features and vocabulary) and the mesh itself.
        expert: one axis over which experts lie; their tokens travel to them and back. May be the context axis.
        weights: axis over which every large parameter lies besides (FSDP), on a dimension that products reduce:
            it is gathered layer by layer. May be the context or the data axis, or both.
        gdn_strategy: how GDN layers run over the context axis: "auto", "batch", "head" or "state".

    Example:
        >>> import jax, ring_jax
        >>> mesh = jax.make_mesh((1,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> cp = ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh)
        >>> tuple(Sharding(cp, weights="context").spec((64, 128), ("reduced", "heads"), mesh))
        (None, None)
    """

    context: ContextParallel
    _: dataclasses.KW_ONLY
    expert: str | None = None
    weights: Axis | None = None
    gdn_strategy: str = "auto"
    __repr__ = _repr.of_fields

    def __post_init__(self) -> None:
        check_instance("context", self.context, ContextParallel, "a ring_jax.ContextParallel")
        check_choice("gdn_strategy", self.gdn_strategy, ("auto", *STRATEGIES))
        if self.weights is not None:
            object.__setattr__(self, "weights", check_mesh_axes("weights", self.weights))
        if self.expert is not None:
            object.__setattr__(self, "expert", check_mesh_axes("expert", self.expert, most=1))
        for field in ("expert", "weights"):
            if set(axis_names(getattr(self, field))) & set(axis_names(self.tensor)):
                raise ValueError(f"{field}={getattr(self, field)!r} is the tensor axis too: give it another mesh axis")

    @property
    def tensor(self) -> Axis | None:
        """The mesh axis of heads, MLP features and vocabulary."""
        return self.context.head_axis

    @property
    def batch(self) -> Axis | None:
        """The mesh axis of the batch."""
        return self.context.batch_axis

    @property
    def sequence(self) -> Axis:
        """The mesh axis of the sequence."""
        return self.context.axis

    def resolve_mesh(self) -> Any:
        """The mesh of the context, or the ambient one.

        Raises:
            ValueError: there is none, or it lacks an axis that is named here.
        """
        mesh = self.context.resolve_mesh()
        self._check_axes(mesh)
        return mesh

    def _check_axes(self, mesh: Any) -> None:
        fields = {"expert": self.expert, "weights": self.weights}
        fields |= {"context.axis": self.sequence, "context.batch_axis": self.batch, "context.head_axis": self.tensor}
        for field, axes in fields.items():
            for name in axis_names(axes):
                if name not in mesh.axis_names:
                    raise ValueError(f"Sharding({field}={name!r}): the mesh has axes {dict(mesh.shape)}, no {name!r}")

    def spec(self, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Any) -> P:
        """PartitionSpec of a parameter whose dimensions are named `axes`.

        A dimension that does not divide over the weights axis stays whole along it; heads, features and experts that
        do not divide over theirs are an error.
        """
        _check_mesh(mesh)
        for size in _tuple("shape", shape):
            check_count("shape", size)
        for name in _tuple("axes", axes):
            check_choice("axes", name, _NAMES, optional=True)
        if len(shape) != len(axes):
            raise ValueError(f"axes must name every dimension of shape {tuple(shape)}, got {tuple(axes)}")
        self._check_axes(mesh)
        used: set[str] = set()

        def free(axis: Axis | None) -> tuple[str, ...]:
            return tuple(name for name in axis_names(axis) if name not in used and mesh.shape[name] > 1)

        entries: list[Any] = [None] * len(shape)
        for i, (size, name) in enumerate(zip(shape, axes, strict=True)):
            if name not in _TENSOR and name != EXPERTS:
                continue
            axis = axis_names(self.expert if name == EXPERTS else self.tensor)
            if size % axis_size(mesh, axis):
                if name != VOCABULARY:  # an odd vocabulary stays whole
                    raise ValueError(
                        f"{size} {name} of a parameter {shape} do not divide over mesh axis {axis} of size {axis_size(mesh, axis)}"
                    )
                continue
            entries[i] = axis
            used.update(axis)
        for i, (size, name) in enumerate(zip(shape, axes, strict=True)):
            if name in _WEIGHTS:
                axis = (*(entries[i] or ()), *free(self.weights))
                if size % axis_size(mesh, axis) == 0:
                    entries[i] = axis
        return P(*(axis[0] if axis and len(axis) == 1 else axis or None for axis in entries))

    def check(self, config: Config, mesh: Any) -> None:
        """Raises ValueError, all in one, where heads or experts of a model do not divide over their mesh axes."""
        check_instance("config", config, Config, "a ring_jax.models.qwen3_5.Config")
        _check_mesh(mesh)
        self._check_axes(mesh)
        counts = {
            "query heads": (config.num_heads, self.tensor),
            "key-value heads": (config.num_kv_heads, self.tensor),
            "linear key heads": (config.linear.key_heads, self.tensor),
            "linear value heads": (config.linear.value_heads, self.tensor),
            "experts": (config.experts.count if config.experts is not None else 0, self.expert),
        }
        found = [
            f"{count} {what} over {axis!r} of size {axis_size(mesh, axis)}"
            for what, (count, axis) in counts.items()
            if count % axis_size(mesh, axis)
        ]
        if found:
            raise ValueError(
                f"this model does not divide over the mesh: {'; '.join(found)}. Use a smaller tensor or expert axis and "
                "give the devices to the context axis"
            )


# A dataclass makes its own __init__, which `replace` calls too.
Sharding.__init__ = renamed_arguments(way="gdn_strategy")(Sharding.__init__)  # type: ignore[method-assign]


def _check_mesh(mesh: Any) -> None:
    check_instance("mesh", mesh, (Mesh, AbstractMesh), "a jax.sharding.Mesh")


def _tuple(name: str, value: Any) -> tuple[Any, ...]:
    check_instance(name, value, (tuple, list), "a tuple, one entry for each dimension")
    return tuple(value)
