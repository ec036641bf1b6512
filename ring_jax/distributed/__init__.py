"""Several processes, on one host or many: start-up, meshes that follow the links, recommended flags.

`initialize` first, before jax touches a device; then `mesh` and everything else as in one process. `ring-jax launch` starts
the processes of one host, a scheduler those of many (docs/multi_host.md).
"""

from ring_jax.distributed.flags import Flag as Flag
from ring_jax.distributed.flags import recommended_flags as recommended_flags
from ring_jax.distributed.flags import use_flags as use_flags
from ring_jax.distributed.placement import links as links
from ring_jax.distributed.placement import mesh as mesh
from ring_jax.distributed.start import initialize as initialize
