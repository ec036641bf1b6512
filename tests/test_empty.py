"""Batches of no rows, no heads, and inputs without a batch axis, as jax.nn.dot_product_attention takes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_jax
from ring_jax.moe import MoEWeights, moe
from tests.support.mesh import make_mesh
from tests.support.strategies import SINGLE_AXIS


def total(function):
    return lambda *arrays: sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(function(*arrays)))


EMPTY = pytest.mark.parametrize("batch, heads", [(0, 4), (2, 0), (0, 0)])


@EMPTY
@pytest.mark.parametrize("strategy", [*SINGLE_AXIS, "auto"])
def test_ring_attention(strategy, batch, heads):
    mesh = make_mesh(data=2, context=4)
    context = ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh, batch_axis="data", strategy=strategy)
    x = jnp.ones((batch, 13, heads, 8))

    def attend(q, k, v):
        laid = [context.to_layout(y) for y in (q, k, v)]
        options = {"is_causal": True, "seq_len": 13, "context": context, "return_residual": True}
        return [context.from_layout(y, 13) for y in ring_jax.ring_attention(*laid, **options)]

    out, lse = jax.jit(attend)(x, x, x)
    assert out.shape == x.shape and lse.shape == x.shape[:3]
    assert [g.shape for g in jax.jit(jax.grad(total(attend), (0, 1, 2)))(x, x, x)] == [x.shape] * 3
    assert jax.nn.dot_product_attention(x, x, x).shape == x.shape if heads else True


@EMPTY
def test_one_device(batch, heads):
    x, rows = jnp.ones((batch, 13, heads, 8)), jnp.zeros((batch, 13), jnp.int32)
    out, lse = ring_jax.flash_attention(x, x, x, rows, rows)
    assert out.shape == x.shape and lse.shape == x.shape[:3]
    out, state = ring_jax.gated_delta_rule(x, x, x, -x[..., 0], x[..., 0])
    assert out.shape == x.shape and state.shape == (batch, heads, 8, 8)


@EMPTY
@pytest.mark.parametrize("way", ["batch", "head", "state"])
def test_gated_delta_rule(way, batch, heads):
    context = ring_jax.ContextParallel("context", layout="zigzag", mesh=make_mesh(context=2))
    x = jnp.ones((batch, 16, heads, 8))
    out, state = ring_jax.gated_delta_rule(x, x, x, -x[..., 0], x[..., 0], context=context, strategy=way)
    assert out.shape == x.shape and state.shape == (batch, heads, 8, 8)


@pytest.mark.parametrize("way", [None, "batch", "head", "state"])
def test_layers(way):
    context = None if way is None else ring_jax.ContextParallel("context", layout="zigzag", mesh=make_mesh(context=2))
    from flax import nnx

    x = jnp.ones((0, 16, 12))
    layer = ring_jax.nn.GatedDeltaNet(12, 2, 2, 8, 8, context=context, strategy=way or "auto", rngs=nnx.Rngs(0))
    y, cache = layer(x)
    assert y.shape == x.shape and cache.state.shape == (0, 2, 8, 8)
    assert ring_jax.nn.Attention(12, 2, context=context, rngs=nnx.Rngs(0))(x).shape == x.shape


def test_no_tokens_for_experts():
    weights = MoEWeights(jnp.ones((6, 4)), jnp.ones((4, 6, 2, 8)), jnp.ones((4, 8, 6)))
    y, stats = moe(jnp.ones((0, 6)), weights, top_k=2)
    assert y.shape == (0, 6) and stats.tokens == 0
    mesh, P = make_mesh(expert=2), jax.P
    specs = P("expert"), MoEWeights(P(), P("expert"), P("expert"))
    run = jax.shard_map(
        lambda x, w: moe(x, w, top_k=2, expert_axis="expert")[0], mesh=mesh, in_specs=specs, out_specs=specs[0]
    )
    assert jax.jit(run)(jnp.ones((0, 6)), weights).shape == (0, 6)


def test_layouts():
    for layout in ("zigzag", "striped", ring_jax.Zigzag(2)):
        context = ring_jax.ContextParallel("context", layout=layout, mesh=make_mesh(context=4))
        x = jnp.ones((0, 13, 3))
        laid = context.to_layout(x)
        assert laid.shape == (0, 16, 3) and context.from_layout(laid, 13).shape == x.shape
        assert context.layout.restore(laid, 1, 4).shape == laid.shape


def test_without_a_batch_axis():
    """[T, N, H] gives what a batch of one gives, without that axis; out, LSE, gradients and a carry."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(3, 16, 4, 8)))
    context = ring_jax.ContextParallel("context", layout="zigzag", mesh=make_mesh(context=2))

    def attend(q, k, v):
        laid = [context.to_layout(x, seq_axis=x.ndim - 3) for x in (q, k, v)]
        out, lse = ring_jax.ring_attention(*laid, is_causal=True, return_residual=True, context=context)
        return context.from_layout(out, seq_axis=q.ndim - 3), context.from_layout(lse, seq_axis=q.ndim - 3)

    out, lse = jax.jit(attend)(q, k, v)
    assert out.shape == q.shape and lse.shape == q.shape[:2]
    np.testing.assert_allclose(out, jax.nn.dot_product_attention(q, k, v, is_causal=True), atol=1e-5)
    batched = [x[None] for x in (q, k, v)]
    for one, many in zip((out, lse), jax.jit(attend)(*batched), strict=True):
        np.testing.assert_array_equal(one, many[0])
    rows = jnp.zeros(16, jnp.int32), jnp.arange(1, 17, dtype=jnp.int32)
    first = ring_jax.flash_attention(q, k, v, *rows)
    np.testing.assert_allclose(first[0], out, atol=1e-5)
    again, total = ring_jax.flash_attention(q, k, v, *rows, carry=first)  # the same keys twice
    np.testing.assert_allclose(again, out, atol=1e-5)
    np.testing.assert_allclose(total, lse + np.log(2.0), atol=1e-5)
    with pytest.raises((ValueError, TypeError)):
        ring_jax.flash_attention(q[None], k, v, *rows)
