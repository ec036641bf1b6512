"""Meshes of emulated devices."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh


def make_mesh(**sizes: int) -> Mesh:
    """A mesh of Auto axes over the first devices: make_mesh(data=2, context=4)."""
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)
