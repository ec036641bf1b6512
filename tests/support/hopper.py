"""Compiling for a Hopper GPU wherever this runs, as far as its lowered text."""

from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType


def on_hopper(ranks: int = 1, axis: str | None = "gpu") -> Any:
    """Within it, programs are traced for such a GPU. `axis` None: Mosaic knows it only, for programs with a mesh of their own."""
    device = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    sizes, names, types = ((ranks,), (axis,), (AxisType.Auto,)) if axis is not None else ((), (), None)
    return jax.sharding.use_abstract_mesh(AbstractMesh(sizes, names, types, abstract_device=device))


def lower(function: Any, *arguments: Any, donate: Any = (), **named: Any) -> Any:
    """The function, lowered for CUDA."""
    with on_hopper():
        return jax.jit(function, donate_argnums=donate).trace(*arguments, **named).lower(lowering_platforms=("cuda",))
