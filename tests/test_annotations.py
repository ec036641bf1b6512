"""The annotations of the whole package are checked in every test; how, and what for, says `tests.support.shapes`."""

import importlib
import pkgutil

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

import ring_jax
from ring_jax.nn.gdn import gated_rms_norm


def test_every_module_is_checked():
    for found in pkgutil.iter_modules(ring_jax.__path__, "ring_jax."):
        if not found.name.endswith("__main__"):
            loader = importlib.import_module(found.name).__spec__.loader
            assert type(loader).__name__ == "_JaxtypingLoader", found.name


def test_a_wrong_shape_is_caught():
    """Where nothing else would notice: one weight is as good as four."""
    x = jnp.ones((1, 2, 3, 4))
    gated_rms_norm(x, x, jnp.ones(4), 1e-6)
    with pytest.raises(TypeCheckError, match="weight"):
        gated_rms_norm(x, x, jnp.ones(1), 1e-6)


def test_errors_of_the_package_come_first():
    out, lse = jnp.ones((2, 3, 4, 5)), jnp.ones((2, 3, 4))
    with pytest.raises(ValueError, match="of equal shapes"):
        ring_jax.merge_partials(out, lse[:1], out, lse)
