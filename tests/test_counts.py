"""Counts at the edge of int32 and beyond: "no limit" is a large number, known or traced, int32 or int64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_jax
from ring_jax.context.decode import attend_few
from tests.support import oracle

T = 8
EDGES = (2**31 - 2, 2**31 - 1, 2**31, 2**32, 2**32 + 3, 2**62)
# What each count is when it is a limit that no sequence reaches, and the plain mask that says the same.
UNLIMITED = {
    "window, right": (lambda n: ring_jax.window(3, n), lambda: ring_jax.window(3, None)),
    "window, left": (lambda n: ring_jax.causal() & ring_jax.window(n, 0), ring_jax.causal),
    "lengths, kv": (lambda n: ring_jax.lengths(kv=n), ring_jax.Mask),
    "lengths, q": (lambda n: ring_jax.causal() & ring_jax.lengths(q=n), ring_jax.causal),
    "lengths, left padding": (lambda n: ring_jax.lengths(left_padding=n), lambda: ring_jax.lengths(kv=0)),
    "prefix": (lambda n: ring_jax.prefix(n), ring_jax.Mask),
}


def bounds(mask, **options):
    return [np.asarray(x) for x in mask.interval(q_len=T, kv_len=T, **options)]


def visible(start, end):
    s = np.arange(T)
    return (s >= start[..., None]) & (s < end[..., None])


@pytest.mark.parametrize("name", UNLIMITED)
def test_counts_beyond_every_length(name):
    make, plain = UNLIMITED[name]
    want = visible(*bounds(plain()))
    for count in EDGES:
        np.testing.assert_array_equal(visible(*bounds(make(count))), want, err_msg=f"{count}")
        np.testing.assert_array_equal(visible(*bounds(make(np.int64(count)))), want, err_msg=f"int64 {count}")
    with jax.enable_x64(True):
        traced = jax.jit(lambda n: bounds_of(make(n)))
        for count in EDGES:
            np.testing.assert_array_equal(
                visible(*map(np.asarray, traced(np.int64(count)))), want, err_msg=f"traced {count}"
            )
    traced = jax.jit(lambda n: bounds_of(make(n)))
    np.testing.assert_array_equal(visible(*map(np.asarray, traced(np.int32(2**31 - 1)))), want)


def bounds_of(mask, **options):
    return mask.interval(q_len=T, kv_len=T, **options)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_offsets_beyond_every_key(dtype):
    """Queries far behind the keys: causal sees all of them, a window none."""
    with jax.enable_x64(dtype is np.int64):
        for offset in [n for n in EDGES if n <= np.iinfo(dtype).max]:
            for given in (np.asarray(offset, dtype), jnp.asarray(offset, dtype)):
                for run in (both_far_behind, jax.jit(both_far_behind)):
                    all_keys, none = run(given)
                    assert visible(*map(np.asarray, all_keys)).all()
                    assert not visible(*map(np.asarray, none)).any()


def both_far_behind(offset):
    return [bounds_of(mask, query_offset=offset) for mask in (ring_jax.causal(), ring_jax.window(5, 0))]


def test_attention_arguments():
    """The arguments of ring_attention and flash_attention that become such counts, against NumPy."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, T, 2, 8)).astype(np.float32)
    mesh = jax.make_mesh((1,), ("context",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    context = ring_jax.ContextParallel("context", mesh=mesh)
    causal = np.tril(np.ones((1, T, T), bool))
    every = np.ones((1, T, T), bool)
    calls = [
        ({"local_window_size": 2**32}, every),
        ({"local_window_size": (2**31 - 1, 2**31 - 1)}, every),
        ({"key_value_seq_lengths": np.array([2**32])}, every),
        ({"query_seq_lengths": np.array([2**40]), "is_causal": True}, causal),
        ({"query_offset": 2**31 - 1, "is_causal": True}, every),
        ({"query_offset": np.array([2**33]), "is_causal": True}, every),
    ]
    for options, seen in calls:
        found = ring_jax.ring_attention(q, k, v, context=context, scale=0.3, **options)
        oracle.assert_close({"out": found}, oracle.attention(q, k, v, seen, scale=0.3), 1e-6)
    start, end = np.zeros((1, T), np.int64), np.full((1, T), 2**32, np.int64)
    found = ring_jax.flash_attention(q, k, v, start, end, scale=0.3)[0]
    oracle.assert_close({"out": found}, oracle.attention(q, k, v, every, scale=0.3), 1e-6)
    with jax.enable_x64(True):
        found = jax.jit(lambda end: ring_jax.flash_attention(q, k, v, jnp.zeros_like(end), end, scale=0.3)[0])(end)
        few = attend_few(jnp.asarray(q), jnp.stack([k, v]), jnp.asarray([2**32]), scale=0.3)[0]
    for each in (found, few):
        oracle.assert_close({"out": each}, oracle.attention(q, k, v, every, scale=0.3), 1e-6)


def test_borders_and_ids():
    start, end = bounds(ring_jax.documents(cu_seqlens=np.array([0, 3, 2**40])))
    np.testing.assert_array_equal(start[0], [0] * 3 + [3] * 5)
    np.testing.assert_array_equal(end[0], [3] * 3 + [T] * 5)
    with pytest.raises(ValueError, match="fit into int32"):
        ring_jax.documents(segment_ids=np.array([0, 2**33]))
    ids = np.array([[2**33] * 3 + [2**34] * 5])  # the low 32 bits of both are zero
    with jax.enable_x64(True):
        start, end = jax.jit(lambda ids: bounds_of(ring_jax.documents(segment_ids=ids)))(ids)
    np.testing.assert_array_equal(start[0], [0] * 3 + [3] * 5)
    np.testing.assert_array_equal(end[0], [3] * 3 + [T] * 5)
