"""Examples in docstrings run, and annotations hold."""

import doctest
import functools

import jax
import jax.numpy as jnp
import pytest
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from ring_jax.moe import MoEWeights, layer, load_balance_loss, moe, route, router

checked = functools.partial(jaxtyped, typechecker=beartype)


@pytest.mark.parametrize("module", [layer, router])
def test_examples(module):
    found = doctest.testmod(module)
    assert found.failed == 0 and found.attempted > 0


def test_annotations_hold():
    weights = MoEWeights(jnp.ones((4, 8)), jnp.ones((8, 4, 2, 6)), jnp.ones((8, 6, 4)))

    def call(x, valid):
        checked(route)(x, weights.router, top_k=2, valid=valid)
        y, stats = checked(moe)(x, weights, top_k=2, valid=valid)
        return y, checked(load_balance_loss)(stats)

    jax.eval_shape(call, jnp.ones((3, 4)), jnp.ones(3, bool))
    with pytest.raises(TypeCheckError):
        checked(route)(jnp.ones((3, 4)), jnp.ones((5, 8)), top_k=2)
