"""Parameters before they have values, and random ones to begin training with."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ring_jax._arrays import pad_to


@dataclasses.dataclass(frozen=True)
class HeadRows:
    """How "rows" begin whose columns go head by head: `used` random ones of each head's `stride`, then zeros."""

    used: int
    stride: int


def param(shape: tuple[int, ...], axes: tuple[str | None, ...], init: str | HeadRows, dtype: Any) -> nnx.Param[Any]:
    """A parameter without values yet: `axes` name its dimensions for `Sharding.spec`, `init` how to begin."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes, init=init)


def stacked(
    groups: int, shape: tuple[int, ...], axes: tuple[str | None, ...], init: str | HeadRows, dtype: Any
) -> nnx.Param[Any]:
    return param((groups, *shape), (None, *axes), init, dtype)


def initialise(model: Any, key: jax.Array) -> None:
    """Random parameters of a `Qwen3_5`, made where they lie. The same for any mesh."""
    found = nnx.state(model, nnx.Param)
    leaves, tree = jax.tree.flatten(found, is_leaf=lambda x: isinstance(x, nnx.Variable))
    kinds = tuple((leaf.get_value().shape, leaf.get_value().dtype, leaf.init) for leaf in leaves)

    def make(key: jax.Array) -> Any:
        return [_initial(jax.random.fold_in(key, i), *kind) for i, kind in enumerate(kinds)]

    shardings = None
    if model.sharding is not None:
        mesh = model.sharding.resolve_mesh()
        is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
        specs = jax.tree.leaves(model.param_specs(model.sharding, mesh), is_leaf=is_spec)
        shardings = [NamedSharding(mesh, spec) for spec in specs]
    values = jax.jit(make, out_shardings=shardings)(key)
    model.set_parameters(nnx.to_pure_dict(jax.tree.unflatten(tree, values)))


def _initial(key: jax.Array, shape: tuple[int, ...], dtype: Any, init: str | HeadRows) -> jax.Array:
    if isinstance(init, HeadRows):
        heads = shape[-1] // init.stride
        used = _initial(key, (*shape[:-1], heads * init.used), dtype, "rows").reshape(*shape[:-1], heads, init.used)
        return pad_to(used, -1, init.stride).reshape(shape)
    if init in ("zeros", "ones"):
        return jnp.full(shape, init == "ones", dtype)
    if init == "decay":  # A in (1, 16)
        return jnp.log(jax.random.uniform(key, shape, jnp.float32, 1.0, 16.0)).astype(dtype)
    if init == "time_step":  # softplus(dt_bias) from 0.001 to 0.1, log-uniform: memories of many lengths
        step = jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(1e-3), math.log(1e-1)))
        return (step + jnp.log(-jnp.expm1(-step))).astype(dtype)
    reduced = {"rows": -2, "pairs": -3, "columns": -1, "vector": -1}[init]
    return (jax.random.normal(key, shape, jnp.float32) * shape[reduced] ** -0.5).astype(dtype)
