import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ring_jax
from ring_jax import Mask, causal, documents, lengths, prefix, window
from tests.support.masks import B, S, cases


def dense(start, end, length):
    s = np.arange(length)
    return (s >= np.asarray(start)[..., None]) & (s < np.asarray(end)[..., None])


def assert_contract(start, end, kv_len):
    start, end = np.asarray(start), np.asarray(end)
    assert start.dtype == end.dtype == np.int32 and start.shape == end.shape
    assert np.all(0 <= start) and np.all(start <= end) and np.all(end <= kv_len)
    assert np.all(np.diff(start, axis=-1) >= 0) and np.all(np.diff(end, axis=-1) >= 0), "bounds must be monotone"


@pytest.mark.parametrize("name", cases())
def test_interval_equals_dense_definition(name):
    mask, visible = cases()[name]
    start, end = mask.interval(q_len=S, kv_len=S)
    assert_contract(start, end, S)
    np.testing.assert_array_equal(np.broadcast_to(dense(start, end, S), (B, S, S)), visible)


@pytest.mark.parametrize("name", cases())
def test_masks_are_pytrees_and_padding_sees_nothing(name):
    mask, visible = cases()[name]
    index = jnp.arange(S + 7, dtype=jnp.int32)
    start, end = jax.jit(lambda m, i: m.interval(i, q_len=S, kv_len=S))(mask, index)
    assert_contract(start, end, S)
    np.testing.assert_array_equal(np.broadcast_to(dense(start, end, S), (B, S + 7, S))[:, :S], visible)
    np.testing.assert_array_equal(start[:, S:], end[:, S:])


def part():
    small = st.integers(0, 12)
    return st.one_of(
        st.just(causal()),
        st.builds(window, st.none() | small, st.none() | small),
        st.lists(small, min_size=4, max_size=4).map(lambda sizes: documents(cu_seqlens=np.cumsum([0, *sizes]))),
        st.lists(st.integers(0, 21), min_size=3, max_size=3).map(
            lambda cuts: documents(segment_ids=(2 - np.searchsorted(np.sort(cuts), np.arange(21), "right")))
        ),
        st.builds(lambda q, kv, left: lengths(q, kv, left_padding=left), small, small, small),
    )


# Lengths from short lists: eager JAX compiles for every new shape.
@settings(deadline=None, max_examples=60)
@given(st.lists(part(), max_size=4), st.sampled_from([1, 13]), st.sampled_from([1, 21]), st.integers(0, 20))
def test_intersections_keep_the_contract(parts, q_len, kv_len, offset):
    whole = Mask()
    expected = np.ones((1, q_len, kv_len), bool)
    for one in parts:
        whole &= one
        expected = expected & dense(*one.interval(q_len=q_len, kv_len=kv_len, query_offset=offset), kv_len)
    start, end = whole.interval(q_len=q_len, kv_len=kv_len, query_offset=offset)
    assert_contract(start, end, kv_len)
    np.testing.assert_array_equal(dense(start, end, kv_len), expected)


def test_query_offset_per_row():
    start, end = causal().interval(q_len=3, kv_len=10, query_offset=np.array([0, 4]))
    assert end.tolist() == [[1, 2, 3], [5, 6, 7]] and start.tolist() == [[0] * 3] * 2


def test_offset_chunk_of_packed_documents_sees_its_own_rows():
    mask = causal() & documents(cu_seqlens=[0, 4, 9])
    whole = mask.interval(q_len=9, kv_len=9)
    chunk = mask.interval(q_len=4, kv_len=9, query_offset=5)
    for a, b in zip(whole, chunk, strict=True):
        np.testing.assert_array_equal(a[:, 5:], b)


def test_cross_attention_of_packed_documents():
    start, end = documents(cu_seqlens=[0, 2, 5], kv_cu_seqlens=[0, 4, 4]).interval(q_len=5, kv_len=6)
    assert start.tolist() == [[0, 0, 4, 4, 4]] and end.tolist() == [[4, 4, 4, 4, 4]]


def test_cu_seqlens_may_differ_between_rows():
    start, end = documents(cu_seqlens=[[0, 2, 4], [0, 1, 4]]).interval(q_len=4, kv_len=4)
    assert start.tolist() == [[0, 0, 2, 2], [0, 1, 1, 1]] and end.tolist() == [[2, 2, 4, 4], [1, 4, 4, 4]]


def test_window_width_may_be_traced():
    f = jax.jit(lambda w: (causal() & window(w)).interval(q_len=6, kv_len=6)[0])
    assert f(jnp.int32(1)).tolist() == [[0, 0, 1, 2, 3, 4]] and f(jnp.int32(0)).tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: prefix(3) & window(4), NotImplementedError, "two intervals of keys"),
        (lambda: causal() & prefix(3), ValueError, "leave is_causal=False"),
        (lambda: documents(segment_ids=[1, 2, 1]), ValueError, "segment id 1 is used by two separate runs"),
        (lambda: documents(), ValueError, "exactly one of"),
        (lambda: documents(segment_ids=[1], cu_seqlens=[0, 1]), ValueError, "exactly one of"),
        (lambda: documents(segment_ids=[3_000_000_000]), ValueError, "must fit into int32"),
        (lambda: documents(segment_ids=[1.5]), ValueError, "must be integers .* got float64"),
        (lambda: documents(segment_ids=[1], kv_cu_seqlens=[0, 1]), ValueError, "goes with cu_seqlens"),
        (lambda: documents(cu_seqlens=[0, 3, 2]), ValueError, "must not descend"),
        (lambda: documents(cu_seqlens=[0]), ValueError, "at least two borders"),
        (
            lambda: documents(cu_seqlens=[0, 2], kv_cu_seqlens=[0, 1, 2]),
            ValueError,
            "same number of documents, got 1 and 2",
        ),
        (
            lambda: documents(cu_seqlens=[0, 2], kv_cu_seqlens=[0, 1]) & causal(),
            NotImplementedError,
            "packed differently",
        ),
        (lambda: window(-1), ValueError, "must be >= 0, got"),
        (lambda: window([1, 2]), ValueError, r"window\(left\) must be one integer, got int64 \(2,\)"),
        (lambda: lengths(kv=[[1]]), ValueError, r"lengths\(kv\) must be one integer or integers \[B\]"),
        (lambda: causal() & np.ones((2, 2), bool), TypeError, r"combines with & with another Mask, got bool \(2, 2\)"),
        (lambda: causal().interval(q_len=2, kv_len=2, query_offset=-1), ValueError, "query_offset must be >= 0"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_masks_made_at_import_touch_no_device():
    mask = ring_jax.causal() & ring_jax.window(4) & ring_jax.documents(cu_seqlens=[0, 4])
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(mask))


def test_known_masks_compare_by_value():
    one, other = (causal() & window(4) & documents(cu_seqlens=[0, n]) for n in (3, 4))
    same = causal() & window(4) & documents(cu_seqlens=np.array([0, 3]))
    assert one == same and hash(one) == hash(same) and one != other and one != causal()
