"""Parameters on the mesh that a layer will run on."""

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ring_jax.context import ContextParallel


def place_parameters(module: nnx.Module, context: ContextParallel | None) -> None:
    """Puts a new layer's parameters on every device of the mesh that `context` holds.

    Left on one device they would come out of the first jitted call on all of them, and the second call would compile again.
    Nothing happens without a mesh in the context, while tracing (the caller's own shardings decide there), and on meshes over
    several processes, which have to agree on what they hold.
    """
    mesh = None if context is None else context.mesh
    if not isinstance(mesh, Mesh) or mesh.is_multi_process:
        return
    whole = NamedSharding(mesh, P())
    for _, variable in nnx.iter_graph(module):
        value = variable.get_value() if isinstance(variable, nnx.Param) else None
        if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer):
            variable.set_value(jax.device_put(value, whole))
