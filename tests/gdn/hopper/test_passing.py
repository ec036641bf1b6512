"""States and their gradients that pass between chunks by the Hopper kernels: the algebra over ranks on CPUs, the kernels on GPUs."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_jax
from ring_jax.gdn import gated_delta_rule, state_passing
from ring_jax.gdn.chunked import chunked, transition
from ring_jax.gdn.hopper import backward_launch, passing
from ring_jax.gdn.state_scan import Chunks
from ring_jax.mosaic import compat
from tests.gdn.helpers import GRADIENT_BOUND, jit, relative
from tests.gdn.hopper.test_forward import inputs, needs_kernel
from tests.gdn.test_sharded import context_of, documents, order
from tests.support.hopper import on_hopper
from tests.support.marks import interpreted


def in_xla(prepared, initial, last):
    """Gradients of operands and state, by the form in XLA."""
    operands, out_gradient, scale, ids = prepared

    def rule(operands, state):
        return chunked(*operands, scale=scale, initial_state=state, segment_ids=ids)

    found, state = jax.vjp(rule, operands, initial)[1]((out_gradient, last))
    return *found, state


def of_entering(prepared):
    _, key, value, *_ = prepared[0]
    nothing = jnp.zeros_like(key, shape=(key.shape[0], value.shape[2], key.shape[3], value.shape[3]))
    return in_xla(prepared, nothing, nothing)[-1]


@pytest.fixture
def kernels_in_xla(monkeypatch):
    """What the kernels compute, in float32 anywhere."""
    jax.clear_caches()
    monkeypatch.setattr(state_passing, "select", lambda *_: SimpleNamespace(name="mosaic"))
    monkeypatch.setattr(passing, "launch", SimpleNamespace(transition=transition, forward=chunked))
    prepare = lambda operands, gradient, *, scale, segment_ids: (operands, gradient, scale, segment_ids)  # noqa: E731
    stand_in = SimpleNamespace(prepare=prepare, entering_gradient=of_entering, gradients=in_xla)
    monkeypatch.setattr(passing, "backward_launch", stand_in)
    yield
    jax.clear_caches()


def check(rule, whole, time, ids, with_state, bound, dtype=jnp.float32, places=None, heads=(2, 4), size=8):
    """Results and gradients of `rule` on a laid-out sequence against `whole` in float64 (float32 inputs) in natural order."""
    arrays, state = inputs(3, 2, time, *heads, size, size, dtype=dtype)
    state, rng = state if with_state else None, np.random.default_rng(4)
    given = [jnp.asarray(rng.normal(size=x), jnp.float32) for x in (arrays[2].shape, (2, heads[1], size, size))]
    places = np.arange(time) if places is None else places
    laid = [x[:, places] for x in arrays]

    def loss(rule, out_given, ids, arrays, state):
        out, last = rule(*arrays, initial_state=state, segment_ids=ids)
        pairs = (out, out_given), (last, given[1])
        return sum(jnp.vdot(x.astype(last.dtype), y.astype(last.dtype)) for x, y in pairs), (out, last)

    argnums = (2, 3) if with_state else 2
    gradient = lambda rule: jit(jax.grad(functools.partial(loss, rule), argnums, has_aux=True))  # noqa: E731
    found = gradient(rule)(given[0][:, places], None if ids is None else ids[:, places], laid, state)
    with jax.enable_x64(dtype == jnp.float32):
        wide = jnp.float64 if dtype == jnp.float32 else jnp.float32
        arrays, state = jax.tree.map(lambda x: np.asarray(x, wide), (arrays, state))
        expected = gradient(whole)(given[0], ids, arrays, state)
    (found, results), (expected, wanted) = found, expected
    found, expected = ([*x[0], x[1]] if with_state else x for x in (found, expected))
    back = np.argsort(places)
    for a, b in zip([results[0], *found[:5]], [wanted[0], *expected[:5]], strict=True):
        assert relative(np.asarray(a, np.float64)[:, back], np.asarray(b)) < bound
    for a, b in zip([results[1], *found[5:]], [wanted[1], *expected[5:]], strict=True):
        assert relative(a, b) < bound


@pytest.mark.parametrize(
    ("ranks", "layout", "pattern", "with_state"),
    [
        (2, "zigzag", None, True),
        (3, "contiguous", "borders", True),
        (8, "zigzag", "padded", False),
        (8, "contiguous", None, True),
    ],
)
def test_gradients_over_ranks(ranks, layout, pattern, with_state, kernels_in_xla):
    """By gather and by scan; a chunk whose state goes nowhere; no state before the sequence."""
    context, time = context_of(ranks, layout), 16 * ranks
    ids = None if pattern is None else documents(pattern, 2, time, ranks)[0]
    spread = functools.partial(gated_delta_rule, context=context, strategy="state")
    whole = functools.partial(gated_delta_rule, implementation="reference")
    check(spread, whole, time, ids, with_state, GRADIENT_BOUND, places=order(context, time, ranks))


@interpreted
@needs_kernel
def test_gradient_of_the_entering_state_alone():
    """As the whole backward gives it, where nothing follows."""
    arrays, state = inputs(2, 1, 130, 1, 2, 64, 64)
    rng = np.random.default_rng(1)
    out = jnp.asarray(rng.normal(size=arrays[2].shape), arrays[2].dtype)

    def both(arrays, out, state):
        prepared = backward_launch.prepare(arrays, out, scale=0.1, segment_ids=None)
        whole = backward_launch.gradients(prepared, state, jnp.zeros_like(state))
        return backward_launch.entering_gradient(prepared), whole[-1]

    with compat.interpret_mode():
        found, expected = jax.jit(both)(arrays, out, state)
    np.testing.assert_array_equal(found, expected)


@needs_kernel
def test_all_of_it_lowers_to_kernels():
    """Forward and backward over ranks: preparation, transition, rule, one recurrence, two of them, gradients."""
    shapes = [jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)] * 2
    shapes += [jax.ShapeDtypeStruct((1, 1024, 4, 64), jnp.bfloat16)]
    shapes += [jax.ShapeDtypeStruct((1, 1024, 4), jnp.float32)] * 2
    with on_hopper(2, "context"):
        context = ring_jax.ContextParallel("context", layout="zigzag", mesh=jax.sharding.get_abstract_mesh())
        rule = functools.partial(gated_delta_rule, context=context, strategy="state")
        loss = lambda *x: rule(*x)[0].astype(jnp.float32).sum()  # noqa: E731
        text = jax.jit(jax.grad(loss, argnums=range(5))).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 6
    assert "stablehlo.while" not in text


class _Here(Chunks):
    """All chunks of a sequence on one rank."""

    def entering(self, transition, update, initial, gather=None, joins=None):
        states = [jnp.zeros_like(update[0]) if initial is None else initial]
        for m, b in zip(transition[:-1], update[:-1], strict=True):
            states.append(jnp.einsum("bnij,bnjv->bniv", m, states[-1], precision="highest") + b)
        return jnp.stack(states)

    def of_last(self, x):
        return x[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("folds", [1, 2, 3])
def test_gpu_chunks_on_one_rank(folds, with_state):
    """As exact as the kernels on the whole sequence, within their roundings."""
    chunks = _Here("none", 1, folds, 320)

    def by_chunks(*arrays, initial_state, segment_ids):
        rows = [x.reshape(-1, *x.shape[2:]) for x in map(chunks.split, arrays)]
        out, state = passing.passing(chunks, 64**-0.5, rows, segment_ids, initial_state, None)
        return chunks.join(out.reshape(folds, -1, *out.shape[1:])), state

    whole = functools.partial(gated_delta_rule, implementation="chunked")
    check(by_chunks, whole, folds * 320, None, with_state, 1e-2, dtype=jnp.bfloat16, size=64)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("pattern", [None, "borders", "padded"])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_gpu_over_two_ranks(layout, pattern):
    mesh = jax.make_mesh((2,), ("context",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    context, time = ring_jax.ContextParallel("context", layout=layout, mesh=mesh), 1024
    ids = None if pattern is None else documents(pattern, 2, time, 2)[0]
    spread = functools.partial(gated_delta_rule, context=context, strategy="state", implementation="mosaic")
    whole = functools.partial(gated_delta_rule, implementation="chunked")
    check(spread, whole, time, ids, True, 1e-2, dtype=jnp.bfloat16, places=order(context, time, 2), size=64)
