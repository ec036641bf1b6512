"""Eager calls compile once, and a layer's second jitted call not again."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import ring_jax
from ring_jax import gdn
from tests.support.mesh import make_mesh

_COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, duration, **_: _COMPILED.append(name) if name.endswith("backend_compile_duration") else None
)


def compilations(call) -> int:
    before = len(_COMPILED)
    jax.block_until_ready(call())
    return len(_COMPILED) - before


@pytest.fixture(scope="module")
def context():
    return ring_jax.ContextParallel("context", layout="zigzag", mesh=make_mesh(context=2))


def test_gated_delta_rule(context):
    x = jnp.ones((2, 16, 2, 8)) / 3
    decay = -x[..., 0]
    for options in ({"implementation": "chunked"}, {"context": context, "strategy": "state"}):
        call = lambda: ring_jax.gated_delta_rule(x, x, x, decay, -decay, **options)  # noqa: B023, E731
        assert compilations(call) > 0
        assert compilations(call) == 0


def _twice(params, x, caches, partition):
    return params * x, ()


def test_run(context):
    x = jnp.ones((2, 16, 4))
    call = lambda: gdn.run(_twice, jnp.full((1, 1, 1), 2.0), x, context=context, strategy="state", seq_len=13)[0]  # noqa: E731
    assert compilations(call) > 0
    assert compilations(call) == 0


@pytest.mark.parametrize("kind", ["gdn", "attention"])
def test_layers(context, kind):
    if kind == "gdn":
        layer = ring_jax.nn.GatedDeltaNet(12, 2, 2, 8, 8, context=context, strategy="state", rngs=nnx.Rngs(0))
        apply = lambda layer, x: layer(x, seq_len=16)[0]  # noqa: E731
    else:
        layer = ring_jax.nn.Attention(12, 2, context=context, rngs=nnx.Rngs(0))
        apply = lambda layer, x: layer(x, seq_len=16)  # noqa: E731
    x = context.to_layout(jnp.ones((2, 16, 12)))
    jitted = nnx.jit(apply)
    assert compilations(lambda: jitted(layer, x)) > 0
    assert compilations(lambda: jitted(layer, x)) == 0
    if kind == "gdn":
        assert compilations(lambda: apply(layer, x)) > 0
        assert compilations(lambda: apply(layer, x)) == 0
    layer.context = None  # on one device, as before
    assert apply(layer, jnp.ones((2, 16, 12))).shape == x.shape
