"""`apply_rope` against the complex form, and its defining property."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.nn.rope import apply_rope


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("fraction", [1.0, 0.25])
@pytest.mark.parametrize("per_row", [False, True])
def test_equals_complex_rotation(fraction, per_row):
    x, theta = random(2, 7, 3, 32), 1e7
    positions = np.asarray([3, 0, 9, 2, 100, 5, 41])
    if per_row:
        positions = np.stack([positions, positions[::-1] + 1])
    rotary = int(32 * fraction)
    pairs = x[..., : rotary // 2] + 1j * x[..., rotary // 2 : rotary].astype(np.float64)
    angle = np.atleast_2d(positions)[..., None, None] * theta ** (-np.arange(0, rotary, 2) / rotary)
    turned = pairs * np.exp(1j * angle)
    want = np.concatenate([turned.real, turned.imag, x[..., rotary:]], axis=-1)
    got = apply_rope(jnp.asarray(x), jnp.asarray(positions, jnp.int32), theta=theta, rotary_fraction=fraction)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_products_depend_on_distance_only():
    q, k = jnp.asarray(random(1, 1, 1, 16)), jnp.asarray(random(1, 1, 1, 16, seed=1))

    def product(at_q, at_k):
        return float(jnp.sum(apply_rope(q, jnp.asarray([at_q])) * apply_rope(k, jnp.asarray([at_k]))))

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert product(7, 3) != pytest.approx(product(7, 4), abs=1e-2)


def test_keeps_dtype_and_works_under_jit():
    x = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    out = jax.jit(apply_rope)(x, jnp.arange(4))
    assert out.dtype == jnp.bfloat16 and out.shape == x.shape


@pytest.mark.parametrize(
    ("options", "positions", "message"),
    [
        ({"rotary_fraction": 0.1}, (4,), "must be even"),
        ({"rotary_fraction": 1.5}, (4,), "rotary_fraction must be finite and > 0 and <= 1, got 1.5"),
        ({}, (5,), r"positions must be \[4\] or \[1, 4\] as x, got \[5\]"),
    ],
)
def test_errors(options, positions, message):
    with pytest.raises(ValueError, match=message):
        apply_rope(jnp.ones((1, 4, 2, 12)), jnp.zeros(positions, jnp.int32), **options)
