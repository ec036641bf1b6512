"""The `attention_fn` adapters in Flax's own layers: the same numbers as Flax alone, and no argument ignored."""

import functools
import inspect

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ring_jax
import ring_jax.nn

FEATURES, HEADS, LENGTH = 16, 4, 32


@functools.cache
def context(layout="zigzag"):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("context",))
    return ring_jax.ContextParallel("context", layout=layout, mesh=mesh)


def inputs(*batch, length=LENGTH, features=FEATURES, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((*batch, length, features)), jnp.float32)


def qkv(*batch, dtype=jnp.float32):
    return [jnp.asarray(np.random.default_rng(i).standard_normal((*batch, LENGTH, HEADS, 8)), dtype) for i in range(3)]


def nnx_layer(**options):
    return nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=nnx.Rngs(0), **options)


def causal_mask(length=LENGTH):
    return jnp.tril(jnp.ones((length, length), bool))


def check_nnx_layer(call_options, defaults, **layer_options):
    """Runs nnx's layer with ring attention on a zigzag layout, and nnx's own with a mask array."""
    cp, x = context(), inputs(2)
    want = nnx_layer(**layer_options)(x, mask=causal_mask())
    layer = nnx_layer(attention_fn=cp.attention_fn(**defaults), **layer_options)
    got = nnx.jit(lambda layer, x: layer(x, **call_options))(layer, cp.to_layout(x))
    np.testing.assert_allclose(cp.from_layout(got, LENGTH), want, atol=2e-5)


def test_nnx_layer_with_default():
    check_nnx_layer({}, {"is_causal": True})


def test_nnx_layer_with_call_argument():
    check_nnx_layer({"is_causal": True}, {})


def test_nnx_grouped_heads_and_norm():
    check_nnx_layer({}, {"is_causal": True}, num_kv_heads=2, normalize_qk=True)


def test_nnx_gradients():
    cp, x = context(), inputs(2)

    def loss(layer, x, mask=None):
        return jnp.sum(jnp.sin(layer(x, mask=mask)))

    want = nnx.grad(loss)(nnx_layer(), x, causal_mask())
    layer = nnx_layer(attention_fn=cp.attention_fn(is_causal=True))
    got = nnx.jit(nnx.grad(loss))(layer, cp.to_layout(x))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_linen_layer():
    cp, x = context(), inputs(2)
    options = {"num_heads": HEADS, "qkv_features": FEATURES}
    plain = flax.linen.MultiHeadDotProductAttention(**options)
    params = plain.init(jax.random.key(0), x)
    want = plain.apply(params, x, mask=causal_mask())
    ring = flax.linen.MultiHeadDotProductAttention(attention_fn=cp.attention_fn(is_causal=True), **options)
    got = jax.jit(ring.apply)(params, cp.to_layout(x))
    np.testing.assert_allclose(cp.from_layout(got, LENGTH), want, atol=2e-5)


def test_cross_attention():
    cp, q, kv = context("contiguous"), inputs(2), inputs(2, length=48, seed=1)
    want = nnx_layer()(q, kv)
    got = nnx_layer(attention_fn=cp.attention_fn())(cp.to_layout(q), cp.to_layout(kv))
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_any_number_of_batch_axes(batch):
    cp, arrays = context("contiguous"), qkv(*batch)
    got = cp.attention_fn()(*arrays)
    want = nnx.dot_product_attention(*(x.reshape(-1, *x.shape[-3:]) for x in arrays))
    np.testing.assert_allclose(got, want.reshape(got.shape), atol=2e-5)
    assert got.shape == (*batch, LENGTH, HEADS, 8)


