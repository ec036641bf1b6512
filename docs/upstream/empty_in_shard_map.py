"""An empty array that a shard_map is given and returns ends the process while the program is compiled (jax 0.11.2, any platform).

Shardy's canonicalisation replaces the empty argument by a constant and then drops the unused operand of the manual computation.
"""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
both = jax.shard_map(lambda x, y: (x, 2 * y), mesh=mesh, in_specs=(P(), P("x")), out_specs=(P(), P("x")))
jax.block_until_ready(jax.jit(both)(jnp.zeros((0, 4)), jnp.ones((4, 4))))
"""

flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
status = subprocess.run([sys.executable, "-c", PROGRAM], env=os.environ | flags, check=False).returncode
print("ended by signal", -status) if status < 0 else print("exit status", status)
sys.exit(status != 0)
