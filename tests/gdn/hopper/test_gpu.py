"""The Hopper forward of the gated delta rule on a GPU, against float64: many cases as rows and heads of few compiled programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.gdn.hopper import launch
from ring_jax.gdn.reference import reference
from ring_jax.gdn.segments import blank_padding
from tests.gdn.helpers import log_decays, relative
from tests.gdn.hopper.rounded import rounded_forward
from tests.gdn.hopper.test_forward import NARROW, WIDE, ids

pytestmark = pytest.mark.gpu
DTYPES = [jnp.bfloat16, jnp.float16]
kernel = jax.jit(launch.forward, static_argnames=("scale", "config", "pieces"))
rounded = jax.jit(rounded_forward, static_argnames=("scale",))
transition = jax.jit(launch.transition)


@functools.partial(jax.jit, static_argnames=("scale",))
def _oracle(arrays, state, segment_ids, scale):
    blank = blank_padding(segment_ids, *arrays)
    return reference(*blank, scale=scale, initial_state=state, segment_ids=segment_ids)


def oracle(arrays, state, segment_ids, scale):
    with jax.enable_x64(True):
        wide = [np.asarray(x.astype(jnp.float32), np.float64) for x in (*arrays, state)]
        return [np.asarray(x) for x in _oracle(wide[:-1], wide[-1], segment_ids, scale)]


def draw(seed, batch, time, key_heads, heads, dk=128, dv=128, dtype=jnp.bfloat16, decay="qwen"):
    """query, key (of unit length), value, log_decay, beta and an initial state, as NumPy but for the rounding."""
    rng = np.random.default_rng(seed)
    query, key = rng.normal(size=(2, batch, time, key_heads, dk))
    query, key = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    value, per_head = rng.normal(size=(batch, time, heads, dv)), (batch, time, heads)
    beta = 1 / (1 + np.exp(-rng.normal(size=per_head)))
    arrays = [query, key, value, log_decays(decay, per_head, rng), beta]
    state = jnp.asarray(rng.normal(size=(batch, heads, dk, dv)), jnp.float32)
    return arrays, state, lambda: [jnp.asarray(x, dtype if i < 3 else jnp.float32) for i, x in enumerate(arrays)]


def compare(arrays, state, segment_ids=None, *, initial=True, **options):
    """Every row and head: at most twice the error of the plain form that rounds at the same places."""
    scale = arrays[0].shape[-1] ** -0.5
    given = state if initial else None
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    got = kernel(*arrays, initial_state=given, segment_ids=segment_ids, scale=scale, **options)
    state = state if initial else jnp.zeros_like(state)
    want = oracle(arrays, state, segment_ids, scale)
    same = rounded(*arrays, initial_state=state, segment_ids=segment_ids, scale=scale)
    for found, other, expected, axis in zip(got, same, want, (2, 1), strict=True):
        found, other = (np.asarray(x.astype(jnp.float32), np.float64) for x in (found, other))
        assert np.isfinite(found).all()
        for row, head in np.ndindex(found.shape[0], found.shape[axis]):
            ours, theirs, exact = (np.take(x[row], head, axis - 1) for x in (found, other, expected))
            assert relative(ours, exact) <= max(2 * relative(theirs, exact), 1e-4), (row, head)
    if segment_ids is not None:
        assert not np.asarray(got[0].astype(jnp.float32))[np.asarray(segment_ids) < 0].any()
    return got


@pytest.mark.parametrize(
    ("time", "config"), [(1, None), (7, WIDE), (63, NARROW), (65, WIDE), (1000, NARROW), (4097, WIDE)]
)
def test_lengths(time, config):
    _, state, arrays = draw(time, 1 + time % 5, time, 2, 4)
    compare(arrays(), state, config=config)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
def test_decays_strengths_and_keys(dtype):
    """Rows: decays 0, -15, -80, mixed, those of trained models. Key heads: drawn, identical, unnormalised. Value heads of each:
    strengths 0, 1 and drawn (of unnormalised keys as far as the rule is stable)."""
    raw, state, arrays = draw(5, 5, 901, 3, 9, dtype=dtype)
    _, key, _, decay, beta = raw
    decay[0], decay[1], decay[2] = 0.0, -15.0, -80.0
    decay[3] = log_decays("mixed", decay[3:4].shape, np.random.default_rng(0))[0]
    key[:, :, 1] = key[:, :1, 1]
    key[:, :, 2] *= 3.0
    beta[..., 0::3], beta[..., 1::3] = 0.0, 1.0
    beta[..., 6:] *= 0.2  # below 2 / |key|^2
    compare(arrays(), state)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
def test_documents_and_padding(dtype):
    """Borders on, before and after edges of chunks, one-token documents, padding on all sides that holds NaN, a row of nothing
    else; the initial state is seen by the first document alone."""
    time = 901
    raw, state, arrays = draw(8, 5, time, 1, 2, dtype=dtype, decay="mixed")
    borders = [(1, 2, 64, 100, 101, 640), (), (63, 65, 127, 191), (17, 128, 129, 850), ()]
    segment_ids = np.stack([ids(time, *each) for each in borders])
    segment_ids[0, 120:140] = segment_ids[1, :70] = segment_ids[1, 800:] = segment_ids[3, 900:] = segment_ids[4] = -1
    for x in raw:
        x[segment_ids < 0] = np.nan
    compare(arrays(), state, segment_ids)
    compare(arrays(), state, segment_ids, initial=False)


@pytest.mark.parametrize("sizes", [(64, 64), (64, 128), (128, 64)])
def test_head_sizes(sizes):
    _, state, arrays = draw(9, 2, 333, 2, 6, *sizes)
    segment_ids = np.stack([ids(333, 65), np.zeros(333, np.int32)])
    segment_ids[1, 300:] = -1
    compare(arrays(), state, segment_ids)


@pytest.mark.parametrize(("pieces", "config"), [(3, WIDE), (16, NARROW)])
def test_pieces(pieces, config):
    """Borders on, before and after those of pieces, and piece by piece nearly none of the decay that would hide errors."""
    time = 2000
    raw, state, arrays = draw(11, 2, time, 1, 2)
    raw[3][:] = -1e-3
    segment_ids = np.stack([ids(time, 447, 448, 449, 1024), np.zeros(time, np.int32)])
    segment_ids[1, 1500:] = -1
    compare(arrays(), state, segment_ids, config=config, pieces=pieces)
    segment_ids[:] = 0
    compare(arrays(), state, segment_ids, config=config, pieces=pieces)


@pytest.mark.parametrize("sizes", [(128, 128), (64, 128)])
def test_transition(sizes):
    """A state that is sent through M and B is as exact as one that went through the chunks."""
    raw, state, arrays = draw(12, 2, 1000, 1, 2, *sizes)
    raw[3][:] = -1e-3
    segment_ids = jnp.asarray(np.stack([ids(1000), ids(1000, 500)]))
    arrays = arrays()
    m, b = transition(*arrays[1:], segment_ids)
    assert not np.asarray(m)[1].any()
    sent = np.einsum("bnij,bnjv->bniv", *(np.asarray(x, np.float64) for x in (m, state))) + np.asarray(b, np.float64)
    want = oracle(arrays, state, segment_ids, 1.0)[1]
    _, same = rounded(*arrays, scale=1.0, initial_state=state, segment_ids=segment_ids)
    assert relative(sent, want) <= 2 * relative(same, want)


@pytest.mark.parametrize("config", [NARROW, WIDE], ids=["narrow", "wide"])
def test_repeats_bit_by_bit(config):
    _, state, arrays = draw(13, 2, 3001, 4, 8)
    arrays = arrays()
    first, *others = (kernel(*arrays, scale=0.1, initial_state=state, config=config) for _ in range(4))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


def test_in_two_calls():
    """The state that one call leaves continues in the next, and nothing of it comes from memory that was there before."""
    _, state, arrays = draw(10, 1, 512, 1, 2)
    arrays = arrays()
    out, final = kernel(*arrays, scale=0.1, initial_state=state)
    first, middle = kernel(*(x[:, :256] for x in arrays), scale=0.1, initial_state=state)
    second, last = kernel(*(x[:, 256:] for x in arrays), scale=0.1, initial_state=middle)
    np.testing.assert_array_equal(out, jnp.concatenate([first, second], axis=1))
    np.testing.assert_array_equal(final, last)
