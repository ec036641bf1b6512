"""RMS norms of many rows: lowered for CUDA and interpreted on the CPU, compared with float64; on a GPU too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.mosaic import compat
from ring_jax.nn.hopper import rows
from ring_jax.nn.norm import Normed, _formula
from tests.support.hopper import lower
from tests.support.marks import interpreted
from tests.support.numbers import relative

# Of a norm's error: one rounding of each number, by 2^-8 (2^-11) at most.
BOUND = {jnp.bfloat16: 2.5e-3, jnp.float16: 3.5e-4}
SHAPES = [(1, 8, 256), (2, 6, 1024), (20, 512), (1, 4, 5120)]


def operands(*shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * rng.uniform(0.01, 30.0, (*shape[:-1], 1))  # rows of many sizes
    return jnp.asarray(x, dtype), jnp.asarray(0.3 * rng.standard_normal(shape[-1]), dtype)


def exact(x, weight, epsilon):
    x, weight = (np.asarray(a, np.float64) for a in (x, weight))
    return (
        x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * (1 + weight).reshape((1,) * (x.ndim - 1) + (-1,))
    )


@interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lowers_and_interpreted(shape):
    arrays = operands(*shape, dtype=jnp.bfloat16)
    run = functools.partial(rows.norm, epsilon=1e-6, formula=_formula)
    assert lower(run, *arrays).as_text().count("custom_call @mosaic_gpu") == 1
    with compat.interpret_mode():
        found = run(*arrays)
    assert found.dtype == jnp.bfloat16 and found.shape == shape
    assert relative(found, exact(*arrays, 1e-6)) < BOUND[jnp.bfloat16]


@interpreted
def test_epsilon_and_rows_of_zeros():
    x, weight = operands(4, 256, dtype=jnp.float16)
    x = x.at[2].set(0)
    with compat.interpret_mode():
        found = rows.norm(x, weight, 0.25, _formula)
    assert not np.asarray(found[2]).any() and relative(found, exact(x, weight, 0.25)) < BOUND[jnp.float16]


@interpreted
def test_gradient():
    """XLA's, of the same function."""
    arrays = operands(2, 4, 256, dtype=jnp.bfloat16, seed=1)

    def loss(function):
        return lambda *a: (function(*a).astype(jnp.float32) ** 3).sum()

    with compat.interpret_mode():
        found = jax.grad(loss(lambda *a: rows.norm(*a, 1e-6, _formula)), argnums=(0, 1))(*arrays)
    wide = [a.astype(jnp.float32) for a in arrays]
    wanted = jax.grad(loss(lambda *a: _formula(*a, 1e-6)), argnums=(0, 1))(*wide)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == jnp.bfloat16 and relative(got, want) < 0.02


def test_when_it_is_worthwhile():
    def found(*shape, dtype=jnp.bfloat16):
        seen = []
        lower(lambda x: seen.append(rows.worthwhile(x)) or x, x := jax.ShapeDtypeStruct(shape, dtype))
        assert not rows.worthwhile(x), "this is no GPU"
        return seen == [True]

    assert found(1, 1024, 4096) == found(8, 128, 1024) == compat.INTERPRET_AVAILABLE
    assert not found(1, 1023, 4096) and not found(1, 1025, 4096) and not found(1, 1024, 4096, dtype=jnp.float32)
    assert not found(1, 1024, 4000) and not found(1, 1024, 8192)


@interpreted
def test_a_norm_of_many_rows_takes_it():
    x, weight = operands(1, 1024, 256, dtype=jnp.bfloat16)
    text = lower(lambda *a: Normed(*a, 1e-6).array(), x, weight).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert "custom_call @mosaic_gpu" not in lower(lambda *a: Normed(*a, 1e-6).array(), x[:, :8], weight).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "shape", [*SHAPES, (1, 8192, 4096), (3, 1004, 2048), (2, 4096, 5120), (1, 32768, 1024)], ids=str
)
def test_gpu(shape, dtype):
    arrays = operands(*shape, dtype=dtype, seed=2)
    call = jax.jit(functools.partial(rows.norm, epsilon=1e-6, formula=_formula))
    found = call(*arrays)
    assert relative(found, exact(*arrays, 1e-6)) < BOUND[dtype]
    np.testing.assert_array_equal(found, call(*arrays))
