"""The mixture of experts on one device, against the float64 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.moe import MoEWeights, backends, moe
from tests.moe.helpers import check, dense, expected, operands, pulled
from tests.support.numbers import jit, relative

slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "tokens, experts, top_k", [(40, 8, 2), (40, 16, 4), (1, 16, 4), slow(6, 4, 4), slow(300, 4, 2), slow(129, 16, 3)]
)
def test_agrees_with_float64(tokens, experts, top_k):
    arrays = operands(tokens, experts)
    run = pulled(dense(top_k=top_k))
    found = run(*arrays)
    check(found, expected(*arrays, top_k=top_k))
    jax.tree.map(np.testing.assert_array_equal, found, run(*arrays))  # and repeats bit for bit


@pytest.mark.parametrize("tokens, experts, top_k, step", [(40, 8, 2, 2), (1, 16, 4, 4), slow(40, 8, 2, 16)])
def test_several_blocks_a_step(tokens, experts, top_k, step, monkeypatch):
    """What GPUs run: batched products of several blocks, of which the last may be empty; no loop where one step does."""
    monkeypatch.setattr(backends, "blocks_per_step", lambda *_: step)
    arrays = operands(tokens, experts, seed=2)
    check(pulled(dense(top_k=top_k))(*arrays), expected(*arrays, top_k=top_k))


def test_every_token_to_one_expert():
    # Renormalised, the factor of a single expert is 1 whatever the router says: no gradient to compare.
    arrays, options = operands(40, 8, favoured=(5,)), {"top_k": 1, "renormalize": False}
    _, stats = jit(lambda x, w: moe(x, w, **options))(*arrays[:2])
    assert np.flatnonzero(stats.counts).tolist() == [5] and stats.counts[5] == 40
    check(pulled(dense(**options))(*arrays), expected(*arrays, **options))


def test_padding_changes_nothing():
    """Some tokens, all and none are padding; what x holds there reaches nothing."""
    x, weights, cotangent = operands(40, 8)
    run = pulled(lambda x, weights, valid: moe(x, weights, top_k=2, valid=valid)[0])
    for share in (0.6, 0.0, 1.0):
        valid = np.random.default_rng(3).uniform(size=40) < share
        poisoned = np.where(valid[:, None], x, np.nan).astype(np.float32)
        found = run(poisoned, weights, cotangent, valid)
        if share:
            check(found, expected(x, weights, cotangent, top_k=2, valid=valid))
        else:
            assert all(np.all(np.asarray(a) == 0) for a in jax.tree.leaves(found))
        assert np.all(np.asarray(found[0])[~valid] == 0) and np.all(np.asarray(found[1][0])[~valid] == 0)


def test_bfloat16_sums_in_float32():
    """The sum of twelve experts is as close to float64 as rounding the hidden values and y allows."""
    x, weights, cotangent = jax.tree.map(lambda a: a.astype(jnp.bfloat16), operands(64, 16))
    y, gradients = pulled(dense(top_k=12))(x, weights, cotangent)
    assert all(a.dtype == jnp.bfloat16 for a in jax.tree.leaves((y, gradients)))
    # Logits are rounded to bfloat16 too, so tokens near a tie go elsewhere: route as the function does.
    with jax.enable_x64(True):
        logits = np.asarray(x, np.float32) @ np.asarray(weights.router, np.float32)
        probs = jax.nn.softmax(jnp.asarray(logits).astype(jnp.bfloat16).astype(jnp.float64))
        factors, experts = (np.asarray(a) for a in jax.lax.top_k(probs, 12))
    tokens, kernels, out = (np.asarray(a, np.float64) for a in (x, weights.gate_up, weights.down))
    wanted = np.zeros(tokens.shape)
    for t, i in np.ndindex(*experts.shape):
        gate, up = np.einsum("d,dcf->cf", tokens[t], kernels[experts[t, i]])
        wanted[t] += factors[t, i] / factors[t].sum() * (gate / (1 + np.exp(-gate)) * up) @ out[experts[t, i]]
    assert relative(y, wanted) <= 3e-3  # bfloat16 rounds by up to 2^-9 = 2e-3


def test_float64_stays():
    with jax.enable_x64(True):
        x, weights, _ = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), operands(20, 8))
        y, stats = jax.eval_shape(lambda x, w: moe(x, w, top_k=2), x, weights)
        assert y.dtype == stats.probs.dtype == jnp.float64


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, w: (x[None], w, 2), r"x must have 2 axes \[T, D\], got shape \(1, 9, 24\)"),
        (lambda x, w: (x, w, 5), r"top_k must be in \[1, 4\], got 5"),
        (lambda x, w: (x, w, 0), r"top_k must be in \[1, 4\], got 0"),
        (lambda x, w: (x[:, 1:], w, 2), r"router must have shape \[D=23, E\], got \(24, 4\)"),
        (lambda x, w: (x.astype(jnp.bfloat16), w, 2), "router must have x's dtype bfloat16, got float32"),
        (
            lambda x, w: (x, MoEWeights(w.router, w.gate_up[:2], w.down[:2]), 2),
            "the router knows 4 experts, but 1 ranks",
        ),
        (
            lambda x, w: (x, MoEWeights(w.router, w.gate_up[:, :, 0], w.down), 2),
            r"gate_up must have 4 axes \[e, D, 2, F\]",
        ),
        (
            lambda x, w: (x, MoEWeights(w.router, w.gate_up, w.down[:, 1:]), 2),
            r"down must have shape \[e=4, F=12, D=24\]",
        ),
    ],
)
def test_errors_say_what_came(change, message):
    x, weights, _ = operands(9, 4)
    x, weights, top_k = change(jnp.asarray(x), weights)
    with pytest.raises(ValueError, match=message):
        moe(x, weights, top_k=top_k)


def test_valid_must_be_one_bool_per_token():
    x, weights, _ = operands(9, 4)
    with pytest.raises(ValueError, match="valid must be booleans, got int32"):
        moe(jnp.asarray(x), weights, top_k=2, valid=jnp.ones(9, jnp.int32))


def test_exchange_is_not_ignored():
    x, weights, _ = operands(9, 4)
    with pytest.raises(
        ValueError, match="strategy='gather' moves tokens that differ between ranks: it needs an expert_axis"
    ):
        moe(jnp.asarray(x), weights, top_k=2, strategy="gather")
