"""SwiGLU of rows that share their weights: lowered for CUDA and interpreted on the CPU, compared with float64; on a GPU too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.moe.hopper import dense
from ring_jax.moe.hopper.config import SHARED_MEMORY_BYTES, GroupedConfig, dense_config
from ring_jax.moe.hopper.plan import Plan
from ring_jax.mosaic import compat
from tests.support.hopper import lower
from tests.support.marks import interpreted
from tests.support.numbers import relative

BOUND = {jnp.bfloat16: 3e-3, jnp.float16: 4e-4}  # one rounding, 2^-9 (2^-12) at most
SIZES = [(1024, 3584), (2560, 9216), (4096, 12288), (2048, 512), (128, 192)]  # width, features


def operands(rows, width, features, dtype, seed=0):
    """x, weights and a cotangent."""
    rng = np.random.default_rng(seed)
    shapes = (rows, width), (width, 2 * features), (rows, features)
    scales = 1.0, width**-0.5, 1.0
    return [jnp.asarray(s * rng.standard_normal(n), dtype) for n, s in zip(shapes, scales, strict=True)]


def exact(x, weights, dout):
    """Result, argument and gradients in float64."""
    x, weights, dout = (np.asarray(a, np.float64) for a in (x, weights, dout))
    both = x @ weights
    gate, up = np.split(both, 2, axis=1)
    sigmoid = 1 / (1 + np.exp(-gate))
    silu = gate * sigmoid
    dboth = np.concatenate([dout * up * (sigmoid + silu * (1 - sigmoid)), dout * silu], axis=1)
    return silu * up, both, dboth @ weights.T, x.T @ dboth


@pytest.mark.parametrize(("width", "features"), SIZES)
def test_lowers(width, features):
    assert dense_config(features).shared_memory_bytes <= SHARED_MEMORY_BYTES
    S = jax.ShapeDtypeStruct
    x, weights = S((3, 1000, width), jnp.bfloat16), S((width, 2 * features), jnp.bfloat16)
    assert lower(dense.swiglu, x, weights).as_text().count("custom_call @mosaic_gpu") == 1
    gradient = jax.grad(lambda x, w: dense.swiglu(x, w).astype(jnp.float32).sum(), argnums=(0, 1))
    assert lower(gradient, x, weights).as_text().count("custom_call @mosaic_gpu") == 1


def test_when_it_is_worthwhile():
    def found(*shape, columns=256, dtype=jnp.bfloat16):
        seen = []
        lower(lambda x: seen.append(dense.worthwhile(x, columns)) or x, jax.ShapeDtypeStruct(shape, dtype))
        return seen == [True]

    assert [found(1, 1024, 128), found(16, 64, 128)] == [compat.INTERPRET_AVAILABLE] * 2
    assert not found(1, 1023, 128), "too few rows"
    assert not found(1, 2048, 96) and not found(1, 2048, 128, columns=192), "sizes"
    assert not found(1, 2048, 128, dtype=jnp.float32)
    assert not dense.worthwhile(jax.ShapeDtypeStruct((4096, 128), jnp.bfloat16), 256), "this is no GPU"


@pytest.mark.parametrize("rows", [1, 128, 300])
def test_plan_of_rows(rows):
    plan = Plan.of_rows(rows, 128)
    found = [
        n for _, first, size, _ in np.asarray(plan.tiles)[: int(plan.count[0])] for n in range(first, first + size)
    ]
    assert found == np.asarray(plan.order).tolist() == list(range(rows))


@interpreted
@pytest.mark.parametrize("band", [1, 2, pytest.param(16, marks=pytest.mark.slow)])
def test_interpreted(band):
    """Three tiles of rows, the last one short, in bands that divide them and that do not."""
    x, weights, dout = operands(300, 128, 128, jnp.bfloat16)
    config = GroupedConfig(columns=128, stages=4, swiglu=True, multiprocessors=3, band=band)
    with compat.interpret_mode():
        out, both = jax.jit(functools.partial(dense.run, keep=True, config=config))(x, weights)
    expected, argument, *_ = exact(x, weights, dout)
    assert relative(out, expected) < BOUND[jnp.bfloat16] and relative(both, argument) < BOUND[jnp.bfloat16]


@interpreted
def test_interpreted_gradients():
    x, weights, dout = operands(130, 64, 64, jnp.bfloat16, seed=1)
    with compat.interpret_mode():
        out, back = jax.vjp(dense.swiglu, x[None], weights)
        dx, dweights = back(dout[None])
    expected = exact(x, weights, dout)
    for got, want in ((out[0], expected[0]), (dx[0], expected[2]), (dweights, expected[3])):
        assert got.dtype == jnp.bfloat16
        assert relative(got, want) < 8e-3  # gate, up and their gradients are rounded before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1024, 1500, 8191])
@pytest.mark.parametrize(("width", "features"), SIZES[:1] + SIZES[3:])
def test_gpu(width, features, rows, dtype):
    """Result and gradients, and the bits again."""
    x, weights, dout = operands(rows, width, features, dtype, seed=rows)
    assert dense.worthwhile(x, weights.shape[1])
    run = jax.jit(lambda x, w, d: (dense.swiglu(x, w), *jax.vjp(dense.swiglu, x, w)[1](d)))
    found = run(x, weights, dout)
    out, _, dx, dweights = exact(x, weights, dout)
    assert relative(found[0], out) < BOUND[dtype]
    assert max(relative(a, b) for a, b in zip(found[1:], (dx, dweights), strict=True)) < 3 * BOUND[dtype]
    assert all(np.array_equal(a, b) for a, b in zip(found, run(x, weights, dout), strict=True))
