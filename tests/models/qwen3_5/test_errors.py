"""What the model refuses, before anything is compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType

import ring_jax
from ring_jax.models.qwen3_5 import Qwen3_5, Sharding
from tests.inference.checkpoint import CONFIG, tiny_model

TOKENS = jnp.zeros((3, 8), jnp.int32)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lengths": jnp.array([8, 0, 1])}, r"lengths must be from 1 to 8.*\[8, 0, 1\]"),
        ({"lengths": jnp.array([9, 1, 1])}, "lengths must be from 1 to 8"),
        ({"lengths": jnp.array([1, 1])}, r"lengths must have shape \[B=3\], got \(2,\)"),
        ({"segment_ids": TOKENS[:, :7]}, r"segment_ids must have shape \[B=3, S=8\], got \(3, 7\)"),
        ({"segment_ids": TOKENS, "lengths": jnp.array([1, 1, 1])}, "not both"),
        ({"segment_ids": TOKENS, "logits": "last"}, "no one last token"),
        ({"logits": "first"}, "unknown logits 'first'"),
        ({"cache_room": 0}, "cache_room must be >= 1"),
        ({"cache_room": 505}, "8 tokens and room for 505 more exceed the model's 512 positions"),
        ({"return_stats": True}, "this model has no experts"),
    ],
)
def test_arguments(model, options, match):
    with pytest.raises(ValueError, match=match):
        model(TOKENS, **options)


def test_tokens(model):
    for bad, message in (
        (TOKENS[0], r"tokens must have 2 axes \[B, S\]"),
        (TOKENS.astype(jnp.float32), "tokens must be integers"),
        (TOKENS[:, :0], "tokens must hold at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            model(bad)


def test_loss(model):
    with pytest.raises(ValueError, match=r"weights must have shape \[B=3, S=8\]"):
        model.loss(TOKENS, weights=jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="chunk must be >= 1"):
        model.loss(TOKENS, chunk=0)


def test_parameters():
    with pytest.raises(ValueError, match="no parameters yet"):
        Qwen3_5(CONFIG, rngs=None)(TOKENS)
    model = tiny_model()
    values = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    values["final_norm"], values["more"] = values["final_norm"][1:], jnp.zeros(1)
    with pytest.raises(ValueError, match=r"another shape: \[\"\['final_norm'\]\"\]; unexpected: \[\"\['more'\]\"\]"):
        model.set_parameters(values)
    with pytest.raises(ValueError, match="unknown remat"):
        Qwen3_5(CONFIG, rngs=None, remat="some")


def test_batches_over_a_data_axis():
    mesh = jax.make_mesh((2, 2), ("data", "context"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    cp = ring_jax.ContextParallel("context", batch_axis="data", mesh=mesh)
    model = Qwen3_5(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32, sharding=Sharding(cp))
    with pytest.raises(ValueError, match="a batch of 3 does not divide over batch_axis='data' of size 2"):
        model(TOKENS)


def test_no_room_left(model):
    cache = jax.eval_shape(lambda: model(TOKENS, cache_room=4).cache)
    cache = dataclasses.replace(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache), count=jnp.array(4))
    with pytest.raises(ValueError, match="room for 4 new tokens and holds 4"):
        model.decode(jnp.zeros(3, jnp.int32), cache)
    with pytest.raises(ValueError, match=r"tokens must have 1 axes \[B\]"):
        model.decode(jnp.zeros((3, 1), jnp.int32), dataclasses.replace(cache, count=jnp.array(0)))