def test_mask_value_in_the_call_joins_the_default():
    cp, x = context(), inputs(1)
    ids = jnp.asarray([0] * 13 + [1] * 19)
    want = nnx_layer()(x, mask=causal_mask() & (ids[:, None] == ids[None]))
    layer = nnx_layer(attention_fn=cp.attention_fn(mask=ring_jax.causal()))
    got = nnx.jit(lambda layer, x, mask: layer(x, mask=mask))(
        layer, cp.to_layout(x), ring_jax.documents(segment_ids=ids)
    )
    np.testing.assert_allclose(cp.from_layout(got, LENGTH), want, atol=2e-5)


def test_rope_by_input_positions():
    cp, (q, k, v) = context(), qkv(2)
    rope = functools.partial(ring_jax.nn.apply_rope, theta=100.0)
    positions = jnp.arange(LENGTH)
    want = nnx.dot_product_attention(rope(q, positions), rope(k, positions), v, mask=causal_mask())
    attend = cp.attention_fn(is_causal=True, rope=rope)
    got = attend(*(cp.to_layout(x) for x in (q, k, v)), input_positions=cp.positions(LENGTH))
    np.testing.assert_allclose(cp.from_layout(got, LENGTH), want, atol=2e-5)


@pytest.mark.skipif(
    "input_positions" not in inspect.signature(nnx.MultiHeadAttention.__call__).parameters,
    reason="this Flax has no input_positions in nnx.MultiHeadAttention",
)
def test_nnx_layer_passes_input_positions():
    cp, x = context(), inputs(2)
    attend = cp.attention_fn(is_causal=True, rope=ring_jax.nn.apply_rope)
    positions = cp.positions(LENGTH)
    got = nnx.jit(lambda layer, x: layer(x, input_positions=positions))(nnx_layer(attention_fn=attend), cp.to_layout(x))

    def plain(query, key, value, **_):
        query, key = (ring_jax.nn.apply_rope(x, jnp.arange(LENGTH)) for x in (query, key))
        return nnx.dot_product_attention(query, key, value, mask=causal_mask())

    np.testing.assert_allclose(cp.from_layout(got, LENGTH), nnx_layer(attention_fn=plain)(x), atol=2e-5)


def test_rope_without_input_positions_takes_those_of_the_layout():
    """On every Flax: its layers need not know of positions."""
    cp, x = context(), inputs(2)
    attend = cp.attention_fn(is_causal=True, rope=ring_jax.nn.apply_rope)

    def plain(query, key, value, **_):
        query, key = (ring_jax.nn.apply_rope(x, jnp.arange(LENGTH)) for x in (query, key))
        return nnx.dot_product_attention(query, key, value, mask=causal_mask())

    want = nnx_layer(attention_fn=plain)(x)
    got = nnx.jit(lambda layer, x: layer(x))(nnx_layer(attention_fn=attend), cp.to_layout(x))
    np.testing.assert_allclose(cp.from_layout(got, LENGTH), want, atol=2e-5)


def test_dtype_is_honoured():
    arrays = qkv(1)
    attend = context("contiguous").attention_fn()
    assert jax.eval_shape(functools.partial(attend, dtype=jnp.bfloat16), *arrays).dtype == jnp.bfloat16
    assert jax.eval_shape(attend, arrays[0].astype(jnp.bfloat16), *arrays[1:]).dtype == jnp.float32


