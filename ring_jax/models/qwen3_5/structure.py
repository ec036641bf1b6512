"""A model without its parameters: what is static in every program of it."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from ring_jax.models.qwen3_5.config import Config
from ring_jax.models.qwen3_5.sharding import Sharding


@dataclasses.dataclass(frozen=True)
class Structure:
    """Hashable; a static argument. `params` beside it is the tree of `nnx.to_pure_dict(nnx.state(model, nnx.Param))`.

    Fields:
        graph: of the groups of layers. axes: names of every parameter's dimensions, in the order of the tree's leaves.
        config, dtype, sharding, remat, implementation: as of the model.
    """

    graph: Any
    axes: tuple[P, ...]
    config: Config
    dtype: Any
    sharding: Sharding | None
    remat: str | None
    implementation: str | None

    def __repr__(self) -> str:  # jax's messages show it
        return f"{self.config.family} of {self.config.num_layers} layers"

    @classmethod
    def of(cls, model: Any) -> Self:
        """That of a `Qwen3_5`."""
        is_param = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        names = jax.tree.map(lambda v: P(*v.axes), nnx.state(model, nnx.Param), is_leaf=is_param)
        axes = tuple(jax.tree.leaves(nnx.to_pure_dict(names), is_leaf=lambda x: isinstance(x, P)))
        options = model.config, model.dtype, model.sharding, model.remat, model.implementation
        return cls(nnx.graphdef(model.groups), axes, *options)

    def layers(self, values: Any) -> Any:
        """The layers of one group, with these parameters: an entry of the stacked `params["groups"]`."""
        return nnx.merge(self.graph, nnx.State(values)).layers

    def param_specs(self, params: Any, mesh: Any) -> Any:
        """PartitionSpec of every parameter."""
        assert self.sharding is not None
        self.sharding.check(self.config, mesh)
        leaves, tree = jax.tree.flatten(params)
        spec = self.sharding.spec
        return jax.tree.unflatten(
            tree, [spec(x.shape, tuple(axes), mesh) for x, axes in zip(leaves, self.axes, strict=True)]
        )


def head(params: Any) -> jax.Array:
    """The kernel [D, V] of the logits."""
    return params["lm_head"] if "lm_head" in params else params["embed"].T
