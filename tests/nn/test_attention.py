"""`ring_jax.nn.Attention` against a plain form built from its parameters, alone and over a context axis."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ring_jax
from ring_jax.nn import Attention

D, N, K, H = 24, 4, 2, 8
VARIANTS = {
    "plain": {},
    "bidirectional": {"is_causal": False},
    "no_rope": {"rope_theta": None},
    "window": {"local_window_size": (5, 0)},
    "qwen3_5": {"qk_norm": True, "output_gate": True, "rotary_fraction": 0.25, "rope_theta": 1e7},
    "bias": {"use_bias": True},
}


def inputs(batch=2, length=32, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal((batch, length, D)), dtype)


def build(**options):
    """A layer with random parameters, norms and biases too, filled in without compiling its initialisers."""
    layer = nnx.eval_shape(lambda: Attention(D, N, K, H, rngs=nnx.Rngs(0), **options))
    random = np.random.default_rng(3)

    def fill(p):
        scale, offset = (0.2, 1.0) if p.ndim == 1 else (0.3, 0.0)
        return jnp.asarray(offset + scale * random.standard_normal(p.shape), p.dtype)

    nnx.update(layer, jax.tree.map(fill, nnx.state(layer, nnx.Param)))
    return layer


def plain(layer, x, positions):
    """The layer's formula in float64 NumPy, materialised."""

    def linear(module, x):
        kernel = np.asarray(module.kernel[...], np.float64)
        out = np.tensordot(x, kernel, axes=2 if module is layer.out else 1)
        return out if module.bias is None else out + np.asarray(module.bias[...], np.float64)

    def norm(module, x):
        if module is None:
            return x
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * np.asarray(module.scale[...], np.float64)

    def rope(x):
        if layer.rope_theta is None:
            return x
        rotary = int(H * layer.rotary_fraction)
        angle = positions[:, None, None] * layer.rope_theta ** (-np.arange(0, rotary, 2) / rotary)
        a, b = x[..., : rotary // 2], x[..., rotary // 2 : rotary]
        turned = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle), x[..., rotary:]]
        return np.concatenate(turned, -1)

    x = np.asarray(x, np.float64)
    q, k, v = linear(layer.query, x), linear(layer.key, x), linear(layer.value, x)
    gate = 1.0
    if layer.output_gate:
        q, gate = q[..., :H], 1 / (1 + np.exp(-q[..., H:]))
    q, k = rope(norm(layer.query_norm, q)), rope(norm(layer.key_norm, k))
    k, v = np.repeat(k, N // K, axis=2), np.repeat(v, N // K, axis=2)
    logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H)
    i, j = positions[:, None], positions[None]
    visible = (j <= i) | (not layer.is_causal)
    if layer.local_window_size is not None:
        visible &= j >= i - layer.local_window_size[0]
    logits = np.where(visible, logits, -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    out = np.einsum("bnts,bsnh->btnh", p / p.sum(-1, keepdims=True), v) * gate
    return linear(layer.out, out)


@functools.cache
def context(layout="zigzag", **options):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("context",))
    return ring_jax.ContextParallel("context", layout=layout, mesh=mesh, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_plain_form(variant):
    implementation = None if variant == "plain" else "reference"  # quicker to compile
    layer, x = build(implementation=implementation, **VARIANTS[variant]), inputs()
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(layer, x), plain(layer, x, np.arange(32)), atol=2e-5)


@pytest.mark.parametrize(("variant", "layout"), [("plain", "contiguous"), ("qwen3_5", "zigzag"), ("window", "zigzag")])
def test_context_changes_nothing(variant, layout):
    cp, layer, x = context(layout), build(**VARIANTS[variant]), inputs(length=30)

    def loss(layer, x, seq_len):
        y = layer(x, seq_len=seq_len)
        if layer.context is not None:
            y = cp.from_layout(y, seq_len)
        return jnp.sum(jnp.sin(y)), y

    grad = nnx.jit(nnx.value_and_grad(loss, has_aux=True), static_argnums=2)
    layer.implementation = "reference"
    (_, want), want_grads = grad(layer, x, 30)
    layer.context, layer.implementation = cp, None
    (_, got), got_grads = grad(layer, cp.to_layout(x), 30)
    np.testing.assert_allclose(got, want, atol=2e-5)
    for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_packed_documents_with_their_own_positions():
    ids = jnp.asarray([0] * 11 + [1] * 21)
    positions = jnp.asarray([*range(11), *range(21)])
    cp, layer, x = context(), build(implementation="reference"), inputs(batch=1)
    mask = ring_jax.documents(segment_ids=ids)

    @nnx.jit
    def over_context(layer, x):
        out = layer(cp.to_layout(x), mask=mask, positions=cp.to_layout(positions, seq_axis=0))
        return cp.from_layout(out, 32)

    here = nnx.jit(lambda layer, x: layer(x, mask=mask, positions=positions))(layer, x)
    np.testing.assert_allclose(here[:, 11:], nnx.jit(lambda layer, x: layer(x))(layer, x[:, 11:]), atol=2e-5)
    layer.context = cp
    np.testing.assert_allclose(over_context(layer, x), here, atol=2e-5)


def test_padding_is_not_seen():
    layer, x = build(is_causal=False, implementation="reference"), inputs()
    got = nnx.jit(lambda layer, x: layer(x, seq_len=20))(layer, x.at[:, 20:].set(7.0))
    np.testing.assert_allclose(got[:, :20], nnx.jit(lambda layer, x: layer(x))(layer, x[:, :20]), atol=2e-5)
    assert bool(jnp.isfinite(got).all())


def test_bfloat16_computes_and_returns_bfloat16():
    layer = Attention(D, N, K, H, dtype=jnp.bfloat16, qk_norm=True, output_gate=True, rngs=nnx.Rngs(0))
    with jax.numpy_dtype_promotion("standard"):  # nnx.RMSNorm multiplies mixed dtypes itself
        assert nnx.eval_shape(layer, inputs()).dtype == jnp.bfloat16
    assert layer.query.kernel[...].dtype == jnp.float32


def test_errors():
    with pytest.raises(ValueError, match="num_kv_heads must divide num_heads, got 3 and 4"):
        Attention(D, 4, 3, H, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="24 / 5"):
        Attention(D, 5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="needs a context"):
        build(strategy="ring")(inputs())
    with pytest.raises(ValueError, match="unknown implementation"):
        build(implementation="abacus")(inputs())
