"""Compiling for a Hopper GPU wherever this runs, as far as its lowered text."""

from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType


def on_hopper(ranks: int = 1, axis: str | None = "gpu") -> Any:
    """Within it, programs are traced for such a GPU. `axis` None: Mosaic knows it only, for programs with a mesh of their own."""
    return on_hoppers(**({} if axis is None else {axis: ranks}))


def on_hoppers(**sizes: int) -> Any:
    """The same with a mesh of such GPUs, on_hoppers(context=2, tensor=2), which programs without one of their own find."""
    device = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    types = (AxisType.Auto,) * len(sizes) or None
    return jax.sharding.use_abstract_mesh(
        AbstractMesh(tuple(sizes.values()), tuple(sizes), types, abstract_device=device)
    )


def lower(function: Any, *arguments: Any, donate: Any = (), **named: Any) -> Any:
    """The function, lowered for CUDA."""
    with on_hopper():
        return jax.jit(function, donate_argnums=donate).trace(*arguments, **named).lower(lowering_platforms=("cuda",))
