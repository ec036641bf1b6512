"""Kernels that update operands in place are functions of arrays to everything around them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ring_jax.mosaic import compat, in_place
from tests.support.marks import needs_in_place


def add_and_copy(x, total):
    """(x, total + x), the sum in the buffer of `total`."""

    def body(x_ref, total_ref, copy_ref):
        total_ref[...] = total_ref[...] + x_ref[...]
        copy_ref[...] = x_ref[...]

    outputs = (jax.ShapeDtypeStruct(x.shape, x.dtype),)
    call = compat.kernel(
        body,
        name="add_and_copy",
        out_type=outputs,
        scratch={},
        grid=(1,),
        grid_names=("program",),
        num_threads=1,
        thread_name="wg",
    )
    return in_place.update(call, outputs, (x,), (total,))


def lowered(f, *shapes) -> str:
    arrays = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return jax.jit(f).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@needs_in_place
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    mesh = jax.make_mesh((2,), ("c",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))

    def hops(x, total):
        def hop(total, _):
            copy, total = add_and_copy(x, total)
            return jax.lax.ppermute(total, "c", [(0, 1), (1, 0)]) + copy, None

        return jax.lax.scan(hop, total, None, length=3)[0]

    mapped = jax.shard_map(hops, mesh=mesh, in_specs=(P("c"), P("c")), out_specs=P("c"), check_vma=check_vma)
    text = lowered(mapped, (256, 128), (256, 128))
    assert text.count("@mosaic_gpu") == 1 and "output_operand_alias<" in text
    # Or XLA would take what is sliced from a stack into one fusion with the kernel, which knows no aliases.
    assert text.count("stablehlo.optimization_barrier") == 2


@needs_in_place
def test_under_transformations():
    """`call` may be any function of arrays and Refs, so values can be had without a GPU."""

    def call(x, total):
        total[...] = total[...] + x
        return (2 * x,)

    def f(x, total):
        return in_place.update(call, (jax.ShapeDtypeStruct(x.shape, x.dtype),), (x,), (total,))

    x, total = jnp.arange(24.0).reshape(2, 3, 4), jnp.ones((2, 3))
    for g in (f, jax.jit(f), jax.jit(f, donate_argnums=1)):
        doubled, summed = g(x[..., 0], total + 0)
        np.testing.assert_array_equal(doubled, 2 * x[..., 0])
        np.testing.assert_array_equal(summed, x[..., 0] + 1)
    doubled, summed = jax.vmap(f, in_axes=(2, None))(x, total)
    np.testing.assert_array_equal(doubled, 2 * jnp.moveaxis(x, 2, 0))
    np.testing.assert_array_equal(summed, jnp.moveaxis(x, 2, 0) + 1)
    np.testing.assert_array_equal(total, jnp.ones((2, 3)))


@needs_in_place
def test_interpreted_leaves_the_callers_array():
    x, total = jnp.full((128, 128), 2.0), jnp.ones((128, 128))
    with compat.interpret_mode():
        copy, result = add_and_copy(x, total)
    np.testing.assert_array_equal(copy, x)
    np.testing.assert_array_equal(result, jnp.full((128, 128), 3.0))
    np.testing.assert_array_equal(total, jnp.ones((128, 128)))


@pytest.mark.skipif(in_place.AVAILABLE, reason="this jax has Refs for kernels")
def test_old_versions_say_what_they_lack():
    with pytest.raises(NotImplementedError, match="need jax 0.11 or later, this is"):
        in_place.update(None, (), (), ())


@needs_in_place
def test_opaque_where_a_loop_begins_at_a_number_that_is_read():
    """Traced as it is, a shard_map's check refuses it."""
    mesh = jax.make_mesh((2,), ("c",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))

    def body(start_ref, x_ref, out_ref):
        def step(_, total):
            return total + 1

        out_ref[0] = x_ref[0] + jax.lax.fori_loop(start_ref[0], 8, step, jnp.int32(0))

    def run(start, x, way):
        outputs = (compat.output_like(x.shape, x.dtype, start, x),)
        options = {"scratch": {}, "grid": (1,), "grid_names": ("program",), "num_threads": 1, "thread_name": "wg"}
        call = compat.kernel(body, name="counts", out_type=outputs, **options)
        return way(call, outputs, (start, x))[0]

    def mapped(way):
        given = functools.partial(run, way=way)
        return jax.shard_map(given, mesh=mesh, in_specs=(P("c"), P("c")), out_specs=P("c"))

    arrays = [jax.ShapeDtypeStruct((2,), jnp.int32)] * 2
    text = jax.jit(mapped(in_place.opaque)).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1 and "optimization_barrier" not in text
    with pytest.raises(TypeError, match="carry"):
        jax.jit(mapped(lambda call, _, operands: call(*operands))).trace(*arrays)
