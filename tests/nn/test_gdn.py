"""The GDN layer against its formulas in NumPy float64, in both projection layouts, and over context ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ring_jax.context import ContextParallel
from ring_jax.gdn import run
from ring_jax.nn.gdn import GatedDeltaNet, split_fused_projections
from tests.gdn.helpers import BOUND, jit, numpy_rule, relative

SIZES = dict(features=24, num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=6)


def make(projections="separate", seed=0, **options):
    """A layer whose state lives for many tokens: with the default initialisation it would die within one."""
    layer = GatedDeltaNet(**SIZES, projections=projections, precision="highest", rngs=nnx.Rngs(seed), **options)
    rng = np.random.default_rng(seed)
    layer.A_log[...] = jnp.asarray(np.log(4 * rng.uniform(size=4) + 0.01), jnp.float32)
    layer.dt_bias[...] = jnp.asarray(rng.normal(-2, 1, size=4), jnp.float32)
    layer.norm[...] = jnp.asarray(1 + rng.uniform(-0.2, 0.2, size=6), jnp.float32)
    layer.conv[...] = jnp.asarray(rng.normal(0, 0.5, size=layer.conv.shape), layer.conv.dtype)
    return layer


def numpy_layer(layer, x, segments=None):
    """One document at a time, from the formulas of the checkpoint's own layout."""
    f64 = lambda p: np.asarray(p[...], np.float64)  # noqa: E731
    x, (k_heads, n, dk, dv) = np.asarray(x, np.float64), (2, 4, 8, 6)
    silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731
    if layer.projections == "separate":
        mixed, z = x @ f64(layer.in_proj_qkv.kernel), x @ f64(layer.in_proj_z.kernel)
        b, a = x @ f64(layer.in_proj_b.kernel), x @ f64(layer.in_proj_a.kernel)
    else:
        r = n // k_heads
        qkvz = (x @ f64(layer.in_proj_qkvz.kernel)).reshape(*x.shape[:2], k_heads, -1)
        q, k, v, z = np.split(qkvz, [dk, 2 * dk, 2 * dk + r * dv], axis=-1)
        mixed = np.concatenate([part.reshape(*x.shape[:2], -1) for part in (q, k, v)], axis=-1)
        ba = (x @ f64(layer.in_proj_ba.kernel)).reshape(*x.shape[:2], k_heads, 2 * r)
        b, a = (part.reshape(*x.shape[:2], n) for part in np.split(ba, 2, axis=-1))
    padded = np.concatenate([np.zeros((len(x), 3, mixed.shape[2])), mixed], axis=1)
    mixed = silu(sum(f64(layer.conv)[j] * padded[:, j : j + x.shape[1]] for j in range(4)))
    q, k, v = np.split(mixed, [k_heads * dk, 2 * k_heads * dk], axis=-1)
    q, k = (part.reshape(*x.shape[:2], k_heads, dk) for part in (q, k))
    q, k = (part / np.sqrt((part**2).sum(-1, keepdims=True) + 1e-6) for part in (q, k))
    g = -np.exp(f64(layer.A_log)) * np.log1p(np.exp(a + f64(layer.dt_bias)))
    v, zeros = v.reshape(*x.shape[:2], n, dv), np.zeros((len(x), n, dk, dv))
    out, state = numpy_rule(q, k, v, g, 1 / (1 + np.exp(-b)), zeros)
    out = f64(layer.norm) * out / np.sqrt((out**2).mean(-1, keepdims=True) + 1e-6) * silu(z.reshape(out.shape))
    return out.reshape(*x.shape[:2], -1) @ f64(layer.out_proj.kernel), state


def inputs(batch=2, time=50, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, time, SIZES["features"])).astype(np.float32)


def applied(layer, **options):
    graph, state = nnx.split(layer)
    program = jit(lambda state, x, cache, ids: nnx.merge(graph, state)(x, cache, segment_ids=ids, **options))
    return lambda x, cache=None, ids=None: program(state, x, cache, ids)


@pytest.mark.parametrize("projections", ["separate", "fused"])
def test_agrees_with_the_formulas(projections):
    layer, x = make(projections), inputs()
    y, cache = applied(layer)(x)
    expected, state = numpy_layer(layer, x)
    assert relative(y, expected) <= BOUND
    assert relative(cache.state, state) <= BOUND


def test_fused_projections_convert_to_separate_ones():
    fused, separate = make("fused"), make("separate")
    parts = split_fused_projections(fused.in_proj_qkvz.kernel[...], fused.in_proj_ba.kernel[...], fused.heads)
    for name, kernel in zip(("qkv", "z", "b", "a"), parts, strict=True):
        linear = getattr(separate, f"in_proj_{name}")
        assert linear.kernel.shape == kernel.shape
        linear.kernel[...] = kernel
    separate.out_proj.kernel[...] = fused.out_proj.kernel[...]
    x = inputs()
    np.testing.assert_array_equal(applied(separate)(x)[0], applied(fused)(x)[0])


