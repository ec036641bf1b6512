"""The Hopper backward of the gated delta rule: lowered for CUDA and interpreted on the CPU, compared with the oracle on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ring_jax.gdn import gated_delta_rule
from ring_jax.gdn.chunked import chunked
from ring_jax.gdn.hopper import backend, backward_launch
from ring_jax.gdn.reference import reference
from ring_jax.gdn.segments import blank_padding
from ring_jax.mosaic import compat
from tests.gdn.helpers import check_gradients, jit, operands, relative
from tests.gdn.hopper.rounded_backward import rounded_backward
from tests.gdn.hopper.test_forward import ids, inputs, needs_kernel
from tests.support.hopper import lower
from tests.support.marks import interpreted

NAMES = ("query", "key", "value", "log_decay", "beta", "state")


def cotangents(arrays, state, seed=1):
    rng = np.random.default_rng(seed)
    shapes = (arrays[2].shape, arrays[2].dtype), (state.shape, state.dtype)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape, dtype in shapes)


def exact(rule, operands, cotangents, *, scale, initial_state, segment_ids):
    """Autodiff of a rule in the width of what is given."""

    def run(*operands_and_state):
        *operands, state = operands_and_state
        operands = blank_padding(segment_ids, *operands)
        return rule(*operands, scale=scale, initial_state=state, segment_ids=segment_ids)

    return jax.vjp(run, *operands, initial_state)[1](cotangents)


def distance(name, found, expected, strengths):
    """Relative L2; of log decays against 1e-9 of the gradient of strengths where that is larger: with decays of -80
    nothing is left of it in float32."""
    if name != "log_decay":
        return relative(found, expected)
    norm = max(np.linalg.norm(expected), 1e-9 * np.linalg.norm(strengths))
    return np.linalg.norm(np.float64(found) - expected) / norm if norm else 0.0


def compare(arrays, state, segment_ids=None):
    """At most twice the error of the plain form that rounds at the same places."""
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    given = cotangents(arrays, state)
    if segment_ids is not None:  # what comes in on padding does not matter
        hidden = (segment_ids < 0)[..., None, None]
        given = jnp.where(hidden, jnp.nan, given[0]), given[1]
    options = dict(scale=arrays[0].shape[-1] ** -0.5)
    traced = dict(initial_state=state, segment_ids=segment_ids)
    got = jax.jit(functools.partial(backward_launch.backward, **options))(arrays, given, **traced)
    rounded = jax.jit(functools.partial(rounded_backward, **options))(arrays, given, **traced)
    wide = [x.astype(jnp.float32) for x in arrays]
    given = blank_padding(segment_ids, given[0].astype(jnp.float32))[0], given[1]
    want = jax.jit(functools.partial(exact, chunked, **options))(wide, given, **traced)
    got, rounded, want = ([np.asarray(x.astype(jnp.float32)) for x in xs] for xs in (got, rounded, want))
    for name, found, other, expected in zip(NAMES, got, rounded, want, strict=True):
        error, allowed = (distance(name, x, expected, want[4]) for x in (found, other))
        assert error <= max(2 * allowed, 1e-4), f"d{name}: {error}, rounded {allowed}"
    return got


# The formulas, in float64, where the plain form rounds nothing.


def _formulas(implementation, arrays, given, segment_ids):
    return implementation(arrays[:5], given, scale=0.3, initial_state=arrays[5], segment_ids=segment_ids)


@pytest.mark.parametrize(("decay", "beta"), [("qwen", None), ("mixed", 0.0), ("none", 1.0)])
def test_formulas(decay, beta):
    arrays = operands(0, 2, 70, 1, 2, 16, 8, decay, np.float64)
    if beta is not None:
        arrays[4][...] = beta
    segment_ids = np.stack([ids(70, 40, 64, 65), ids(70)])
    segment_ids[0, 50:53] = segment_ids[1, :3] = segment_ids[1, 66:] = -1
    with jax.enable_x64(True):
        arrays, segment_ids = [jnp.asarray(x) for x in arrays], jnp.asarray(segment_ids)
        given = cotangents(arrays[:5], arrays[5])
        got = _jitted_rounded(arrays, given, segment_ids)
        want = _jitted_reference(arrays, given, segment_ids)
        check_gradients(got, jax.tree.map(np.asarray, want), bound=1e-13)


_jitted_rounded = jit(functools.partial(_formulas, rounded_backward))
_jitted_reference = jit(functools.partial(_formulas, functools.partial(exact, reference)))


# Lowering for CUDA, on the CPU.


def structs(shape, dtype=jnp.bfloat16):
    batch, time, key_heads, heads, dk, dv = shape
    struct = jax.ShapeDtypeStruct
    key, rows = struct((batch, time, key_heads, dk), dtype), struct((batch, time, heads), jnp.float32)
    state = struct((batch, heads, dk, dv), jnp.float32)
    return key, key, struct((batch, time, heads, dv), dtype), rows, rows, state, struct((batch, time), jnp.int32)


def loss(*arrays):
    *arrays, state, segment_ids = arrays
    out, state = backend.hopper(*arrays, scale=0.1, initial_state=state, segment_ids=segment_ids)
    return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(state)


gradients = jax.grad(loss, argnums=tuple(range(6)))


KERNELS = ("gated_delta_prepare", "gated_delta_recurrences", "gated_delta_gradients")


@needs_kernel
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 128, 2, 4, 128, 128), jnp.bfloat16),
        ((2, 100, 1, 3, 64, 128), jnp.float16),
        ((1, 7, 1, 1, 128, 64), jnp.bfloat16),
    ],
    ids=["128", "grouped", "tiny"],
)
def test_lowers(shape, dtype):
    text = lower(gradients, *structs(shape, dtype)).as_text()
    assert all(name in text for name in KERNELS)


@needs_kernel
@pytest.mark.parametrize("transform", ["remat", "scan", "vmap"])
def test_lowers_under(transform):
    arrays = structs((1, 70, 1, 2, 64, 64))
    if transform == "remat":
        text = lower(jax.grad(jax.checkpoint(loss), argnums=(0, 5)), *arrays).as_text()
    elif transform == "vmap":
        mapped = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in arrays]
        text = lower(jax.vmap(gradients), *mapped).as_text()
    else:

        def repeated(query, *others):
            def body(query, _):
                return jax.grad(loss)(query, *others), None

            return jax.lax.scan(body, query, length=2)[0]

        text = lower(repeated, *arrays).as_text()
    # Forward and backward have two and three kernels; those that are mapped over have lost their names.
    assert text.count("custom_call @mosaic_gpu") == 5


@needs_kernel
@pytest.mark.parametrize("check_vma", [True, False])
def test_lowers_inside_shard_map(check_vma):
    """Heads over ranks; with types over mesh axes also a state that all ranks share, whose gradient is their sum."""
    mesh = jax.make_mesh((2,), ("c",), devices=jax.devices("cpu")[:2], axis_types=(jax.sharding.AxisType.Auto,))
    arrays = list(structs((1, 70, 2, 4, 64, 64)))
    heads, state = P(None, None, "c"), P(None, "c")
    if check_vma:
        state, arrays[5] = P(), jax.ShapeDtypeStruct((1, 2, 64, 64), jnp.float32)
    options = dict(mesh=mesh, in_specs=(*[heads] * 5, state, P()), out_specs=(*[heads] * 5, state), check_vma=check_vma)

    def local(*arrays):
        total = (lambda x: jax.lax.psum(x, "c")) if check_vma else (lambda x: x)
        return jax.grad(lambda *xs: total(loss(*xs)), argnums=tuple(range(6)))(*arrays)

    call = jax.jit(jax.shard_map(local, **options))
    text = call.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert all(name in text for name in KERNELS)


# The kernels interpreted.


@interpreted
@needs_kernel
@pytest.mark.parametrize(
    ("documents", "sizes", "decay"),
    [
        (True, (64, 64), "mixed"),
        pytest.param(False, (64, 64), "fast", marks=pytest.mark.slow),
        pytest.param(True, (128, 64), "qwen", marks=pytest.mark.slow),
        pytest.param(False, (64, 128), "qwen", marks=pytest.mark.slow),
    ],
)
def test_interpreted(documents, sizes, decay):
    """Against the plain form, which is exact in float32, at most half as wrong again as where it rounds as the kernels do."""
    time, segment_ids = 100, None
    arrays, state = inputs(2, 1, time, 1, 2, *sizes, decay=decay)
    given = cotangents(arrays, state)
    if documents:  # borders inside and on the edge of a chunk, padding that holds anything
        segment_ids = ids(time, 40, 64)[None]
        segment_ids[:, :3] = segment_ids[:, 95:] = -1
        hidden = (segment_ids < 0)[..., None, None]
        arrays[1:3] = (jnp.where(hidden, jnp.nan, x) for x in arrays[1:3])
        given = jnp.where(hidden, jnp.nan, given[0]), given[1]
        segment_ids = jnp.asarray(segment_ids)
    options = dict(scale=0.1, initial_state=state, segment_ids=segment_ids)
    with compat.interpret_mode():
        got = backward_launch.backward(arrays, given, **options)
        got = [np.asarray(x.astype(jnp.float32)) for x in got]
    plain = jax.jit(functools.partial(rounded_backward, **options))
    rounded = plain(arrays, given)
    want = plain([x.astype(jnp.float32) for x in arrays], (given[0].astype(jnp.float32), given[1]))
    for name, found, other, expected in zip(NAMES, got, rounded, want, strict=True):
        error, allowed = (relative(x, expected) for x in (found, other.astype(jnp.float32)))
        assert error <= 1.5 * allowed, name


@interpreted
@needs_kernel
@pytest.mark.slow
@pytest.mark.parametrize("initial", [False, True])
def test_gradients_of_the_backend(initial):
    arrays, state = inputs(13, 1, 70, 1, 1, 64, 64)
    segment_ids = jnp.asarray(ids(70, 30)[None])

    def loss(rule, arrays, state):
        out, final = rule(*arrays, scale=0.1, initial_state=state, segment_ids=segment_ids)
        return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(final**2)

    state = state if initial else None
    with compat.interpret_mode():
        got = jax.grad(functools.partial(loss, backend.hopper), argnums=(0, 1))(arrays, state)
    start = jnp.zeros((1, 1, 64, 64), jnp.float32) if state is None else state
    want = jax.grad(functools.partial(loss, chunked), argnums=(0, 1))(arrays, start)
    want = want if initial else (want[0], None)
    # The cotangents come from outputs that are rounded differently.
    for found, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert found.dtype == expected.dtype
        assert relative(found.astype(jnp.float32), expected.astype(jnp.float32)) < 1e-2


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("time", [1, 2, 7, 63, 64, 65, 129, 1000, 4097])
def test_gpu_lengths(time):
    compare(*inputs(time, 1 + time % 5, time, 2, 4, 128, 128))


@pytest.mark.gpu
@pytest.mark.parametrize("decay", [0.0, -15.0, -80.0, "mixed"])
@pytest.mark.parametrize("beta", [0.0, 1.0, None])
def test_gpu_decays_and_strengths(decay, beta):
    compare(*inputs(5, 2, 777, 1, 2, 128, 128, decay=decay, beta=beta))


@pytest.mark.gpu
@pytest.mark.parametrize("decay", [0.0, "qwen"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_gpu_identical_keys(decay, dtype):
    compare(*inputs(6, 1, 500, 1, 2, 128, 128, decay=decay, beta=1.0, keys="identical", dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("border", [63, 64, 65, 127, 128, 129, 191])
def test_gpu_borders(border):
    compare(*inputs(7, 1, 300, 1, 2, 128, 128, decay="mixed"), ids(300, border)[None])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("sizes", [(128, 128), (64, 64), (64, 128), (128, 64)])
def test_gpu_documents_and_padding(sizes, dtype):
    """Many borders, padding on both sides and between that holds NaN, and an initial state that only the first one sees."""
    time = 901
    arrays, state = inputs(8, 3, time, 2, 6, *sizes, dtype=dtype)
    segment_ids = np.stack([ids(time, 1, 2, 64, 100, 101, 640), ids(time), ids(time, 17, 850)])
    segment_ids[0, 120:140] = segment_ids[1, :70] = segment_ids[1, 800:] = segment_ids[2, 900:] = -1
    hidden = jnp.asarray(segment_ids < 0)
    arrays = [jnp.where(hidden.reshape(hidden.shape + (1,) * (x.ndim - 2)), jnp.nan, x) for x in arrays]
    for name, found in zip(NAMES[:5], compare(arrays, state, segment_ids), strict=False):
        assert not found[np.asarray(hidden)].any(), name


@pytest.mark.gpu
def test_gpu_repeats_bit_by_bit():
    arrays, state = inputs(9, 2, 3001, 4, 8, 128, 128)
    given = cotangents(arrays, state)
    call = jax.jit(functools.partial(backward_launch.backward, scale=0.1, segment_ids=None))
    first, *others = (call(arrays, given, initial_state=state) for _ in range(4))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


@pytest.mark.gpu
def test_gpu_public_call():
    """Forward and backward through `gated_delta_rule`, under jit and remat, which picks the kernels by itself."""
    arrays, state = inputs(11, 2, 300, 1, 2, 128, 128)
    weights = cotangents(arrays, state)

    def loss(arrays, state, implementation):
        rule = jax.checkpoint(functools.partial(gated_delta_rule, implementation=implementation))
        out, state = rule(*arrays, initial_state=state)
        return jnp.vdot(out.astype(jnp.float32), weights[0].astype(jnp.float32)) + jnp.vdot(state, weights[1])

    call = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    assert "gated_delta_gradients" in call.lower(arrays, state, None).as_text()
    for found, expected in zip(*(jax.tree.leaves(call(arrays, state, x)) for x in (None, "chunked")), strict=True):
        assert relative(found.astype(jnp.float32), expected.astype(jnp.float32)) < 1e-2
