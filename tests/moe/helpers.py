"""Inputs and oracle that the tests of the mixture of experts share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ring_jax.moe import MoEWeights, moe
from ring_jax.moe.reference import reference
from tests.support.numbers import jit, relative

BOUND = 5e-6  # relative L2 against float64

WIDTH, FEATURES = 24, 12


def operands(tokens, experts, *, favoured=(), shunned=(), seed=0, width=WIDTH, features=FEATURES):
    """x, weights and a cotangent in float32. `favoured` experts win every token's top-k, `shunned` ones lose it."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, width))
    router = rng.normal(size=(width, experts)) / np.sqrt(width / 4)
    x[:, 0] = 1.0
    # Enough to decide, little enough that softmax has a gradient left.
    router *= 0.5 if favoured or shunned else 1.0
    router[0, list(favoured)] += 6.0
    router[0, list(shunned)] -= 6.0
    gate_up = rng.normal(size=(experts, width, 2, features)) / np.sqrt(width)
    down = rng.normal(size=(experts, features, width)) / np.sqrt(features)
    arrays = x, MoEWeights(router, gate_up, down), rng.normal(size=x.shape)
    return jax.tree.map(lambda a: a.astype(np.float32), arrays)


def margin(x, weights, top_k) -> float:
    """The least distance between the last chosen and the first left out logit: reordered sums must not flip it."""
    logits = np.sort(np.asarray(x, np.float64) @ np.asarray(weights.router, np.float64), axis=1)[:, ::-1]
    return np.inf if top_k == logits.shape[1] else float((logits[:, top_k - 1] - logits[:, top_k]).min())


def pulled(function):
    """(y, gradients of x and weights) of `function(x, weights, *rest)`, given a cotangent before the rest."""

    def run(x, weights, cotangent, *rest):
        y, pull = jax.vjp(lambda x, weights: function(x, weights, *rest), x, weights)
        return y, pull(cotangent.astype(y.dtype))

    return jit(run)


@functools.cache
def _reference(**options):
    return pulled(lambda x, weights, valid: reference(x, weights, valid=valid, **options))


def expected(x, weights, cotangent, *, valid=None, **options):
    """The same in float64, token by token."""
    valid = np.ones(len(x), bool) if valid is None else valid
    assert margin(x[valid], weights, options["top_k"]) > 1e-4, "choose another seed"
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (x, weights, cotangent))
        return jax.tree.map(np.asarray, _reference(**options)(*wide, valid))


def check(found, wanted, bound=BOUND):
    """Compares (y, (dx, dweights)) leaf by leaf."""
    names = "y", "dx", "drouter", "dgate_up", "ddown"
    for name, a, b in zip(names, jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert relative(a, b) <= bound, f"{name}: {relative(a, b)}"


def dense(**options):
    """`moe` on one device, y only."""
    return lambda x, weights: moe(x, weights, **options)[0]
