"""The Hopper forward of the gated delta rule: lowered for CUDA and interpreted on the CPU, compared with the oracle on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ring_jax.gdn.chunked import chunked
from ring_jax.gdn.hopper import backend, launch
from ring_jax.gdn.hopper.config import SHARED_MEMORY_BYTES, ForwardConfig, forward_config
from ring_jax.gdn.segments import blank_padding
from ring_jax.mosaic import compat
from tests.gdn.helpers import numpy_rule, operands, relative
from tests.gdn.hopper.rounded import rounded_forward
from tests.support.hopper import on_hopper
from tests.support.marks import interpreted

WIDE = ForwardConfig(state_warpgroups=2, state_registers=200, scores_registers=88, pipelined=False)
NARROW = ForwardConfig(state_warpgroups=1, state_registers=240)
needs_kernel = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="the kernels of the gated delta rule need jax 0.11.2 or later"
)


def inputs(seed, batch, time, key_heads, heads, dk, dv, *, dtype=jnp.bfloat16, decay="qwen", beta=None, keys="random"):
    """query, key, value, log_decay, beta of the kernel's dtypes, and an initial state."""
    uniform = None if isinstance(decay, str) else decay
    *arrays, state = operands(seed, batch, time, key_heads, heads, dk, dv, "qwen" if uniform is not None else decay)
    q, k, v, g, b = (jnp.asarray(x, dtype if i < 3 else jnp.float32) for i, x in enumerate(arrays))
    if uniform is not None:
        g = jnp.full_like(g, uniform)
    if beta is not None:
        b = jnp.full_like(b, beta)
    if keys == "identical":
        k = jnp.broadcast_to(k[:, :1], k.shape)
    return [q, k, v, g, b], jnp.asarray(state)


def ids(time, *borders):
    """One row of segment ids, a new document at each border."""
    return np.searchsorted(np.asarray(borders), np.arange(time), side="right").astype(np.int32)


def oracle(arrays, state, segment_ids, scale):
    wide = blank_padding(segment_ids, *(x.astype(jnp.float32) for x in arrays))
    return chunked(*wide, scale=scale, initial_state=state, segment_ids=segment_ids)


def compare(arrays, state, segment_ids=None, *, config=None, pieces=None):
    """At most twice the error of the plain form that rounds at the same places."""
    scale = arrays[0].shape[-1] ** -0.5
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    options = dict(scale=scale, segment_ids=segment_ids)
    got = launch.forward(*arrays, initial_state=state, config=config, pieces=pieces, **options)
    given = jnp.zeros((arrays[2].shape[0], arrays[2].shape[2], arrays[1].shape[3], arrays[2].shape[3]), jnp.float32)
    state = given if state is None else state
    want = jax.jit(oracle, static_argnums=3)(arrays, state, segment_ids, scale)
    rounded = jax.jit(functools.partial(rounded_forward, scale=scale))(
        *arrays, initial_state=state, segment_ids=segment_ids
    )
    for found, other, expected in zip(got, rounded, want, strict=True):
        found, other, expected = (np.asarray(x.astype(jnp.float32)) for x in (found, other, expected))
        assert relative(found, expected) <= max(2 * relative(other, expected), 1e-4)
    if segment_ids is not None:
        assert not np.asarray(got[0].astype(jnp.float32))[np.asarray(segment_ids) < 0].any()
    return got


def lower(shape, dtype=jnp.bfloat16, *, initial=True, documents=False, function=launch.forward, **options):
    batch, time, key_heads, heads, dk, dv = shape
    struct = jax.ShapeDtypeStruct
    key, rows = struct((batch, time, key_heads, dk), dtype), struct((batch, time, heads), jnp.float32)
    arrays = [key, key, struct((batch, time, heads, dv), dtype), rows, rows]
    extra = {}
    if initial:
        extra["initial_state"] = struct((batch, heads, dk, dv), jnp.float32)
    if documents:
        extra["segment_ids"] = struct((batch, time), jnp.int32)
    call = jax.jit(functools.partial(function, scale=0.1, **options))
    with on_hopper():
        return call.trace(*arrays, **extra).lower(lowering_platforms=("cuda",)).as_text()


# Lowering for CUDA, on the CPU.


@needs_kernel
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 128, 2, 4, 128, 128), {"config": NARROW}),
        ((2, 100, 1, 3, 128, 128), {"config": WIDE, "documents": True, "dtype": jnp.float16}),
        ((1, 7, 1, 1, 64, 128), {"initial": False, "documents": True}),
        ((1, 65, 1, 2, 128, 64), {"pieces": 2, "initial": False}),
    ],
    ids=["narrow", "wide", "tiny", "pieces"],
)
def test_lowers(shape, options):
    assert lower(shape, **options).count("mosaic_gpu") >= 2


