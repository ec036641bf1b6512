"""Token ids that the vocabulary does not have: errors where they are known, NaN under jit, anything goes in padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ring_jax
from ring_jax.models.qwen3_5 import Config, Qwen3_5, Sharding
from ring_jax.models.qwen3_5.checks import check_inputs
from tests.arguments.calls import context
from tests.arguments.models import SIZES, V
from tests.support.mesh import make_mesh

S = 6
OUTSIDE = [V, -1, 10**6, -100, -(2**31), 2**31 - 1]
GOOD = np.array([[1, 2, 3, 4, 5, 6], [3, 1, 4, 1, 5, 9]], np.int32)


@pytest.fixture(scope="module")
def model() -> Qwen3_5:
    made, random = Qwen3_5(Config(**SIZES), rngs=None, dtype=jnp.float32), np.random.default_rng(0)
    state = nnx.to_pure_dict(nnx.state(made, nnx.Param))
    made.set_parameters(jax.tree.map(lambda x: jnp.asarray(0.3 * random.normal(size=x.shape), x.dtype), state))
    return made


@pytest.fixture(scope="module")
def spread(model) -> Qwen3_5:
    """The same over two context ranks."""
    made = Qwen3_5(model.config, rngs=None, dtype=jnp.float32, sharding=Sharding(context()))
    made.set_parameters(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return made


def with_id(token: int, row: int = 1, place: int = 3) -> np.ndarray:
    tokens = GOOD.copy()
    tokens[row, place] = token
    return tokens


@pytest.mark.parametrize("token", OUTSIDE)
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_known_ids_raise(model, token, array):
    message = rf"tokens must be in \[0, {V - 1}\], the model's vocabulary, got {token}"
    for call in (model, model.loss):
        with pytest.raises(ValueError, match=message):
            call(array(with_id(token)))
    with pytest.raises(ValueError, match=message):
        call(array(with_id(token)), weights=np.zeros(GOOD.shape, np.float32))  # it would be read all the same
    cache = jax.eval_shape(lambda: model(GOOD, cache_room=1).cache)
    cache = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), cache)
    with pytest.raises(ValueError, match=message):
        model.decode(array(with_id(token)[1, 2:4]), cache)


def test_traced_ids_give_nan_in_decode(model):
    cache = model(GOOD, cache_room=2).cache
    step = jax.jit(lambda tokens: model.decode(tokens, cache)[0])
    right = step(np.array([1, 2], np.int32))
    assert np.isfinite(right).all()
    for token in OUTSIDE:
        found = step(np.array([1, token], np.int32))
        assert np.isnan(found[1]).all(), token
        np.testing.assert_array_equal(found[0], right[0])


@pytest.mark.parametrize(("which", "padding"), [("model", "segment_ids"), ("spread", "lengths")])
def test_traced_ids_give_nan_in_their_row_and_nothing_in_padding(which, padding, request):
    model = request.getfixturevalue(which)
    lengths = np.array([S, 4], np.int32)
    ids = np.where(np.arange(S) < lengths[:, None], 0, -1).astype(np.int32)
    known = {padding: {"lengths": lengths, "segment_ids": ids}[padding]}
    run = jax.jit(lambda tokens: (model(tokens, **known).logits, model.loss(tokens, **known)))
    right, loss = run(with_id(0))
    assert np.isfinite(right[ids >= 0]).all() and np.isfinite(loss)
    for token in OUTSIDE:
        found, other = run(with_id(token, place=2))
        assert np.isnan(found[1, 2:4]).all() and np.isnan(other), token
        np.testing.assert_array_equal(found[0], right[0])
        tokens = with_id(token, place=4)
        check_inputs(*model.split(), tokens, **{"lengths": None, "segment_ids": None} | known)
        found, other = run(np.where(ids < 0, tokens, with_id(0)))
        np.testing.assert_array_equal(found[ids >= 0], right[ids >= 0])
        assert other == loss


@pytest.mark.parametrize("size", [32, 33])
def test_one_set_of_logits_whatever_the_tensor_axis(size):
    """An odd vocabulary is whole on each tensor rank: its logits are no parts to put side by side."""
    context = ring_jax.ContextParallel("context", head_axis="tensor", mesh=make_mesh(context=2, tensor=2))
    config = Config(**SIZES | {"vocab_size": size})
    program, params = Qwen3_5(config, rngs=None, dtype=jnp.float32, sharding=Sharding(context)).split()
    out = jax.eval_shape(lambda params: program(params, GOOD), params)
    assert out.logits.shape == (2, S, size)
    cache = jax.eval_shape(lambda params: program(params, GOOD, cache_room=2).cache, params)
    token = jnp.zeros(2, jnp.int32)
    assert jax.eval_shape(program.decode, params, token, cache)[0].shape == (2, size)
    past = jax.eval_shape(lambda params: program(params, GOOD, return_new=True).new, params)
    after = jax.eval_shape(lambda params, past: program(params, token[:, None], past=past, logits="last"), params, past)
    assert after.logits.shape == (2, size)
