"""Every way over context ranks against the unsharded float64 result: output, state, tail and all gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.context import ContextParallel
from ring_jax.gdn import gated_delta_rule, run
from ring_jax.gdn.heads import Heads
from ring_jax.gdn.mixer import GDNCache, MixerWeights, mix
from ring_jax.gdn.partition import OneDevice
from ring_jax.gdn.state_scan import Chunks
from ring_jax.layout import Contiguous, Striped, Zigzag
from tests.gdn.helpers import BOUND, GRADIENT_BOUND, jit, numpy_rule, operands, relative

WIDTH, CONV = 12, 5  # of the layer input and of the convolution: its halo of 4 is longer than the shortest chunks
RANKS, BATCHES = (1, 2, 3, 4, 8), (1, 2, 5)


def pairwise(*factors):
    """Few cases that hold every pair of values of any two factors; greedy and deterministic."""
    product = list(itertools.product(*factors))
    pairs = lambda case: set(itertools.combinations(enumerate(case), 2))  # noqa: E731
    missing, chosen = set().union(*map(pairs, product)), []
    while missing:
        chosen.append(max(product, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


FULL = list(itertools.product(("batch", "head", "state"), ("contiguous", "zigzag"), RANKS, BATCHES))
# An odd number of ranks and many, batches that nothing divides by and some that something does; the rest is the full product's.
PAIRWISE = pairwise(("batch", "head", "state"), ("contiguous", "zigzag"), (3, 8), (2, 5))
CASES = [case if case in PAIRWISE else pytest.param(*case, marks=pytest.mark.slow) for case in FULL]


@functools.cache
def context_of(ranks, layout, batch_axis=None):
    axes = ("context",) if batch_axis is None else (batch_axis, "context")
    shape = (ranks,) if batch_axis is None else (2, ranks)
    devices = jax.devices("cpu")[: int(np.prod(shape))]
    mesh = jax.make_mesh(shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes), devices=devices)
    return ContextParallel("context", layout=layout, mesh=mesh, batch_axis=batch_axis)


def order(context, time, ranks):
    """Natural index of every place of the laid-out sequence."""
    return np.concatenate([np.asarray(context.layout.positions(r, time, ranks)) for r in range(ranks)])


def make_inputs(heads, batch, time, seed=0):
    """(weights, x, cache) in float32, with states that live for hundreds of tokens, and random cotangents."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    n = heads.value_heads
    weights = MixerWeights(
        qkv=tuple(normal(WIDTH, size) * WIDTH**-0.5 for size in heads.parts),
        ba=(normal(WIDTH, 2 * n) * WIDTH**-0.5,),
        conv=normal(CONV, heads.features) * 0.5,
        a_log=np.log(4 * rng.uniform(size=n) + 0.01).astype(np.float32),
        dt_bias=normal(n) - 4,
        heads=heads,
        precision="highest",
    )
    state = normal(batch, n, heads.key_size, heads.value_size)
    tail = normal(batch, CONV - 1, heads.features)
    out = normal(batch, time, n, heads.value_size)
    return (weights, normal(batch, time, WIDTH), state, tail), (out, normal(*state.shape), normal(*tail.shape))