@pytest.mark.parametrize(
    "options",
    [
        {"dropout_rate": 0.5, "deterministic": True, "dropout_rng": jax.random.key(0), "broadcast_dropout": False},
        {"precision": jax.lax.Precision.HIGHEST},
        {"precision": ("highest", None)},
        {"force_fp32_for_softmax": True},
        {"promote_dtype": nnx.nn.dtypes.promote_dtype},
    ],
    ids=["deterministic", "precision", "precision pair", "float32 softmax", "promote_dtype"],
)
def test_harmless_arguments_are_accepted(options):
    arrays, attend = qkv(1), context("contiguous").attention_fn()

    def traced(*arrays):
        return attend(*arrays, **options)

    # Traced alike is computed alike, and tracing is quicker.
    assert str(jax.make_jaxpr(traced)(*arrays)) == str(jax.make_jaxpr(attend)(*arrays))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bias": jnp.zeros((1, 1, LENGTH, LENGTH))}, NotImplementedError, "bias"),
        ({"mask": causal_mask()}, NotImplementedError, r"takes a ring_jax.Mask, got mask=.* with shape \(32, 32\)"),
        ({"dropout_rate": 0.1}, NotImplementedError, "dropout_rate=0.1 with deterministic=False"),
        ({"module": object()}, NotImplementedError, "sow_weights=True"),
        ({"precision": jax.lax.DotAlgorithmPreset.F16_F16_F32}, NotImplementedError, "precision="),
        ({"input_positions": jnp.arange(LENGTH)}, ValueError, "rope="),
        ({"qk_attn_weights_einsum": jnp.einsum}, NotImplementedError, "qk_attn_weights_einsum"),
        ({"attn_weights_value_einsum": jnp.einsum}, NotImplementedError, "attn_weights_value_einsum"),
        ({"einsum_dot_general": jax.lax.dot_general}, NotImplementedError, "einsum_dot_general"),
    ],
)
def test_what_cannot_be_honoured_raises(options, error, message):
    with pytest.raises(error, match=message):
        context().attention_fn()(*qkv(1), **options)


def test_errors_of_shapes_and_positions():
    q, k, v = qkv(2)
    with pytest.raises(ValueError, match="same batch axes"):
        context().attention_fn()(q, k[:1], v)
    attend = context().attention_fn(rope=ring_jax.nn.apply_rope)
    with pytest.raises(ValueError, match="length 32 and keys of length 16"):
        attend(q, k[:, :16], v[:, :16], input_positions=jnp.arange(LENGTH))


def test_errors_of_flax_layers():
    cp, x = context(), inputs(1)
    fn = cp.attention_fn()
    with pytest.raises(NotImplementedError, match="dropout_rate=0.5"):
        nnx_layer(attention_fn=fn, dropout_rate=0.5, deterministic=False)(x)
    with pytest.raises(NotImplementedError, match="sow_weights"):
        nnx_layer(attention_fn=fn)(x, sow_weights=True)
    decoder = nnx_layer(attention_fn=fn)
    decoder.init_cache((1, LENGTH, FEATURES))
    with pytest.raises(NotImplementedError, match="decode=True"):
        decoder(x[:, :1], decode=True)
    linen = functools.partial(flax.linen.MultiHeadDotProductAttention, HEADS, attention_fn=fn)
    with pytest.raises(NotImplementedError, match="dropout_rate=0.5"):
        linen(dropout_rate=0.5, deterministic=False).init(
            {"params": jax.random.key(0), "dropout": jax.random.key(1)}, x
        )
    with pytest.raises(NotImplementedError, match="ring_jax.Mask"):
        linen().init(jax.random.key(0), x, mask=causal_mask())
    with pytest.raises(NotImplementedError, match="sow_weights"):
        linen().init(jax.random.key(0), x, sow_weights=True)


def test_errors_of_defaults():
    with pytest.raises(TypeError, match="unknown default 'causal'"):
        context().attention_fn(causal=True)
    with pytest.raises(ValueError, match="'mask' holds an array"):
        context().attention_fn(mask=ring_jax.lengths(kv=jnp.asarray([3])))


def test_equal_and_hashable_by_value():
    a, b = (context().attention_fn(is_causal=True, local_window_size=4) for _ in range(2))
    assert a == b and hash(a) == hash(b) and a != context().attention_fn()


@pytest.mark.parametrize("flax_function", [nnx.dot_product_attention, flax.linen.dot_product_attention])
def test_signature_names_every_flax_argument(flax_function):
    """Linen drops what the signature does not name, so a new Flax argument must show here first."""
    ours = inspect.signature(context().attention_fn()).parameters
    assert set(inspect.signature(flax_function).parameters) <= set(ours)
    assert not any(p.kind is p.VAR_KEYWORD for p in ours.values())
