"""What Mosaic GPU kernels need and jax spells differently from version to version.

Nothing here knows about attention. The kernels use *lane* semantics (register layouts are written out by hand) in every
jax version; the default changed to warpgroup semantics in jax 0.11.
"""

import contextlib
import contextvars
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

_interpret = contextvars.ContextVar("ring_jax_mosaic_interpret", default=None)

# Interpret mode came with jax 0.11.
INTERPRET_AVAILABLE = hasattr(plgpu, "InterpretGPUParams")


@contextlib.contextmanager
def interpret_mode(*, detect_races: bool = False) -> Iterator[None]:
    """Runs the kernels traced inside on the CPU, simulating threads, TMA and barriers (jax 0.11 and later)."""
    if not INTERPRET_AVAILABLE:
        raise NotImplementedError(f"Mosaic GPU interpret mode needs jax 0.11 or later, this is {jax.__version__}")
    token = _interpret.set(plgpu.InterpretGPUParams(detect_races=detect_races))
    try:
        yield
    finally:
        _interpret.reset(token)


def interpreting() -> bool:
    return _interpret.get() is not None


def output_like(shape: tuple[int, ...], dtype: Any, *operands: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of a kernel output that varies over every manual mesh axis that one of the operands varies over."""
    kinds = [jax.typeof(x).manual_axis_type for x in operands]
    varying = frozenset().union(*(kind.varying for kind in kinds))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=type(kinds[0])(varying=varying))


def kernel(
    body: Callable[..., None],
    *,
    name: str,
    out_type: Any,
    scratch: Mapping[str, Any],
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    num_threads: int,
    thread_name: str,
) -> Callable[..., Any]:
    """`plgpu.kernel` with fast exp2 and without automatic warpgroup barriers: the body must order its own SMEM accesses."""
    params = plgpu.CompilerParams(
        approx_math=True,
        unsafe_no_auto_barriers=True,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
    )
    accepted = inspect.signature(plgpu.kernel).parameters
    out_key = "out_type" if "out_type" in accepted else "out_shape"
    scratch_key = "scratch_types" if "scratch_types" in accepted else "scratch_shapes"
    body.__name__ = name
    call = plgpu.kernel(
        body,
        **{out_key: out_type, scratch_key: dict(scratch)},
        grid=grid,
        grid_names=grid_names,
        num_threads=num_threads,
        thread_name=thread_name,
        compiler_params=params,
        interpret=_interpret.get(),
    )
    return call


def tiled_smem(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the layout that TMA writes and wgmma reads: 8-row tiles, 128-byte swizzle."""
    columns = 128 // jnp.dtype(dtype).itemsize
    if shape[-1] % columns or shape[-2] % 8:
        raise ValueError(f"the last two sizes must be multiples of (8, {columns}), got {shape}")
    return plgpu.SMEM(
        shape,
        dtype,
        transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)),
    )


def tiled_layout(tiling: Any, warp_dims: tuple[Any, ...], lane_dims: tuple[Any, ...]) -> Any:
    """A layout written out: tiles within tiles, and which of their dimensions are warps and lanes; the last is a thread's vector."""
    layout = mgpu.TiledLayout(fragmented_array.Tiling(tiling), warp_dims, lane_dims, -1, _check_canonical=False)
    layout = layout.canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def load(ref: Any, layout: Any) -> jax.Array:
    """Registers in `layout` from any memory, also where the access is not made of whole sectors."""
    index = inspect.signature(plgpu.load).parameters.get("idx")
    if index is not None and index.default is inspect.Parameter.empty:
        return plgpu.load(ref, (), layout=layout, optimized=False)
    return plgpu.load(ref, layout=layout, optimized=False)


def store(ref: Any, value: jax.Array) -> None:
    """Registers to any memory, also where the access is not made of whole sectors."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value