def test_chunked_prefill_and_decode():
    layer, x = make(), inputs(time=20)
    expected, state = numpy_layer(layer, x)
    step, cache, outs = applied(layer), layer.empty_cache(2), []
    for piece in np.split(x, [11, 18, 19], axis=1):
        y, cache = step(piece, cache)
        outs.append(y)
    assert relative(np.concatenate(outs, axis=1), expected) <= BOUND
    assert relative(cache.state, state) <= BOUND


def test_packed_and_padded_rows_are_separate_runs():
    """Also across calls: the second one begins inside a document in row 0 and with a new one in row 1."""
    layer, x = make(), inputs(time=32)
    ids = np.array([[3] * 10 + [1] * 22, [-1] * 4 + [5] * 12 + [2] * 10 + [-1] * 6], np.int32)
    step, (early, late) = applied(layer), (slice(0, 16), slice(16, 32))
    first, cache = step(x[:, early], None, ids[:, early])
    np.testing.assert_array_equal(cache.segment, [1, 5])
    second, cache = step(x[:, late], cache, ids[:, late])
    y = np.concatenate([first, second], axis=1)
    for row, start, end in ((0, 0, 10), (0, 10, 32), (1, 4, 16), (1, 16, 26)):
        expected, state = numpy_layer(layer, x[row : row + 1, start:end])
        assert relative(y[row, start:end], expected[0]) <= BOUND
        if (row, start) in ((0, 10), (1, 16)):
            assert relative(cache.state[row], state[0]) <= BOUND
    assert np.all(y[ids < 0] == 0)


def test_padding_behind_is_named_by_seq_len():
    layer, x = make(), inputs()
    x[:, 37:] = 1e3
    y, cache = applied(layer, seq_len=37)(x)
    expected, state = numpy_layer(layer, x[:, :37])
    assert relative(np.asarray(y)[:, :37], expected) <= BOUND
    assert relative(cache.state, state) <= BOUND


@pytest.mark.parametrize(
    "way, layout", [("batch", "zigzag"), ("head", "contiguous"), ("state", "zigzag"), ("auto", "zigzag")]
)
def test_over_context_ranks(way, layout):
    mesh = jax.make_mesh((2,), ("context",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    context = ContextParallel("context", layout=layout, mesh=mesh)
    layer, x = make(), inputs()
    expected, state = numpy_layer(layer, x[:, :47])
    layer.context, layer.strategy = context, way
    y, cache = applied(layer, seq_len=47)(context.to_layout(jnp.asarray(x[:, :47])))
    assert relative(context.from_layout(y, 47), expected) <= BOUND
    assert relative(cache.state, state) <= BOUND


def test_a_run_of_layers_with_gradients():
    """Two layers and an MLP in one shard_map, against the same on one device: parameter gradients too."""
    mesh = jax.make_mesh((2, 2), ("data", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    context = ContextParallel("context", layout="zigzag", mesh=mesh, batch_axis="data")
    graphs, params = zip(*(nnx.split(make(seed=seed)) for seed in (1, 2)), strict=True)
    x = inputs(time=48)

    def layers(params, x, caches, partition=None):
        for graph, state in zip(graphs, params, strict=True):
            y, _ = nnx.merge(graph, state)(x, partition=partition)
            x = x + y
            x = x + jax.nn.silu(x)
        return x, caches

    def one_device(params, x):
        return (layers(params, x, None)[0] ** 2).sum()

    def spread_out(params, x):
        y, _ = run(layers, params, context.to_layout(x), context=context, strategy="state")
        return (y**2).sum()

    # In float64: both forms are off by 1e-5 in float32, where gradients of decays cancel over tokens.
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), (list(params), x))
        expected, expected_gradients = jit(jax.value_and_grad(one_device))(params, x)
        found, gradients = jit(jax.value_and_grad(spread_out))(params, x)
        assert found == pytest.approx(float(expected), rel=1e-13)
        leaves, expected_leaves = (jax.tree.leaves(g) for g in (gradients, expected_gradients))
        largest = max(np.linalg.norm(b) for b in expected_leaves)
        for a, b in zip(leaves, expected_leaves, strict=True):
            assert a.dtype == np.float64
            assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= 1e-12 * max(np.linalg.norm(b), largest / 100)


def test_bfloat16_keeps_decay_and_state_in_float32():
    layer = make(param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    assert layer.A_log.dtype == layer.dt_bias.dtype == layer.norm.dtype == jnp.float32
    assert layer.in_proj_qkv.kernel.dtype == layer.conv.dtype == jnp.bfloat16
    y, cache = applied(layer)(inputs())
    assert y.dtype == cache.tail.dtype == jnp.bfloat16 and cache.state.dtype == jnp.float32
    expected, _ = numpy_layer(layer, inputs())
    assert relative(y.astype(jnp.float32), expected) <= 0.03


def test_errors():
    with pytest.raises(ValueError, match="num_value_heads must be a multiple of num_key_heads: 4 and 3"):
        GatedDeltaNet(8, 3, 4, 8, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="unknown projections 'qkvz'"):
        GatedDeltaNet(8, 2, 4, 8, 8, projections="qkvz", rngs=nnx.Rngs(0))
    layer = make()
    with pytest.raises(ValueError, match="segment_ids and seq_len go to ring_jax.gdn.run"):
        from ring_jax.gdn import OneDevice

        layer(inputs(), seq_len=3, partition=OneDevice())
