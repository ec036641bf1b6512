"""Sampling against the distributions that its formulas name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.inference import Sampling, sample

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))


def drawn(sampling, n=4000):
    """Relative frequency of each token in n draws."""
    tokens = sample(jnp.tile(LOGITS, (n, 1)), jax.random.key(0), sampling)
    assert tokens.dtype == jnp.int32
    return np.bincount(np.asarray(tokens), minlength=4) / n


def test_greedy_takes_the_largest_logit():
    logits = jax.random.normal(jax.random.key(1), (5, 100))
    assert (sample(logits, jax.random.key(2)) == logits.argmax(-1)).all()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(1.0, top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(1.0, top_k=10), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(1.0, top_p=0.7), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(1.0, top_p=0.01), [1, 0, 0, 0]),
        (Sampling(1.0, top_k=3, top_p=0.6), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(0.5), np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345),
    ],
)
def test_draws_from_the_distribution(sampling, expected):
    np.testing.assert_allclose(drawn(sampling), expected, atol=0.03)  # four standard deviations of 4000 draws


def test_seed_decides():
    once = [sample(jnp.zeros((20, 50)), jax.random.key(seed), Sampling(1.0)).tolist() for seed in (0, 0, 1)]
    assert once[0] == once[1] != once[2]


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_values_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)