def documents(pattern, batch, time, ranks, seed=0):
    """(segment ids [B, T] in natural order, segment of the cache [B])."""
    rng = np.random.default_rng(seed)
    chunk = max(time // (2 * ranks), 1)
    ids = np.zeros((batch, time), np.int32)
    for b in range(batch):
        if pattern == "borders":  # at, just before and just after rank borders
            cuts = chunk * np.arange(1, 2 * ranks) + rng.integers(-1, 2, size=2 * ranks - 1)
        elif pattern == "short":  # documents shorter than the halo, and one long one
            cuts = np.cumsum(rng.integers(1, CONV - 1, size=time))
            cuts = cuts[(cuts < time // 3) | (cuts > 2 * time // 3)]
        else:  # padding before, between and after documents
            cuts = np.array([time // 2 + b])
        ids[b] = (np.arange(time)[:, None] >= cuts).sum(axis=1)
        if pattern == "padded":
            left, right = (5 * b + 3) % (time // 2), time - (7 * b + 2) % (time // 3)
            ids[b, :left], ids[b, right:], ids[b, time // 2 : time // 2 + b] = -1, -1, -1
    if pattern == "padded" and batch > 2:
        ids[2] = -1
    segment = np.array([[-1, 99, 0][b % 3] for b in range(batch)], np.int32)  # unknown, another, the same document
    return ids, segment


def losses(mixer):
    """Value and gradients of mixer(weights, x, cache, ids) -> (out, cache) contracted with random cotangents."""

    def loss(inputs, cotangents, ids, segment):
        weights, x, state, tail = inputs
        out, cache = mixer(weights, x, GDNCache(state, tail, segment), ids)
        pairs = zip((out, cache.state, cache.tail), cotangents, strict=True)
        return sum(jnp.vdot(a, b) for a, b in pairs), (out, cache)

    return jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def unsharded():
    return losses(lambda weights, x, cache, ids: mix(weights, x, cache, OneDevice(ids), "reference"))


def expected_of(inputs, cotangents, ids, segment):
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (inputs, cotangents))
    with jax.enable_x64(True):
        (_, results), gradients = unsharded()(*wide, ids, segment)
        return jax.tree.map(np.asarray, (results, gradients))


def check(found, expected):
    """`found` in natural order."""
    (out, cache), (weights, x, state, tail) = found
    (expected_out, expected_cache), (expected_weights, *expected_inputs) = expected
    assert relative(out, expected_out) <= BOUND
    assert relative(cache.state, expected_cache.state) <= BOUND
    assert relative(cache.tail, expected_cache.tail) <= BOUND
    np.testing.assert_array_equal(cache.segment, expected_cache.segment)
    for name, a, b in zip(("x", "state", "tail"), (x, state, tail), expected_inputs, strict=True):
        assert relative(a, b) <= GRADIENT_BOUND, f"d{name}: {relative(a, b)}"
    for name in ("qkv", "ba", "conv"):
        a, b = getattr(weights, name), getattr(expected_weights, name)
        assert relative(a, b) <= GRADIENT_BOUND, f"d{name}: {relative(a, b)}"
    for name in ("a_log", "dt_bias"):  # sums of dg over the sequence; bounded as dg is, by the gradient of (b | a) too
        a, b = getattr(weights, name), getattr(expected_weights, name)
        scale = max(np.linalg.norm(b), np.linalg.norm(expected_weights.ba))
        assert np.linalg.norm(a - b) <= GRADIENT_BOUND * scale, name


def check_way(way, layout, ranks, batch, time, patterns):
    heads = Heads(3, 6, 8, 4) if ranks == 3 else Heads(8, 16, 8, 4)
    context = context_of(ranks, layout)
    places = order(context, time, ranks)
    natural = np.argsort(places)

    def mixer(weights, x, cache, ids):
        return run(
            lambda weights, x, cache, partition: mix(weights, x, cache, partition),
            weights,
            x,
            context=context,
            strategy=way,
            caches=cache,
            segment_ids=ids,
        )

    program = losses(mixer)
    for pattern in patterns:
        ids, segment = documents(pattern, batch, time, ranks) if pattern else (None, np.full(batch, -1, np.int32))
        inputs, cotangents = make_inputs(heads, batch, time)
        expected = expected_of(inputs, cotangents, ids, segment)
        weights, x, *initial = inputs
        laid_out = (weights, x[:, places], *initial), (cotangents[0][:, places], *cotangents[1:])
        (_, (out, cache)), (dweights, dx, *dinitial) = jax.tree.map(
            np.asarray, program(*laid_out, None if ids is None else ids[:, places], segment)
        )
        check(((out[:, natural], cache), (dweights, dx[:, natural], *dinitial)), expected)


@pytest.mark.parametrize("way, layout, ranks, batch", CASES)
def test_packed(way, layout, ranks, batch):
    check_way(way, layout, ranks, batch, 48, ("borders", "short", "padded"))


@pytest.mark.parametrize(
    "way, layout, ranks, batch",
    [
        ("state", "zigzag", 8, 1),
        pytest.param("head", "contiguous", 2, 1, marks=pytest.mark.slow),
        ("batch", "zigzag", 3, 1),
        pytest.param("state", "contiguous", 3, 2, marks=pytest.mark.slow),
    ],
)
def test_one_document(way, layout, ranks, batch):
    """Without segment ids: another program."""
    check_way(way, layout, ranks, batch, 48, (None,))


@pytest.mark.parametrize(
    "layout, patterns",
    [
        ("zigzag", ("short", "padded")),
        pytest.param("contiguous", (None,), marks=pytest.mark.slow),
        pytest.param("zigzag", (None,), marks=pytest.mark.slow),
        pytest.param("contiguous", ("borders", "short", "padded"), marks=pytest.mark.slow),
    ],
)
def test_chunks_shorter_than_the_halo(layout, patterns):
    """One token (zigzag) or two (contiguous) a chunk, with a halo of four: several hops."""
    check_way("state", layout, 8, 2, 16, patterns)


@pytest.mark.parametrize(
    "way, layout", [("batch", Zigzag(block=2)), pytest.param("head", Striped(), marks=pytest.mark.slow)]
)
def test_fine_layouts(way, layout):
    check_way(way, layout, 4, 2, 48, ("borders",))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["batch", "head", "state"])
def test_long_sequence(way):
    check_way(way, "zigzag", 4, 2, 4096, (None, "borders", "padded"))


@pytest.mark.parametrize("way", ["batch", "head", "state"])
def test_public_operation(way):
    """`gated_delta_rule(context=...)`, with a data axis."""
    arrays, ids = operands(0, 2, 48, 4, 8, 8, 4), documents("borders", 2, 48, 4)[0]
    context = context_of(4, "zigzag", "data")
    places = order(context, 48, 4)
    out, state = jit(
        lambda *x: gated_delta_rule(*x[:5], initial_state=x[5], segment_ids=x[6], context=context, strategy=way)
    )(*(x[:, places] for x in arrays[:5]), arrays[5], ids[:, places])
    expected, expected_state = numpy_rule(*arrays, segment_ids=ids)
    assert relative(np.asarray(out)[:, np.argsort(places)], expected) <= BOUND
    assert relative(state, expected_state) <= BOUND
    assert state.sharding.is_equivalent_to(jax.sharding.NamedSharding(context.mesh, jax.P("data")), 4)


def test_heads_over_a_tensor_axis():
    """Heads of the bare operation may be sharded as well; nothing is gathered for it."""
    mesh = jax.make_mesh((2, 2), ("context", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    context = ContextParallel("context", layout="zigzag", mesh=mesh, head_axis="tensor")
    arrays = operands(0, 1, 48, 2, 4, 8, 4)
    places = order(context, 48, 2)
    program = jit(lambda *x: gated_delta_rule(*x[:5], initial_state=x[5], context=context, strategy="state"))
    out, state = program(*(x[:, places] for x in arrays[:5]), arrays[5])
    expected, expected_state = numpy_rule(*arrays)
    assert relative(np.asarray(out)[:, np.argsort(places)], expected) <= BOUND
    assert relative(state, expected_state) <= BOUND
    assert state.sharding.spec == jax.P(None, "tensor")


def test_explicit_mesh_and_two_axes():
    """The ambient mesh, Explicit, with the sequence over two of its axes."""
    arrays = operands(0, 2, 48, 2, 4, 8, 4)
    mesh = jax.make_mesh((2, 2), ("outer", "inner"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    context = ContextParallel(("outer", "inner"), layout="contiguous")
    rule = lambda *x: gated_delta_rule(*x[:5], initial_state=x[5], context=context, strategy="state")  # noqa: E731
    with jax.set_mesh(mesh):
        out, state = jit(rule)(*arrays)
    expected, expected_state = numpy_rule(*arrays)
    assert relative(out, expected) <= BOUND
    assert relative(state, expected_state) <= BOUND


def test_inside_the_callers_shard_map():
    arrays = operands(0, 2, 48, 2, 4, 8, 4)
    context = context_of(4, "contiguous")
    tokens, row = jax.P(None, "context"), jax.P()
    rule = lambda *x: gated_delta_rule(*x[:5], initial_state=x[5], context=context, strategy="state")  # noqa: E731
    program = jax.shard_map(rule, mesh=context.mesh, in_specs=(tokens,) * 5 + (row,), out_specs=(tokens, row))
    out, state = jit(program)(*arrays)
    expected, expected_state = numpy_rule(*arrays)
    assert relative(out, expected) <= BOUND
    assert relative(state, expected_state) <= BOUND


def _split_inputs():
    (weights, x, state, tail), _ = make_inputs(Heads(2, 4, 8, 4), 2, 24)
    ids = np.array([[0] * 24, [4] * 7 + [2] * 2 + [8] * 15], np.int32)
    return weights, x, GDNCache(state, tail, np.array([0, -1], np.int32)), ids


@functools.cache
def _split_expected():
    weights, x, cache, ids = _split_inputs()
    return jit(lambda: mix(weights, x, cache, OneDevice(ids), "reference"))()


@pytest.mark.parametrize("way", ["batch", "head", "state"])
def test_split_anywhere(way):
    """[0, t), then [t, S) with state, tail and segment carried, for every t (also at, before and after rank borders
    and inside documents): one compiled program."""
    time, ranks = 24, 2
    context = context_of(ranks, "zigzag")
    places = order(context, time, ranks)
    weights, x, cache, ids = _split_inputs()

    def part(cache, ids):
        layer = lambda weights, x, cache, partition: mix(weights, x, cache, partition)  # noqa: E731
        return run(layer, weights, x[:, places], context=context, strategy=way, caches=cache, segment_ids=ids)

    @jit
    def split(t):
        early, middle = part(cache, jnp.where(places < t, ids[:, places], -1))
        late, end = part(middle, jnp.where(places >= t, ids[:, places], -1))
        return early + late, end

    expected, expected_cache = _split_expected()
    for t in range(time + 1):
        out, end = split(t)
        assert relative(np.asarray(out)[:, np.argsort(places)], expected) <= BOUND
        assert relative(end.state, expected_cache.state) <= BOUND
        np.testing.assert_allclose(end.tail, expected_cache.tail, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(end.segment, [0, 8])


def test_cut_arrays_and_change_the_way():
    """A sequence that is really cut, each piece under another way and layout, and its last token decoded in one place:
    what one way leaves, any other continues."""
    (weights, x, state, tail), _ = make_inputs(Heads(4, 4, 8, 4), 1, 60)
    cache = GDNCache(jnp.asarray(state), jnp.asarray(tail), jnp.array([-1]))
    expected, expected_cache = jit(lambda x, cache: mix(weights, x, cache, OneDevice(), "reference"))(x, cache)
    outs = []
    for way, layout, (start, end) in zip(
        ("batch", "state", "head"), ("zigzag", "contiguous", "zigzag"), ((0, 17), (17, 42), (42, 59)), strict=True
    ):
        context = context_of(4, layout)
        layer = lambda weights, x, cache, partition: mix(weights, x, cache, partition)  # noqa: E731
        options = dict(context=context, strategy=way, seq_len=end - start)
        program = jit(lambda x, cache, layer=layer, options=options: run(layer, weights, x, caches=cache, **options))
        out, cache = program(context.to_layout(jnp.asarray(x[:, start:end])), cache)
        outs.append(np.asarray(context.from_layout(out, end - start)))
    out, cache = jit(lambda x, cache: mix(weights, x, cache, OneDevice()))(x[:, 59:], jax.tree.map(np.asarray, cache))
    assert relative(np.concatenate([*outs, out], axis=1), expected) <= BOUND
    assert relative(cache.state, expected_cache.state) <= BOUND
    assert relative(cache.tail, expected_cache.tail) <= BOUND


@pytest.mark.parametrize("ranks, folds", [(3, 1), (4, 2), (8, 2), (5, 1)])
@pytest.mark.parametrize("gather", [True, False])
def test_entering_states(ranks, folds, gather):
    """The scan and the gather over ranks against a loop, for maps that do not shrink anything."""
    rng = np.random.default_rng(ranks)
    count = folds * ranks
    matrices, updates = rng.normal(size=(count, 1, 2, 4, 4)) / 2, rng.normal(size=(count, 1, 2, 4, 3))
    initial = rng.normal(size=(1, 2, 4, 3))
    expected, state = [], initial
    for matrix, update in zip(matrices, updates, strict=True):
        expected.append(state)
        state = matrix @ state + update
    layout = Contiguous() if folds == 1 else Zigzag()
    held = order(ContextParallel("context", layout=layout), count * 2, ranks)[::2] // 2
    context = context_of(ranks, layout)
    chunks = Chunks("context", ranks, folds, 2)
    local = lambda m, u, s: chunks.entering(m, u, s, gather=gather)  # noqa: E731
    specs = (jax.P("context"), jax.P("context"), jax.P())
    program = jit(jax.shard_map(local, mesh=context.mesh, in_specs=specs, out_specs=jax.P("context")))
    found = program(*(np.asarray(a, np.float32) for a in (matrices[held], updates[held], initial)))
    assert relative(found, np.stack(expected)[held]) <= BOUND


def test_errors():
    arrays = operands(0, 1, 48, 2, 4, 8, 4)
    zigzag = context_of(4, "zigzag")
    call = lambda context, way: gated_delta_rule(*arrays[:5], context=context, strategy=way)  # noqa: E731
    with pytest.raises(ValueError, match="layout Striped.*two-chunk Zigzag.*strategy='batch' or 'head'"):
        call(context_of(4, Striped()), "state")
    with pytest.raises(ValueError, match="4 context ranks.*got 2 key heads: use strategy='state'"):
        call(zigzag, "head")
    with pytest.raises(ValueError, match="unknown strategy 'heads'"):
        call(zigzag, "heads")
    with pytest.raises(ValueError, match="does not divide over batch_axis='data' of size 2"):
        call(context_of(4, "zigzag", "data"), "state")
    with pytest.raises(ValueError, match="length 44 does not divide.*next length that does is 48"):
        gated_delta_rule(*(x[:, :44] for x in arrays[:5]), context=zigzag, strategy="state")
    with pytest.raises(ValueError, match="pass shape=GDNShape"):
        run(lambda *x: x, None, arrays[0], context=zigzag, strategy="auto")
    with pytest.raises(ValueError, match="seq_len must be in .0, 48., got 49"):
        run(lambda _, x, c, s: (x, c), None, arrays[0], context=zigzag, strategy="batch", seq_len=49)
