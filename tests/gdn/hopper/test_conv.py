"""The Hopper convolution kernels: lowered for CUDA and interpreted on the CPU, compared with the oracle on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ring_jax.gdn import causal_convolution
from ring_jax.gdn.convolved import l2_normalize
from ring_jax.gdn.heads import Heads
from ring_jax.gdn.hopper import conv
from ring_jax.mosaic import compat
from tests.gdn.helpers import relative
from tests.support.hopper import lower, on_hopper
from tests.support.marks import interpreted, needs_in_place

SMALL = Heads(8, 16, 64, 64)  # 512 features each in q and k: one block of channels
WIDTH = 4


def oracle(mixed, weight, heads, tail, segment_ids):
    """q, k, v and the leaving tail by the plain form; in float64 where the arrays are."""
    y, leaving = causal_convolution(mixed, weight, tail=tail, segment_ids=segment_ids)
    y = jax.nn.silu(y)
    parts = jnp.split(y, np.cumsum(heads.parts)[:-1], axis=2)
    sizes = heads.key_size, heads.key_size, heads.value_size
    q, k, v = (p.reshape(*p.shape[:2], -1, size) for p, size in zip(parts, sizes, strict=True))
    return l2_normalize(q), l2_normalize(k), v, leaving


def segments(kind: str, batch: int, time: int):
    """Segment ids, or None."""
    if kind == "none":
        return None
    ids = np.zeros((batch, time), np.int32)
    if kind == "documents":  # some shorter than the history
        rng = np.random.default_rng(time)
        ids[:] = np.sort(rng.integers(0, max(2, time // 5), (batch, time)), axis=1)
    if kind == "padding":  # left, between, right; the last row is nothing else
        ids[:, time // 2 :] = 3
        ids[:, : time // 7 + 1] = ids[:, time // 3 : time // 2] = ids[:, time - time // 5 :] = -1
        ids[-1] = -1
    return ids


def inputs(seed, batch, time, heads, dtype, kind="none", tail=True, width=WIDTH):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    mixed, weight = draw(batch, time, heads.features), draw(width, heads.features)
    ids = segments(kind, batch, time)
    if ids is not None:
        mixed = jnp.where((ids >= 0)[..., None], mixed, jnp.nan)  # padding may hold anything
    return mixed, weight, draw(batch, width - 1, heads.features) if tail else None, ids


def by_key_heads(x, heads, more):
    """[B, T, q | k | v] as [B, T, K, P], with `more` columns of NaN behind those of each key head."""
    parts = [part.reshape(*x.shape[:2], heads.key_heads, -1) for part in split(x, heads)]
    return jnp.pad(jnp.concatenate(parts, axis=3), ((0, 0),) * 3 + ((0, more),), constant_values=jnp.nan)


def split(x, heads):
    return tuple(jnp.split(x, np.cumsum(heads.parts)[:-1], axis=-1))


@functools.cache
def _value_and_gradients(function, heads, **options):
    def run(mixed, weight, tail, ids, cotangents):
        def outputs(mixed, weight, tail):
            *out, leaving = function(mixed, weight, heads, tail=tail, segment_ids=ids, **dict(options))
            return tuple(out), leaving

        out, vjp, leaving = jax.vjp(outputs, mixed, weight, tail, has_aux=True)
        return out, leaving, vjp(tuple(c.astype(o.dtype) for c, o in zip(cotangents, out, strict=True)))

    return jax.jit(run)


def check(seed, batch, time, heads, dtype, kind="none", tail=True, joint=False, gradients=True, **options):
    """Kernel against the float64 oracle: outputs, leaving tail and gradients. `joint`: one array of all parts, or "by heads"."""
    mixed, weight, tail, ids = inputs(seed, batch, time, heads, dtype, kind, tail, options.pop("width", WIDTH))
    rng = np.random.default_rng(seed + 1)
    counts = (heads.key_heads, heads.key_heads, heads.value_heads)
    sizes = (heads.key_size, heads.key_size, heads.value_size)
    cotangents = [
        rng.standard_normal((batch, time, n, s)).astype(np.float32) for n, s in zip(counts, sizes, strict=True)
    ]
    given = (mixed, weight) if joint else (split(mixed, heads), split(weight, heads))
    if joint == "by heads":
        given = (by_key_heads(mixed, heads, more := 24), weight)
    if gradients:
        run = _value_and_gradients(conv.convolve, heads, **options)
        out, leaving, found = run(*given, tail, ids, [jnp.asarray(c, dtype) for c in cotangents])
    else:
        *out, leaving = jax.jit(functools.partial(conv.convolve, heads=heads, **options))(
            *given, tail=tail, segment_ids=ids
        )
    wide = [None if x is None else np.asarray(x.astype(jnp.float32), np.float64) for x in (mixed, weight, tail)]
    rounded = [np.asarray(jnp.asarray(c, dtype).astype(jnp.float32), np.float64) for c in cotangents]
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        want, want_leaving, expected = _value_and_gradients(_oracle, heads)(*wide, ids, rounded)
        want, want_leaving, expected = jax.tree.map(np.asarray, (want, want_leaving, expected))
    eps = float(jnp.finfo(options.get("out_dtype", dtype)).eps)
    for ours, theirs in zip(out, want, strict=True):
        assert ours.dtype == options.get("out_dtype", dtype)
        assert relative(ours.astype(jnp.float32), theirs) <= eps / 3 + 2e-6
        if ids is not None:
            assert not np.asarray(ours)[ids < 0].any()
    np.testing.assert_array_equal(np.asarray(leaving, np.float64), want_leaving)
    if gradients:
        eps = float(jnp.finfo(dtype).eps)
        if joint == "by heads":
            assert not np.asarray(found[0][..., -more:]).any()
            parts = jnp.split(found[0], np.cumsum(heads.of_key_head[:3]), axis=3)[:3]
            found = jnp.concatenate([part.reshape(batch, time, -1) for part in parts], axis=2), *found[1:]
        dmixed, dweight = found[:2] if joint else [jnp.concatenate(x, axis=-1) for x in found[:2]]
        bound = eps / 3 + 4e-6
        assert relative(dmixed.astype(jnp.float32), expected[0]) <= bound
        assert relative(dweight.astype(jnp.float32), expected[1]) <= bound
        assert tail is None or relative(found[2].astype(jnp.float32), expected[2]) <= bound


def _oracle(mixed, weight, heads, tail, segment_ids):
    return oracle(mixed, weight, heads, tail, segment_ids)


# Interpreted on the CPU.

TINY = conv.ConvConfig(rows=8, unroll=3, vector=4)
AHEAD = dataclasses.replace(TINY, unroll=2, prefetch=True)


@interpreted
@pytest.mark.parametrize(
    ("time", "kind", "tail", "joint", "config"),
    [
        (17, "documents", True, True, AHEAD),
        pytest.param(13, "none", True, False, AHEAD, marks=pytest.mark.slow),
        pytest.param(24, "padding", False, False, TINY, marks=pytest.mark.slow),
        pytest.param(2, "none", True, True, TINY, marks=pytest.mark.slow),
    ],
)
def test_interpreted(time, kind, tail, joint, config):
    batch = 2 if kind == "padding" else 1
    with compat.interpret_mode():
        check(3, batch, time, SMALL, jnp.float32, kind, tail, joint, config=config, backward_config=config)


@interpreted
@pytest.mark.parametrize(
    ("time", "kind", "tail", "heads"),
    [
        (17, "documents", True, SMALL),
        pytest.param(13, "none", True, Heads(8, 8, 64, 64), marks=pytest.mark.slow),
        pytest.param(9, "padding", False, Heads(8, 32, 64, 64), marks=pytest.mark.slow),
        (5, "none", True, Heads(8, 16, 128, 64)),
    ],
)
def test_interpreted_by_key_heads(time, kind, tail, heads):
    with compat.interpret_mode():
        check(3, 2, time, heads, jnp.float32, kind, tail, "by heads", config=AHEAD, backward_config=AHEAD)


@interpreted
def test_interpreted_forward_without_documents():
    with compat.interpret_mode():
        check(4, 1, 10, SMALL, jnp.float32, gradients=False, config=AHEAD)


# Lowering for CUDA, on the CPU.


def structs(batch, time, heads, dtype, joint=True, tail=True, ids=True):
    def shapes(*leading):
        each = [jax.ShapeDtypeStruct((*leading, n), dtype) for n in ((heads.features,) if joint else heads.parts)]
        return each[0] if joint else tuple(each)

    tails = jax.ShapeDtypeStruct((batch, WIDTH - 1, heads.features), dtype) if tail else None
    rows = jax.ShapeDtypeStruct((batch, time), jnp.int32) if ids else None
    mixed = shapes(batch, time)
    if joint == "by heads":
        mixed = jax.ShapeDtypeStruct((batch, time, heads.key_heads, heads.stride), dtype)
    return mixed, shapes(WIDTH), tails, rows


def loss(heads, mixed, weight, tail, ids):
    *out, _ = conv.convolve(mixed, weight, heads, tail=tail, segment_ids=ids)
    return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in out)


@needs_in_place
@pytest.mark.parametrize(
    ("heads", "dtype", "joint", "plain"),
    [
        (Heads(16, 32, 128, 128), jnp.bfloat16, False, True),
        (Heads(6, 12, 128, 64), jnp.float16, False, False),  # blocks that overlap, sizes that differ
        (Heads(4, 4, 256, 256), jnp.float32, True, False),
        (Heads(16, 32, 128, 128), jnp.bfloat16, "by heads", True),
        (Heads(16, 16, 128, 128), jnp.bfloat16, "by heads", False),
        (Heads(10, 40, 128, 256), jnp.float16, "by heads", False),
    ],
)
def test_lowers(heads, dtype, joint, plain):
    arguments = structs(2, 1001, heads, dtype, joint, tail=not plain, ids=not plain)
    text = lower(jax.grad(functools.partial(loss, heads), argnums=(0, 1)), *arguments).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2


@needs_in_place
def test_lowers_inside_shard_map():
    """Filters are the same on all ranks: their gradient is summed outside of the rule, once."""
    mesh = jax.make_mesh((2,), ("c",), devices=jax.devices("cpu")[:2], axis_types=(jax.sharding.AxisType.Auto,))
    spec = P("c")

    def sharded(mixed, weight, tail, ids):
        def total(*arguments):
            return jax.lax.psum(loss(SMALL, *arguments), "c")

        return jax.shard_map(total, mesh=mesh, in_specs=(spec, P(), spec, spec), out_specs=P())(
            mixed, weight, tail, ids
        )

    traced = jax.jit(jax.grad(sharded, argnums=(0, 1))).trace
    with on_hopper(axis=None):
        text = traced(*structs(2, 64, SMALL, jnp.bfloat16)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2
    assert text.count("all_reduce") == 1


# Flags, refusals.


def test_flags():
    ids = jnp.asarray([[-1, -1, 4, 4, 4] + [7] * 20 + [-1]])
    flags = np.asarray(conv.document_flags(ids))[0]
    expected = [3, 3, 2, 0, 0, 1] + [0] * 19 + [3]
    np.testing.assert_array_equal(flags % conv.FLAG_AHEAD, expected)
    ahead = [any(expected[i : i + conv.AHEAD]) for i in range(len(expected))]
    np.testing.assert_array_equal(flags >= conv.FLAG_AHEAD, ahead)
    whole = jnp.zeros((2, 40), jnp.int32)
    np.testing.assert_array_equal(conv.one_document(whole[..., None].astype(jnp.float32)), conv.document_flags(whole))


def test_unsupported_reasons():
    def reason(heads, dtype=jnp.bfloat16, joint=False, width=WIDTH, **options):
        mixed, weight, *_ = structs(1, 8, heads, dtype, joint)
        weight = jax.tree.map(lambda w: jax.ShapeDtypeStruct((width, *w.shape[1:]), w.dtype), weight)
        return conv.unsupported_reason(mixed, weight, heads, **options)

    if compat.INTERPRET_AVAILABLE:
        assert reason(SMALL, compute_capability="9.0") is None
        assert "bfloat16" in reason(SMALL, jnp.float64)
        assert "taps" in reason(SMALL, width=1)
        assert "head sizes" in reason(Heads(8, 8, 96, 96))
        assert "separate" in reason(Heads(8, 8, 64, 128), joint=True)
        assert reason(Heads(8, 8, 64, 128), joint="by heads") is None
        assert "one value head of every key head" in reason(Heads(2, 8, 128, 128), joint="by heads")
        odd = jax.ShapeDtypeStruct((1, 8, SMALL.key_heads, SMALL.stride + 1), jnp.bfloat16)
        assert "multiple of 8" in conv.unsupported_reason(odd, structs(1, 8, SMALL, jnp.bfloat16)[1], SMALL)
        assert "at least 512" in reason(Heads(2, 4, 128, 128))
        with pytest.raises(NotImplementedError, match="taps"):
            conv.convolve(jnp.zeros((1, 8, SMALL.features)), jnp.zeros((1, SMALL.features)), SMALL)
    else:
        assert "jax 0.11" in reason(SMALL)
    assert "Hopper" in reason(SMALL, compute_capability="8.0")


@pytest.mark.parametrize("change", [{"rows": 0}, {"unroll": 0}, {"vector": 2}])
def test_config_refuses(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(conv.FORWARD, **change)


def test_errors():
    mixed, weight, tail, _ = inputs(0, 1, 4, SMALL, jnp.float32)
    with pytest.raises(ValueError, match="mixed must have shape"):
        conv.convolve(mixed[..., :-1], weight, SMALL)
    with pytest.raises(ValueError, match="axis 1 differs"):
        q, k, v = split(mixed, SMALL)
        conv.convolve((q, k[:, 1:], v), weight, SMALL)
    with pytest.raises(ValueError, match="for each key head, at least 256, got 248"):
        conv.convolve(jnp.zeros((1, 4, SMALL.key_heads, 248)), weight, SMALL)
    with pytest.raises(ValueError, match="tail must have shape"):
        conv.convolve(mixed, weight, SMALL, tail=tail[:, 1:])


# On a GPU.

MODEL = Heads(16, 32, 128, 128)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "documents", "padding"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=["bfloat16", "float16", "float32"])
def test_gpu(dtype, kind):
    check(5, 2, 700, MODEL, dtype, kind, tail=kind != "none", joint=kind == "padding")


@pytest.mark.gpu
@pytest.mark.parametrize("time", [1, 2, 3, 5, 64, 67, 255, 257])
def test_gpu_lengths(time):
    check(6, 3, time, SMALL, jnp.bfloat16, "none")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "options"),
    [
        (Heads(6, 12, 128, 64), {"out_dtype": jnp.float32}),
        (Heads(4, 4, 256, 256), {"joint": True}),
        (SMALL, {"width": 2, "kind": "documents"}),
        (SMALL, {"width": 7, "kind": "padding"}),
    ],
)
def test_gpu_other_sizes(heads, options):
    options = dict(options)
    check(7, 2, 300, heads, jnp.bfloat16, options.pop("kind", "none"), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "documents", "padding"])
@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        (MODEL, jnp.bfloat16),
        (Heads(16, 16, 128, 128), jnp.bfloat16),
        (Heads(8, 32, 64, 64), jnp.float16),
        (Heads(8, 16, 128, 64), jnp.float32),
        (Heads(10, 20, 128, 256), jnp.bfloat16),
    ],
)
def test_gpu_by_key_heads(heads, dtype, kind):
    check(9, 2, 700, heads, dtype, kind, tail=kind != "none", joint="by heads")


@pytest.mark.gpu
def test_gpu_repeats_bit_by_bit():
    mixed, weight, tail, ids = inputs(8, 1, 3001, MODEL, jnp.bfloat16, "documents")
    run = jax.jit(jax.value_and_grad(functools.partial(loss, MODEL), argnums=(0, 1, 2)))
    first, *others = (run(mixed, weight, tail, ids) for _ in range(3))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)
