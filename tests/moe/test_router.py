"""Router, its statistics and the load-balancing loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.moe import RouterStats, load_balance_loss, route
from tests.support.numbers import relative


def transformers_loss(logits, top_k, mask=None):
    """`load_balancing_loss_func` by its formula, in NumPy float64; logits [layers, T, E]."""
    rows = logits.reshape(-1, logits.shape[-1]).astype(np.float64)
    probs = np.exp(rows - rows.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    chosen = np.argsort(-probs, axis=1)[:, :top_k]
    kept = np.ones(len(rows)) if mask is None else np.tile(mask, len(logits)).astype(np.float64)
    used = np.stack([np.bincount(chosen[:, i], kept, logits.shape[-1]) for i in range(top_k)]) / kept.sum()
    return logits.shape[-1] * (used * (probs * kept[:, None]).sum(axis=0) / kept.sum()).sum()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("experts, top_k", [(8, 2), (16, 4)])
def test_loss_of_all_layers_is_that_of_transformers(experts, top_k, masked):
    rng = np.random.default_rng(0)
    x, routers = rng.normal(size=(3, 30, 12)).astype(np.float32), rng.normal(size=(3, 12, experts)).astype(np.float32)
    valid = rng.uniform(size=30) < 0.6 if masked else None
    layer = jax.jit(lambda x, router: RouterStats.of(route(x, router, top_k=top_k, valid=valid), valid))
    stats = [layer(a, b) for a, b in zip(x, routers, strict=True)]
    loss = load_balance_loss(stats[0] + stats[1] + stats[2])
    wanted = transformers_loss(np.einsum("ltd,lde->lte", x.astype(np.float64), routers), top_k, valid)
    assert relative(loss, wanted) <= 1e-6


def test_gradient_flows_through_probabilities_only():
    rng = np.random.default_rng(1)
    x, router = rng.normal(size=(20, 12)).astype(np.float32), rng.normal(size=(12, 8)).astype(np.float32)

    def loss(router):
        return load_balance_loss(RouterStats.of(route(jnp.asarray(x), router, top_k=2)))

    def by_hand(router, counts):
        return 8 * ((counts / 20) * jax.nn.softmax(x @ router).mean(axis=0)).sum()

    counts = np.bincount(np.argsort(-(x @ router), axis=1)[:, :2].reshape(-1), minlength=8).astype(np.float32)
    assert relative(jax.jit(jax.grad(loss))(router), jax.jit(jax.grad(by_hand))(router, counts)) <= 1e-6


def test_padding_is_not_counted():
    rng = np.random.default_rng(3)
    x, router = rng.normal(size=(20, 12)).astype(np.float32), rng.normal(size=(12, 8)).astype(np.float32)
    valid = np.arange(20) % 3 > 0

    @jax.jit
    def stats(x, valid):
        return RouterStats.of(route(x, router, top_k=2, valid=valid), valid)

    some, all_of_them = stats(x, valid), stats(x[valid], np.ones(valid.sum(), bool))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), some, all_of_them)
    assert float(some.tokens) == valid.sum() and float(some.counts.sum()) == 2 * valid.sum()


def test_even_use_costs_k():
    stats = RouterStats(jnp.full(8, 30.0), jnp.full(8, 10.0), jnp.array(80.0))
    assert load_balance_loss(stats) == pytest.approx(3.0)
    empty = RouterStats(jnp.zeros(8), jnp.zeros(8), jnp.array(0.0))
    assert load_balance_loss(empty) == 0


def test_softmax_is_float32_over_logits_of_the_inputs_dtype():
    rng = np.random.default_rng(2)
    x, router = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((50, 64), (64, 16)))
    routing = jax.jit(functools.partial(route, top_k=4))(x, router)  # compiled: XLA likes to leave roundings out
    logits = np.asarray(x, np.float32) @ np.asarray(router, np.float32)
    probs = jax.nn.softmax(jnp.asarray(logits).astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(routing.probs, probs, rtol=1e-6)
    assert routing.weights.dtype == jnp.float32
    np.testing.assert_allclose(routing.weights.sum(axis=1), 1, rtol=1e-6)
    best = np.sort(probs, axis=1)[:, ::-1][:, :4]
    np.testing.assert_allclose(routing.weights, best / best.sum(axis=1, keepdims=True), rtol=1e-6)
