"""The k largest of each row, for Hopper GPUs, in Pallas Mosaic GPU: XLA sorts the rows, which costs as much as a product.

A warpgroup holds 64 rows in registers; k times, the largest entry of each row is taken out. Of equal ones the first wins, as
in `jax.lax.top_k`.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax._arrays import Shaped
from ring_jax._vma import pcast_to, varying_axes
from ring_jax.mosaic import compat

_ROWS = 64
_MOST = 256  # columns, half as many registers
# Rows from which it pays: 15 us for few rows where XLA's sort takes 4; for 8192 and 32768 rows 17 and 34, and 69 and 259.
_WORTHWHILE = 1024


def unsupported_reason(x: Shaped, k: int) -> str | None:
    """Why `top_k` cannot take x [T, E], or None."""
    if x.dtype != jnp.float32:
        return f"needs float32, got {x.dtype}"
    if x.shape[1] % 8 or not 0 < x.shape[1] <= _MOST:
        return f"columns must be a multiple of 8, at most {_MOST}, got {x.shape[1]}"
    if not 0 < k <= min(x.shape[1], 16):
        return f"k must be 1 ... 16 and at most the number of columns, got {k}"
    return None


def worthwhile(x: Shaped, k: int) -> bool:
    """Whether `top_k` takes x and is faster than `lax.top_k`."""
    return unsupported_reason(x, k) is None and x.shape[0] >= _WORTHWHILE


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k` of non-negative x, float32 [T, E]: values [T, k] and int32 columns [T, k].

    Raises:
        NotImplementedError: if `unsupported_reason` gives one.
    """
    reason = unsupported_reason(x, k)
    if reason is not None:
        raise NotImplementedError(f"the Hopper top-k kernel {reason}")
    rows, columns = x.shape
    padded = max(rows, _ROWS)
    x = jnp.pad(x, ((0, padded - rows), (0, 0)))

    def body(x_ref: Any, values_ref: Any, columns_ref: Any) -> None:
        # The last rows slide back, and are done twice.
        row = jnp.minimum(lax.axis_index("block") * _ROWS, padded - _ROWS)
        rest = compat.load(x_ref.at[pl.ds(row, _ROWS)], plgpu.Layout.WGMMA)
        shape = (_ROWS, columns)
        backwards = columns - plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        for i in range(k):
            largest = rest.max(axis=1)
            smaller = rest < lax.broadcast_in_dim(largest, shape, [0])  # nothing is, where there is a NaN
            place = jnp.where(smaller, 0, backwards).max(axis=1)  # not negative: taken as unsigned
            compat.store(values_ref.at[pl.ds(row, _ROWS), i], largest)
            compat.store(columns_ref.at[pl.ds(row, _ROWS), i], columns - place)
            rest = jnp.where(backwards == lax.broadcast_in_dim(place, shape, [0]), -1.0, rest)

    outputs = tuple(compat.output_like((padded, k), dtype, x) for dtype in (jnp.float32, jnp.int32))
    with jax.enable_x64(False):
        call = compat.kernel(
            body,
            name="top_k",
            out_type=outputs,
            scratch={},
            grid=(pl.cdiv(padded, _ROWS),),
            grid_names=("block",),
            num_threads=1,
            thread_name="warpgroup",
        )
        # `plgpu.kernel` forgets over which manual mesh axes its outputs vary.
        values, places = pcast_to(call(x), varying_axes(x))
    return values[:rows], places[:rows]


@top_k.defjvp
def _derivative(
    k: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, Any]]:
    (x,), (dx,) = primals, tangents
    values, columns = top_k(x, k)
    return (values, columns), (jnp.take_along_axis(dx, columns, axis=1), np.zeros(columns.shape, jax.dtypes.float0))
