"""ContextParallel: layouts as resharding, meshes of all kinds, resolved masks, callers' own shard_maps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ring_jax
from ring_jax import ContextParallel, _mesh
from tests.context.harness import expected, inputs, natural
from tests.support import oracle
from tests.support.hlo import memory
from tests.support.layouts import LAYOUTS, Backwards
from tests.support.masks import B, S, cases
from tests.support.mesh import make_mesh
from tests.support.strategies import SINGLE_AXIS

ALL_LAYOUTS = [*LAYOUTS.values(), ring_jax.Zigzag(1), ring_jax.Zigzag(3), Backwards()]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, *(pytest.param(r, marks=pytest.mark.slow) for r in (5, 6, 7))])
def test_round_trips_are_bit_exact(ranks):
    mesh = make_mesh(context=ranks)
    rng = np.random.default_rng(0)
    x = rng.integers(-(2**30), 2**30, (2, 41, 3), dtype=np.int32)
    for layout in ALL_LAYOUTS:
        context = ContextParallel("context", layout=layout, mesh=mesh)
        laid = context.to_layout(x)
        assert laid.shape[1] == context.padded_length(41)
        positions = np.asarray(context.positions(41))
        np.testing.assert_array_equal(np.asarray(laid)[:, positions < 41], x[:, positions[positions < 41]])
        assert np.all(np.asarray(laid)[:, positions >= 41] == 0)
        np.testing.assert_array_equal(context.from_layout(laid, 41), x)


def test_relayout_walks_through_all_layouts():
    mesh = make_mesh(data=2, context=4)
    x = np.arange(2 * 96, dtype=np.float32).reshape(2, 96)
    contexts = [ContextParallel("context", layout=a, batch_axis="data", mesh=mesh) for a in ALL_LAYOUTS]
    for source, target in zip(contexts, contexts[1:] + contexts[:1], strict=True):
        np.testing.assert_array_equal(source.relayout(source.to_layout(x), target), target.to_layout(x))


def test_gradient_of_to_layout_is_from_layout():
    context = ContextParallel("context", layout=ring_jax.Zigzag(2), mesh=make_mesh(context=3))
    weights = jnp.arange(1.0, 13).reshape(1, 12)
    grad = jax.grad(lambda x: jnp.sum(context.to_layout(x) * weights))(jnp.ones((1, 11)))
    np.testing.assert_array_equal(grad, context.from_layout(weights, 11))


def test_sequence_on_another_axis():
    context = ContextParallel("context", layout="zigzag", mesh=make_mesh(context=4))
    x = np.arange(3 * 2 * 10.0).reshape(3, 2, 10)
    assert context.to_layout(x, seq_axis=-1).shape == (3, 2, 16)
    np.testing.assert_array_equal(context.from_layout(context.to_layout(x, seq_axis=2), 10, seq_axis=2), x)
    positions = context.to_layout(np.arange(10), seq_axis=0)
    np.testing.assert_array_equal(np.where(context.positions(10) < 10, context.positions(10), 0), positions)


@pytest.mark.parametrize("layout", ["zigzag", pytest.param(ring_jax.Zigzag(4), marks=pytest.mark.slow)])
def test_resolved_masks_equal_masks(layout):
    """`resolve` in layout order, for every mask, and ring_attention with either."""
    context = ContextParallel(
        "context", layout=layout, batch_axis="data", mesh=make_mesh(data=2, context=4), strategy="all_gather"
    )
    order = np.asarray(context.positions(S))
    for name, (mask, _) in cases().items():
        start, end = mask.interval(q_len=S, kv_len=S)
        resolved = context.resolve(mask, S)
        for got, want in ((resolved.start, start), (resolved.end, end)):
            np.testing.assert_array_equal(natural(got, order, S), want, err_msg=name)
    x = inputs(B, S, S, 4, 2, H=8)
    q, k, v = (context.to_layout(x[n]) for n in ("query", "key", "value"))
    mask = cases()["causal left padding"][0]
    kwargs = {"context": context, "seq_len": S, "scale": 0.3}
    whole = ring_jax.ring_attention(q, k, v, mask=mask, **kwargs)
    np.testing.assert_array_equal(whole, ring_jax.ring_attention(q, k, v, mask=context.resolve(mask, S), **kwargs))
    start, end = (np.broadcast_to(b, (B, S)) for b in mask.interval(q_len=S, kv_len=S))
    x["sinks"][:] = -np.inf
    want = expected(x, start, end, gradients=False)["out"]
    assert oracle.relative(context.from_layout(whole, S), want) < 2e-6


def test_shorthand_arguments_are_the_same_masks():
    context = ContextParallel("context", layout="zigzag", mesh=make_mesh(context=4), strategy="ring")
    x = inputs(2, 32, 32, 2, 2, H=8)
    q, k, v = (context.to_layout(x[n]) for n in ("query", "key", "value"))
    n = jnp.array([32, 19], jnp.int32)
    got = ring_jax.ring_attention(
        q, k, v, is_causal=True, local_window_size=(5, 5), query_seq_lengths=n, key_value_seq_lengths=n, context=context
    )
    natural_order = [jnp.asarray(x[name]) for name in ("query", "key", "value")]
    want = jax.nn.dot_product_attention(
        *natural_order, is_causal=True, local_window_size=(5, 5), query_seq_lengths=n, key_value_seq_lengths=n
    )
    valid = np.arange(32)[None, :, None, None] < np.asarray(n)[:, None, None, None]
    np.testing.assert_allclose(context.from_layout(got), np.where(valid, want, 0), atol=2e-6)


# -- meshes --------------------------------------------------------------------------------------------------------------


def loss_and_reference():
    x = inputs(2, 40, 40, 4, 2, H=8)
    start, end = (np.broadcast_to(b, (2, 40)) for b in ring_jax.causal().interval(q_len=40, kv_len=40))
    want = expected(x, start, end)
    args = tuple(jnp.asarray(x[n]) for n in ("query", "key", "value", "sinks"))
    return x, args, want


def assert_value_and_grads(attend, x, args, want):
    def loss(*args):
        out, lse = attend(*args)
        return jnp.sum(out * x["dout"]) + jnp.sum(lse * x["dlse"]), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*args)
    got = dict(zip(("out", "dq", "dk", "dv", "dsinks"), (out, *grads), strict=True))
    oracle.assert_close(got, want, 2e-6)


def attend_with(context, strategy):
    def attend(q, k, v, sinks):
        seq_len = q.shape[1]
        q, k, v = (context.to_layout(x) for x in (q, k, v))
        out, lse = ring_jax.ring_attention(
            q,
            k,
            v,
            is_causal=True,
            sinks=sinks,
            scale=0.3,
            context=context,
            seq_len=seq_len,
            strategy=strategy,
            return_residual=True,
        )
        return context.from_layout(out, seq_len), context.from_layout(lse, seq_len)

    return attend


@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
@pytest.mark.parametrize("kind", ["explicit argument", "ambient", "of the array"])
def test_explicit_meshes_and_where_the_mesh_comes_from(kind, strategy):
    x, args, want = loss_and_reference()
    mesh = jax.make_mesh((2, 3), ("data", "context"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:6])
    context = ContextParallel(
        "context", layout="zigzag", batch_axis="data", mesh=mesh if kind == "explicit argument" else None
    )
    if kind == "ambient":
        with jax.set_mesh(mesh):
            assert_value_and_grads(attend_with(context, strategy), x, args, want)
        return
    if kind == "of the array":
        args = tuple(jax.device_put(a, NamedSharding(mesh, P("data") if a.ndim == 4 else P())) for a in args)
    assert_value_and_grads(attend_with(context, strategy), x, args, want)


def test_ambient_auto_mesh():
    x, args, want = loss_and_reference()
    with jax.set_mesh(make_mesh(data=2, context=4)):
        context = ContextParallel("context", layout="zigzag", batch_axis="data")
        assert_value_and_grads(attend_with(context, "ring"), x, args, want)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("strategy", SINGLE_AXIS)
def test_inside_the_callers_shard_map(strategy, check_vma):
    """Replicated sinks too: their gradient must be summed exactly once over ranks, whatever check_vma says."""
    x, args, want = loss_and_reference()
    context = ContextParallel("context", layout="zigzag")
    mesh = make_mesh(data=2, context=2)

    def local(q, k, v, sinks):
        q, k, v = (context.to_layout(a) for a in (q, k, v))
        out, lse = ring_jax.ring_attention(
            q, k, v, is_causal=True, sinks=sinks, scale=0.3, context=context, strategy=strategy, return_residual=True
        )
        return context.from_layout(out), context.from_layout(lse)

    spec = P("data", "context")
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, spec, spec, P()), out_specs=(spec, spec), check_vma=check_vma
    )
    assert_value_and_grads(mapped, x, args, want)


def test_scan_over_layers_with_remat_and_donation():
    context = ContextParallel("context", layout="zigzag", mesh=make_mesh(context=4), strategy="ring")
    x = context.to_layout(np.random.default_rng(0).normal(size=(1, 32, 2, 8)).astype(np.float32))
    weights = jnp.linspace(0.5, 1.5, 3)

    def model(x, w, wrap):
        layer = wrap(lambda h, w: (h + ring_jax.ring_attention(w * h, h, h, is_causal=True, context=context), None))
        return jnp.sum(jax.lax.scan(layer, x, w)[0] ** 2)

    plain = jax.grad(model, argnums=(0, 1))(x, weights, lambda f: f)
    remat = jax.jit(jax.grad(model, argnums=(0, 1)), static_argnums=2, donate_argnums=0)(
        jnp.copy(x), weights, jax.checkpoint
    )
    for a, b in zip(plain, remat, strict=True):
        assert oracle.relative(b, a) < 2e-6


def test_memory_falls_with_ranks_and_hlo_sizes():
    """Strategies that rotate keep O(S / C): temporaries at C = 8 at most half of those at C = 2."""
    for strategy in ("ring", "pass_q"):
        for gradient in (False, True):
            small, large = (temporary_bytes(strategy, ranks, gradient) for ranks in (8, 2))
            assert small <= 0.5 * large, f"{strategy}, gradient={gradient}: {small} at C = 8, {large} at C = 2"


def temporary_bytes(strategy, ranks, gradient):
    mesh = make_mesh(context=ranks)
    context = ContextParallel("context", layout="zigzag", mesh=mesh, strategy=strategy)
    x = jax.ShapeDtypeStruct((1, 16384, 4, 128), jnp.float32, sharding=NamedSharding(mesh, P(None, "context")))

    def f(q, k, v):
        return ring_jax.ring_attention(q, k, v, is_causal=True, context=context)

    g = (lambda q, k, v, d: jax.vjp(f, q, k, v)[1](d)) if gradient else f
    args = (x,) * (4 if gradient else 3)
    return memory(jax.jit(g).lower(*args)).temp_size_in_bytes


def test_equal_calls_share_one_program():
    context = ContextParallel("context", layout="zigzag", mesh=make_mesh(context=2), strategy="ring")
    x = jnp.ones((1, 16, 2, 8))
    before = _mesh._run_sharded._cache_size()
    for _ in range(3):
        ring_jax.ring_attention(
            x, x, x, mask=ring_jax.causal() & ring_jax.window(3), scale=jnp.float32(0.5), context=context
        )
    assert _mesh._run_sharded._cache_size() == before + 1


@pytest.mark.parametrize("kinds", [(AxisType.Auto, AxisType.Explicit), (AxisType.Explicit, AxisType.Auto)])
def test_meshes_of_auto_and_explicit_axes(kinds):
    x, args, want = loss_and_reference()
    mesh = jax.make_mesh((2, 2), ("data", "context"), axis_types=kinds, devices=jax.devices()[:4])
    context = ContextParallel("context", layout="zigzag", batch_axis="data", mesh=mesh)
    assert_value_and_grads(attend_with(context, "all_gather"), x, args, want)


def test_inside_a_shard_map_over_another_axis():
    """Manual over data only: our shard_map nests and takes the rest of the mesh."""
    x, args, want = loss_and_reference()
    mesh = make_mesh(data=2, context=2)
    context = ContextParallel("context", layout="zigzag", batch_axis="data", mesh=mesh, strategy="all_gather")

    def local(q, k, v):
        q, k, v = (context.to_layout(a) for a in (q, k, v))
        return context.from_layout(ring_jax.ring_attention(q, k, v, is_causal=True, scale=0.3, context=context))

    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
    start, end = (np.broadcast_to(b, (2, 40)) for b in ring_jax.causal().interval(q_len=40, kv_len=40))
    want = expected(x | {"sinks": np.full(4, -np.inf)}, start, end, gradients=False)
    assert oracle.relative(jax.jit(mapped)(*args[:3]), want["out"]) < 2e-6


def test_manual_over_the_context_but_not_the_batch_raises():
    mesh = make_mesh(data=2, context=2)
    context = ContextParallel("context", batch_axis="data", strategy="ring")
    local = lambda x: ring_jax.ring_attention(x, x, x, context=context)  # noqa: E731
    spec = P(None, "context")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"context"})
    with pytest.raises(ValueError, match=r"manual over 'context' but not over \['data'\]"):
        jax.jit(mapped)(jnp.ones((2, 8, 2, 4)))


def test_lse_moves_with_its_heads_sharded():
    mesh = make_mesh(tensor=2, context=2)
    context = ContextParallel("context", layout="zigzag", head_axis="tensor", mesh=mesh)
    lse = jax.ShapeDtypeStruct((2, 8, 4), jnp.float32, sharding=NamedSharding(mesh, P(None, "context", "tensor")))
    text = jax.jit(lambda x: context.from_layout(x, head_dim=2)).lower(lse).compile().as_text()
    assert "all-gather" not in text and text.count(" collective-permute(") == 2


def test_sequences_of_length_zero():
    context = ContextParallel("context", mesh=make_mesh(context=2), strategy="ring")
    x = jnp.ones((1, 0, 2, 8))
    out, lse = ring_jax.ring_attention(x, x, x, is_causal=True, context=context, return_residual=True)
    assert out.shape == (1, 0, 2, 8) and lse.shape == (1, 0, 2)
    one = jnp.ones((1, 4, 2, 8))
    out, lse = ring_jax.ring_attention(one, x, x, context=context, return_residual=True)
    assert jnp.all(out == 0) and jnp.all(jnp.isneginf(lse))


# -- errors --------------------------------------------------------------------------------------------------------------

X = np.ones((1, 8, 4, 8), np.float32)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            {"axis": "ring"},
            ValueError,
            r"ContextParallel\(axis='ring'\): the mesh has axes {'data': 2, 'context': 4}, no 'ring'",
        ),
        ({"batch_axis": "dp"}, ValueError, r"batch_axis='dp'"),
        ({"layout": "snake"}, ValueError, "unknown layout 'snake'"),
        ({"strategy": "star"}, ValueError, "unknown strategy 'star': expected one of"),
        ({"axis": ("data", "context", "x")}, ValueError, "at most 2 mesh axes"),
        ({"batch_axis": "context"}, ValueError, "one of sequence, batch and heads"),
        ({"axis": 3}, TypeError, "must be the name of a mesh axis"),
    ],
)
def test_context_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ContextParallel(**({"axis": "context", "mesh": make_mesh(data=2, context=4)} | arguments))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"bias": X}, NotImplementedError, "bias is not supported"),
        ({"mask": np.ones((8, 8), bool)}, NotImplementedError, "mask must be a ring_jax.Mask .* got bool .8, 8."),
        ({"key": X.astype(np.float16)}, ValueError, "must share one dtype"),
        (
            {"query": np.ones((1, 6, 4, 8), np.float32)},
            ValueError,
            "query length 6 does not divide over 4 .* pads to 8",
        ),
        ({"strategy": "star"}, ValueError, "unknown strategy"),
        ({"strategy": "ring_ulysses"}, ValueError, "takes two mesh axes"),
        (
            {"strategy": "ulysses", "query": X[:, :, :2], "key": X[:, :, :2], "value": X[:, :, :2]},
            ValueError,
            "Use strategy='ring'",
        ),
        ({"implementation": "tpu"}, ValueError, "unknown implementation 'tpu'"),
        ({"seq_len": 9}, ValueError, r"seq_len=9 is not in \[0, 8\]"),
        ({"sinks": np.ones(3, np.float32)}, ValueError, r"sinks must have shape \[N=4\], got \(3,\)"),
        ({"is_causal": 1}, TypeError, "is_causal must be True or False"),
        ({"local_window_size": (1, 2, 3)}, ValueError, "integer or \\(left, right\\)"),
        ({"seq_len": 7.5}, TypeError, "seq_len must be an integer, got 7.5"),
        ({"mask": ring_jax.documents(segment_ids=np.zeros(4, int))}, ValueError, "segment_ids cover 4 of 8 positions"),
        ({"key": X[:, :0], "value": X[:, :0], "seq_len": 5}, ValueError, "so pass key_value_seq_len too"),
        ({"logits_soft_cap": float("nan")}, ValueError, "must be finite and > 0, got nan"),
        ({"context": "context"}, TypeError, "must be a ring_jax.ContextParallel, got 'context' .str."),
        (
            {"query_seq_lengths": np.array([8, 8])},
            ValueError,
            "query_seq_lengths.* must have one row or the batch's 1, got 2",
        ),
    ],
)
def test_call_errors(arguments, error, message):
    context = ContextParallel("context", layout="zigzag", mesh=make_mesh(data=2, context=4))
    call = {"query": X, "key": X, "value": X, "context": context} | arguments
    with pytest.raises(error, match=message):
        ring_jax.ring_attention(**call)


class Odd(Backwards):
    def padded_length(self, seq_len, ranks):
        return -(-seq_len // ranks) * ranks


def test_more_errors():
    mesh = make_mesh(data=2, context=4)
    context = ContextParallel("context", layout="zigzag", batch_axis="data", mesh=mesh)
    with pytest.raises(ValueError, match="batch: 1 does not divide over mesh axis 'data' of size 2"):
        ring_jax.ring_attention(X, X, X, context=context)
    with pytest.raises(ValueError, match="a resolved mask is complete"):
        ring_jax.ring_attention(X, X, X, mask=context.resolve(ring_jax.Mask(), 8), is_causal=True, context=context)
    resolved = context.resolve(ring_jax.Mask(), 8)
    with pytest.raises(TypeError, match="query_offset must be one integer"):
        ring_jax.ring_attention(X, X, X, mask=resolved, query_offset=0.0, context=context)
    with pytest.raises(ValueError, match="seq_len=5, but the mask was resolved for 8"):
        ring_jax.ring_attention(X, X, X, mask=resolved, seq_len=5, context=context)
    with pytest.raises(ValueError, match="resolved for layout Zigzag"):
        ring_jax.ring_attention(X, X, X, mask=resolved, context=ContextParallel("context", mesh=mesh))
    with pytest.raises(ValueError, match="no mesh for context axis 'context': pass"):
        ring_jax.ring_attention(X, X, X, context=ContextParallel("context"))
    with pytest.raises(ValueError, match="length 7 on axis 1 does not divide"):
        context.from_layout(X[:, :7])
    with pytest.raises(ValueError, match=r"layout Odd\(\) pads 9 .* over 4 ranks to 12, .* even number"):
        dataclasses.replace(context, layout=Odd()).to_layout(np.ones((2, 9)))
    with pytest.raises(ValueError, match="seq_len must be in .0, 8., got 9"):
        context.from_layout(X, 9)
    with pytest.raises(ValueError, match="seq_axis=4 is out of range"):
        context.to_layout(X, seq_axis=4)
    with pytest.raises(ValueError, match="stays on one mesh axis"):
        context.relayout(X, ContextParallel("data", mesh=mesh))
