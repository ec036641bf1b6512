"""The Hopper forward with split operands: lowered for CUDA and interpreted on the CPU, compared with float64 on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.gdn import chunked
from ring_jax.gdn.hopper import split
from ring_jax.gdn.segments import blank_padding
from ring_jax.mosaic import compat
from tests.gdn.helpers import log_decays, numpy_rule, relative
from tests.gdn.hopper.test_forward import ids, inputs, lower, needs_kernel
from tests.gdn.hopper.test_gpu import draw, oracle
from tests.support.marks import interpreted

DTYPES = [jnp.bfloat16, jnp.float16]
kernel = jax.jit(split.forward, static_argnames="scale")


def compare(arrays, state, segment_ids=None, *, bound=8e-6):
    """Against the rule token by token in float64."""
    scale = arrays[0].shape[-1] ** -0.5
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    got = kernel(*arrays, scale=scale, initial_state=state, segment_ids=segment_ids)
    given = np.zeros((arrays[2].shape[0], arrays[2].shape[2], arrays[1].shape[3], arrays[2].shape[3]))
    blank = (np.asarray(x.astype(jnp.float32)) for x in blank_padding(segment_ids, *arrays))
    want = numpy_rule(*blank, given if state is None else np.asarray(state), segment_ids)
    for found, expected in zip(got, want, strict=True):
        assert relative(np.asarray(found), expected) <= bound
    return got


@needs_kernel
@pytest.mark.parametrize("documents", [True, False])
def test_lowers(documents):
    text = lower((1, 200, 2, 4, 128, 64), documents=documents, initial=not documents, function=split.forward)
    assert "gated_delta_split" in text


@interpreted
@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
def test_interpreted(dtype):
    """Borders inside and on the edge of a chunk, padding that holds anything; every part that is split matters here."""
    arrays, state = inputs(2, 1, 150, 1, 2, 64, 64, dtype=dtype)
    segment_ids = ids(150, 40, 128)[None]
    segment_ids[:, :3] = segment_ids[:, 145:] = -1
    arrays[1:3] = (jnp.where((segment_ids < 0)[..., None, None], jnp.nan, x) for x in arrays[1:3])
    with compat.interpret_mode():
        compare(arrays, state, segment_ids)


@interpreted
@needs_kernel
def test_gradients_are_those_of_the_chunked_form():
    arrays, state = inputs(3, 1, 70, 1, 2, 64, 64)
    cotangents = jnp.ones_like(arrays[2]), jnp.ones_like(state)
    options = {"scale": 0.1, "segment_ids": None}
    with compat.interpret_mode():
        pull = jax.vjp(lambda *x: split.split(*x[:5], initial_state=x[5], **options), *arrays, state)[1]
    want = jax.vjp(lambda *x: chunked.chunked(*x[:5], initial_state=x[5], **options), *arrays, state)[1]
    jax.tree.map(np.testing.assert_array_equal, pull(cotangents), want(cotangents))
    with compat.interpret_mode():
        pull = jax.vjp(lambda *x: split.split(*x, initial_state=None, **options), *arrays)[1]
    assert len(pull(cotangents)) == 5


def distance(found, expected):
    """Relative L2; where no float32 is left of what is expected, of a state that has decayed, zeros are right."""
    expected = np.where(np.abs(expected) < np.finfo(np.float32).tiny, 0.0, expected)
    return relative(found, expected)


def check_on_gpu(arrays, state, segment_ids=None, *, bound, together=None, initial=True):
    """Every row and head against float64; twice gives the same bits."""
    scale = arrays[0].shape[-1] ** -0.5
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    given = state if initial else None
    call = functools.partial(kernel, *arrays, scale=scale, initial_state=given, segment_ids=segment_ids)
    got = call()
    want = oracle(arrays, state if initial else jnp.zeros_like(state), segment_ids, scale)
    for found, expected, axis in zip(got, want, (2, 1), strict=True):
        found = np.asarray(found, np.float64)
        assert together is None or distance(found, expected) <= together
        for row, head in np.ndindex(found.shape[0], found.shape[axis]):
            ours, exact = (np.take(x[row], head, axis - 1) for x in (found, expected))
            assert distance(ours, exact) <= bound(row, head), (row, head)
    jax.tree.map(np.testing.assert_array_equal, got, call())


@pytest.mark.gpu
@pytest.mark.parametrize("time", [1, 7, 63, 65, 1000, 4097])
def test_gpu_lengths(time):
    """All together 8e-6, as two parts of 8 bits allow; of a few numbers alone a little more."""
    _, state, arrays = draw(time, 1 + time % 5, time, 2, 4)
    check_on_gpu(arrays(), state, bound=lambda row, head: 1e-5, together=8e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
def test_gpu_decays_strengths_and_keys(dtype):
    """As `test_gpu.test_decays_strengths_and_keys`, without unnormalised keys."""
    raw, state, arrays = draw(5, 5, 901, 2, 6, dtype=dtype)
    _, key, _, decay, beta = raw
    decay[0], decay[1], decay[2] = 0.0, -15.0, -80.0
    decay[3] = log_decays("mixed", decay[3:4].shape, np.random.default_rng(0))[0]
    key[:, :, 1] = key[:, :1, 1]
    beta[..., 0::3], beta[..., 1::3] = 0.0, 1.0
    check_on_gpu(arrays(), state, bound=lambda row, head: 5e-5 if head >= 3 else 1e-5 if row == 0 else 8e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("sizes", [(128, 128), (64, 128), (128, 64)])
def test_gpu_documents_and_padding(dtype, sizes):
    time = 701
    raw, state, arrays = draw(8, 3, time, 1, 2, *sizes, dtype=dtype, decay="mixed")
    segment_ids = np.stack([ids(time, *each) for each in [(1, 2, 64, 100, 101, 640), (63, 65, 127, 191), ()]])
    segment_ids[0, 120:140] = segment_ids[1, :70] = segment_ids[1, 650:] = segment_ids[2] = -1
    for x in raw:
        x[segment_ids < 0] = np.nan
    check_on_gpu(arrays(), state, segment_ids, bound=lambda row, head: 8e-6, initial=sizes[0] == 64)
