"""The k largest of each row: lowered for CUDA and interpreted on the CPU, compared with lax.top_k on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ring_jax.moe.hopper.top_k import top_k, unsupported_reason, worthwhile
from ring_jax.mosaic import compat
from tests.support.hopper import lower
from tests.support.marks import interpreted


def rows(count, columns, seed=0):
    """Non-negative, with many equal entries and some rows of zeros."""
    rng = np.random.default_rng(seed)
    x = np.where(
        rng.uniform(size=(count, columns)) < 0.5,
        rng.integers(0, 4, (count, columns)) / 4,
        rng.uniform(size=(count, columns)),
    )
    x[::5] = 0
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("shape, k", [((1, 256), 8), ((300, 256), 8), ((64, 24), 2)])
def test_lowers(shape, k):
    assert lower(lambda x: top_k(x, k), jax.ShapeDtypeStruct(shape, jnp.float32)).as_text().count("@mosaic_gpu") >= 1


def test_unsupported_reasons():
    S = jax.ShapeDtypeStruct
    assert unsupported_reason(S((4, 256), jnp.float32), 8) is None
    assert "float32" in unsupported_reason(S((4, 256), jnp.bfloat16), 8)
    assert "columns" in unsupported_reason(S((4, 512), jnp.float32), 8)
    assert "k must" in unsupported_reason(S((4, 8), jnp.float32), 9)
    assert worthwhile(S((8192, 256), jnp.float32), 8) and not worthwhile(S((16, 256), jnp.float32), 8)


@interpreted
@pytest.mark.parametrize("count", [3, 130])
def test_interpreted(count):
    x = rows(count, 16)
    with compat.interpret_mode():
        found = top_k(x, 5)
    jax.tree.map(np.testing.assert_array_equal, found, tuple(lax.top_k(x, 5)))


@interpreted
def test_gradient_goes_to_what_was_taken():
    x = rows(3, 16, seed=1)
    cotangent = jnp.arange(12.0).reshape(3, 4)
    with compat.interpret_mode():
        (found,) = jax.vjp(lambda x: top_k(x, 4)[0], x)[1](cotangent)
    (wanted,) = jax.vjp(lambda x: lax.top_k(x, 4)[0], x)[1](cotangent)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("count, columns, k", [(1, 256, 8), (1000, 256, 8), (77, 64, 6), (4096, 8, 2)])
def test_gpu(count, columns, k):
    x = rows(count, columns)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda x: top_k(x, k))(x), tuple(lax.top_k(x, k)))