@needs_kernel
@pytest.mark.parametrize("check_vma", [True, False])
def test_lowers_inside_shard_map(check_vma):
    mesh = jax.make_mesh((2,), ("c",), devices=jax.devices("cpu")[:2], axis_types=(jax.sharding.AxisType.Auto,))
    struct, heads = jax.ShapeDtypeStruct, P(None, None, "c")
    key, rows = struct((1, 70, 2, 64), jnp.bfloat16), struct((1, 70, 4), jnp.float32)
    arrays = [key, key, struct((1, 70, 4, 64), jnp.bfloat16), rows, rows]

    def rule(*arrays):
        *arrays, state, segment_ids = arrays
        return backend.hopper(*arrays, scale=0.1, initial_state=state, segment_ids=segment_ids)

    state = P(None, "c")
    options = dict(mesh=mesh, in_specs=(*[heads] * 5, state, P()), out_specs=(heads, state), check_vma=check_vma)
    call = jax.jit(jax.shard_map(rule, **options))
    operands = *arrays, struct((1, 4, 64, 64), jnp.float32), struct((1, 70), jnp.int32)
    text = call.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 2


# Configs and refusals.


def test_configs_fit():
    for key_size in launch.SIZES:
        for value_size in launch.SIZES:
            for rows, chunks in ((1, 1), (1, 512), (8, 512), (66, 7), (500, 128)):
                config, pieces = forward_config(key_size, value_size, rows, chunks)
                assert 1 <= pieces <= chunks
                assert config.shared_memory_bytes(key_size) <= SHARED_MEMORY_BYTES
                assert value_size % config.value_columns == 0


@pytest.mark.parametrize(
    "change", [{"state_warpgroups": 3}, {"stages": 1}, {"state_registers": 100}, {"scores_registers": 240}]
)
def test_config_refuses(change):
    fields = dict(state_warpgroups=2, state_registers=200, scores_registers=88) | change
    with pytest.raises(ValueError, match=next(iter(change)) if "scores_registers" not in change else "registers"):
        ForwardConfig(**fields)


@needs_kernel
def test_unsupported_reasons():
    def reason(dtype=jnp.bfloat16, heads=(2, 4), sizes=(128, 128), time=8, **options):
        key = jax.ShapeDtypeStruct((1, time, heads[0], sizes[0]), dtype)
        return launch.unsupported_reason(
            key, key, jax.ShapeDtypeStruct((1, time, heads[1], sizes[1]), dtype), **options
        )

    assert reason(compute_capability="9.0") is None
    assert "Hopper" in reason(compute_capability="10.0")
    assert "bfloat16" in reason(jnp.float32)
    assert "multiple" in reason(heads=(2, 3))
    assert "head sizes" in reason(sizes=(96, 128))
    assert "empty" in reason(time=0)
    arrays, _ = inputs(0, 1, 8, 1, 1, 64, 64, dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match="bfloat16"):
        launch.forward(*arrays, scale=1.0)


# The plain form of the same rounding, and the kernels interpreted.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_rounded_form_is_as_exact_as_its_dtype(dtype):
    arrays, state = inputs(1, 1, 150, 1, 2, 32, 16, dtype=dtype)
    segment_ids = ids(150, 40, 128, 131)[None]
    segment_ids[:, 125:128] = -1
    blank = blank_padding(jnp.asarray(segment_ids), *arrays)
    exact = numpy_rule(*(x.astype(jnp.float32) for x in blank), state, segment_ids)
    got = rounded_forward(*arrays, scale=32**-0.5, initial_state=state, segment_ids=jnp.asarray(segment_ids))
    for found, expected in zip(got, exact, strict=True):
        assert relative(found.astype(jnp.float32), expected) < 2 * float(jnp.finfo(dtype).eps)


@interpreted
@needs_kernel
@pytest.mark.parametrize("documents", [pytest.param(False, marks=pytest.mark.slow), True])
def test_interpreted(documents):
    time = 150
    arrays, state = inputs(2, 1, time, 1, 2, 64, 64)
    segment_ids = None
    if documents:  # borders inside and on the edge of a chunk, padding that holds anything
        segment_ids = ids(time, 40, 128)[None]
        segment_ids[:, :3] = segment_ids[:, 145:] = -1
        arrays[1:3] = (jnp.where((segment_ids < 0)[..., None, None], jnp.nan, x) for x in arrays[1:3])
    with compat.interpret_mode():
        compare(arrays, state, segment_ids)


def test_config_cuts_sequences_where_multiprocessors_are_idle():
    assert forward_config(128, 128, 8, 512)[1] > 1
    assert [forward_config(128, 128, rows, 512)[1] for rows in (64, 128, 1000)] == [1, 1, 1]
    assert forward_config(128, 128, 1, 4)[1] == 1


@interpreted
@needs_kernel
@pytest.mark.slow
def test_interpreted_pieces():
    arrays, state = inputs(4, 1, 150, 1, 1, 64, 64)
    with compat.interpret_mode():
        compare(arrays, state, pieces=2)


@interpreted
@needs_kernel
@pytest.mark.slow
def test_interpreted_wide():
    arrays, state = inputs(3, 1, 70, 1, 1, 64, 128, dtype=jnp.float16, decay="mixed")
    with compat.interpret_mode():
        compare(arrays, None, config=WIDE)
