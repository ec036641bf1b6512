"""Kernels that update operands in place: an attention partial that is resumed, a gradient that is added to. And kernels that are
opaque to a shard_map's bookkeeping.

`plgpu.kernel` aliases nothing but Refs, and Refs do not lower inside a shard_map that checks varying axes. So such a
kernel is one primitive: a function from arrays to arrays for all that surrounds it, which makes Refs of the updated
operands only where it is lowered, when shard_map's bookkeeping is done. XLA then updates the operand's own buffer, or
a copy where somebody else still reads it. Without anything to update it serves a kernel with a loop that begins or ends at
a number that it reads: the loop's carry varies over the mesh on entry and not after a step, which shard_map's check refuses.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from ring_jax.mosaic import compat

# Before jax 0.11 a Mosaic GPU kernel takes no Refs.
AVAILABLE = compat.INTERPRET_AVAILABLE


def update(
    call: Callable[..., Any], outputs: Sequence[Any], operands: Sequence[jax.Array], updated: Sequence[jax.Array]
) -> list[jax.Array]:
    """`call(*operands, *refs)`, with a Ref for each array of `updated`.

    Args:
        call: a `compat.kernel` whose `out_type` are the `outputs`.
        outputs: shapes and dtypes of what the kernel returns.
        operands: what it only reads.
        updated: what it reads and writes.

    Returns:
        The outputs, then the arrays of `updated` as the kernel left them.
    """
    if not AVAILABLE:
        raise NotImplementedError(f"kernels that update in place need jax 0.11 or later, this is {jax.__version__}")
    if compat.interpreting():  # its callbacks have effects, which a primitive would have to name
        return _run(*operands, *updated, call=call, updated=len(updated))
    shapes = tuple((x.shape, jnp.dtype(x.dtype)) for x in (*outputs, *updated))
    return _update_p.bind(*operands, *updated, call=call, updated=len(updated), shapes=shapes)


def opaque(call: Callable[..., Any], outputs: Sequence[Any], operands: Sequence[jax.Array]) -> list[jax.Array]:
    """`call(*operands)`, a `compat.kernel` whose `out_type` are the `outputs`, traced when shard_map's bookkeeping is done."""
    return update(call, outputs, operands, ())


def _run(*arrays: jax.Array, call: Callable[..., Any], updated: int, **_: Any) -> list[jax.Array]:
    operands, written = arrays[: len(arrays) - updated], arrays[len(arrays) - updated :]
    if not updated:
        with jax.enable_x64(False):
            return list(jax.tree.leaves(call(*operands)))
    # In a loop, XLA would take the slices of a stack that go in, and the writes to one that come out, into one fusion
    # with the kernel, and forgets there that a result is an operand's buffer. It does not look through barriers.
    operands, written = lax.optimization_barrier((operands, written))
    with jax.enable_x64(False):  # lowered outside of the caller's own context
        refs = [jax.new_ref(x) for x in written]
        results = [*jax.tree.leaves(call(*operands, *refs)), *(ref[...] for ref in refs)]
    return lax.optimization_barrier(results)


_update_p = Primitive("ring_jax_update_in_place")
_update_p.multiple_results = True
# Eager calls compile like any other function.
_update_p.def_impl(lambda *arrays, **params: jax.jit(lambda *x: _update_p.bind(*x, **params))(*arrays))


@_update_p.def_abstract_eval
def _abstract_eval(
    *arrays: jax.core.ShapedArray, shapes: Sequence[tuple[tuple[int, ...], Any]], **_: Any
) -> list[jax.core.ShapedArray]:
    axes = frozenset().union(*(x.manual_axis_type.varying for x in arrays))
    kind = type(arrays[0].manual_axis_type)(varying=axes)
    mesh = arrays[0].sharding.mesh

    def result(shape: tuple[int, ...], dtype: Any) -> jax.core.ShapedArray:
        sharding = NamedSharding(mesh, PartitionSpec(*[None] * len(shape)))
        return jax.core.ShapedArray(shape, dtype, sharding=sharding, manual_axis_type=kind)

    return [result(shape, dtype) for shape, dtype in shapes]


def _lower(ctx: Any, *arrays: Any, **params: Any) -> Any:
    plain = [[jax.core.ShapedArray(x.shape, x.dtype) for x in avals] for avals in (ctx.avals_in, ctx.avals_out)]
    ctx = ctx.replace(avals_in=plain[0], avals_out=plain[1])
    return mlir.lower_fun(_run, multiple_results=True)(ctx, *arrays, **params)


def _batch(arrays: Sequence[jax.Array], axes: Sequence[int | None], **params: Any) -> tuple[list[jax.Array], list[int]]:
    """One after the other: what a batch of kernels would share lies within each of them."""
    mapped = [jnp.moveaxis(x, axis, 0) for x, axis in zip(arrays, axes, strict=True) if axis is not None]

    def one(mapped: list[jax.Array]) -> list[jax.Array]:
        rest = iter(mapped)
        return _update_p.bind(
            *(x if axis is None else next(rest) for x, axis in zip(arrays, axes, strict=True)), **params
        )

    results = lax.map(one, mapped)
    return results, [0] * len(results)


mlir.register_lowering(_update_p, _lower)
batching.primitive_batchers[_update_p] = _batch
