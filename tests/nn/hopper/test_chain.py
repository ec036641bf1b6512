"""What lies between two mixers, in one launch: lowered for CUDA and interpreted on the CPU, compared with float64; on a GPU too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.mosaic import compat
from ring_jax.nn.hopper import chain
from tests.support.hopper import lower
from tests.support.marks import interpreted, needs_in_place
from tests.support.numbers import relative

BOUND = {jnp.bfloat16: 4e-3, jnp.float16: 5e-4}
# Of the mixer's result, the model, the activation and the next projection: 0.8B before GDN and attention, 4B, 9B.
SIZES = [(2048, 1024, 3584, 8320), (2048, 1024, 3584, 5120), (4096, 2560, 9216, 12416), (4096, 4096, 12288, 12416)]


def types(sizes, dtype=jnp.bfloat16):
    """Of y, h, out, norm, up, down, next_norm, into."""
    k, d, m, f = sizes
    shapes = (k,), (d,), (k, d), (d,), (d, 2 * m), (m, d), (d,), (d, f)
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def operands(sizes, dtype=jnp.bfloat16, seed=0):
    k, d, m, _ = sizes
    rng = np.random.default_rng(seed)
    scales = 1.0, 1.0, k**-0.5, 0.1, d**-0.5, m**-0.5, 0.1, d**-0.5
    return [jnp.asarray(s * rng.standard_normal(x.shape), dtype) for x, s in zip(types(sizes), scales, strict=True)]


def plan(sizes, **options):
    return chain.plan(*(x for x in types(sizes) if len(x.shape) == 2), epsilon=1e-6, **options)


def exact(y, h, out, norm, up, down, next_norm, into):
    """(h2, p) in float64, rounded where the kernel rounds."""
    dtype = y.dtype
    y, h, out, norm, up, down, next_norm, into = (
        np.asarray(x, np.float64) for x in (y, h, out, norm, up, down, next_norm, into)
    )

    def rounded(x):
        return np.asarray(jnp.asarray(x, dtype), np.float64)

    def normed(x, weight):
        return x / np.sqrt((x * x).mean() + 1e-6) * (1 + weight)

    h = rounded(h + y @ out)
    gate, linear = np.split(normed(h, norm) @ up, 2)
    h = rounded(h + rounded(gate / (1 + np.exp(-gate)) * linear) @ down)
    return h, normed(h, next_norm) @ into


def run(*arrays, place=None, problem=None):
    return chain.between_mixers(*arrays, chain.start() if place is None else place, epsilon=1e-6, problem=problem)


def check(found, arrays):
    for ours, wanted in zip(found, exact(*arrays), strict=True):
        assert relative(ours, wanted) < BOUND[arrays[0].dtype.type], relative(ours, wanted)


@needs_in_place
@pytest.mark.parametrize("sizes", [SIZES[0], *(pytest.param(x, marks=pytest.mark.slow) for x in SIZES[1:])])
def test_lowers(sizes):
    text = lower(run, *types(sizes)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("sizes", SIZES)
def test_programs_are_busy(sizes):
    problem = plan(sizes)
    assert problem.one_part and problem.stages >= 8
    busy = [x.busy(problem.programs) for x in problem.products[:3]]
    assert min(busy) > 0.7, busy


@pytest.mark.parametrize("sizes", [(2000, 1024, 3584, 8320), (2048, 1000, 3584, 8320), (2048, 1024, 3584, 8300)])
def test_sizes_that_no_plan_cuts(sizes):
    assert plan(sizes) is None
    with pytest.raises(NotImplementedError, match="no plan for weights"):
        jax.eval_shape(run, *types(sizes))


@interpreted
@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_interpreted(parts):
    """By one program: the interpreter's cannot meet."""
    sizes = 256, 256, 256, 64
    whole, arrays = plan(sizes, programs=1), operands(sizes)
    cut = {name: dataclasses.replace(getattr(whole, name), splits=parts) for name in ("out", "down")}
    with compat.interpret_mode():
        *found, place = run(*arrays, problem=dataclasses.replace(whole, **cut, stages=3))
    check(found, arrays)
    np.testing.assert_array_equal(place, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("sizes", SIZES)
def test_gpu(sizes, dtype):
    arrays = operands(sizes, dtype)
    *first, place = jax.jit(run)(*arrays)
    check(first, arrays)
    np.testing.assert_array_equal(place, [0, 3])

    @jax.jit
    def again(*arrays):
        place = chain.start()
        for _ in range(20):  # one after the other, with one meeting place
            *found, place = run(*arrays, place=place)
        return *found, place

    *last, place = again(*arrays)
    jax.tree.map(np.testing.assert_array_equal, first, last)
    np.testing.assert_array_equal(place, [0, 60])
