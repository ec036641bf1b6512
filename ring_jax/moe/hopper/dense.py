"""SwiGLU of many rows that share their weights on Hopper GPUs: silu(x W_gate) * (x W_up) in one kernel.

The grouped product with a single expert. XLA writes both products and reads them again for a pass of their own, at Qwen3.5-9B's sizes
3% of a prefill.
"""

import math

import jax
import jax.numpy as jnp

from ring_jax._arrays import Shaped
from ring_jax._vma import align
from ring_jax.moe.hopper.config import GroupedConfig, dense_config
from ring_jax.moe.hopper.plan import Plan
from ring_jax.moe.hopper.rows_kernel import rows_product
from ring_jax.mosaic.device import runs_kernels

# With fewer, the tiles do not fill a GPU.
_ROWS = 1024


def worthwhile(x: Shaped, columns: int) -> bool:
    """Whether `swiglu` runs x [..., D] times weights [D, columns] where it is being compiled for, faster than XLA's products."""
    return (
        runs_kernels()
        and x.dtype in (jnp.bfloat16, jnp.float16)
        and x.shape[-1] % 64 == 0
        and columns % 128 == 0
        and math.prod(x.shape[:-1]) >= _ROWS
    )


def swiglu(x: jax.Array, gate_up: jax.Array) -> jax.Array:
    """silu(x W_gate) * (x W_up).

    Args:
        x: [..., D], bfloat16 or float16. gate_up: [D, 2 F], gate first, of the same dtype; D and F multiples of 64.

    Returns:
        [..., F] in x's dtype.
    """
    rows, weights = align(x.reshape(-1, x.shape[-1]), gate_up)
    with jax.enable_x64(False):
        return fused(rows, weights).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def fused(x: jax.Array, gate_up: jax.Array) -> jax.Array:
    return run(x, gate_up)


def run(
    x: jax.Array, gate_up: jax.Array, keep: bool = False, config: GroupedConfig | None = None
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """[T, F], and with `keep` x gate_up [T, 2 F] as well, of x [T, D]."""
    config = dense_config(gate_up.shape[1] // 2) if config is None else config
    return rows_product(x, gate_up[None], Plan.of_rows(x.shape[0], config.rows), config, keep=keep)


def combine(both: jax.Array) -> jax.Array:
    """silu(gate) * up of [..., gate and up]."""
    gate, up = jnp.split(both, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _forward(x: jax.Array, gate_up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out, both = run(x, gate_up, keep=True)
    return out, (x, gate_up, both)


def _backward(residuals: tuple[jax.Array, ...], dout: jax.Array) -> tuple[jax.Array, ...]:
    x, gate_up, both = residuals
    (dboth,) = jax.vjp(combine, both)[1](dout)
    return dboth @ gate_up.T, x.T @ dboth


fused.defvjp(_forward, _backward)
