"""Paged attention on one device: every backend against dense float64 attention to the keys that a row's pages hold."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.flash.paged import BACKENDS, gather_pages, paged_attention

LAYERS, P, p, K, H, R, n = (2, 3), 9, 4, 2, 16, 4, 5
ANYWHERE = ("reference", "xla")


def pool(seed, shape=(*LAYERS, 2, P, p, K, H), dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def dense(query, pages, table, lengths, layer, scale=None, cap=None):
    """float64 (out, lse), a row at a time, which ends before a page that is not there."""
    query = np.asarray(query, np.float64)
    rows, tokens, heads, size = query.shape
    slots, kv_heads = pages.shape[-3:-1]
    key, value = np.asarray(pages, np.float64).reshape(-1, *pages.shape[-5:])[layer]
    out, lse = np.zeros(query.shape), np.full(query.shape[:3], -np.inf)
    for r in range(rows):
        places = [(table[r, s // slots], s % slots) for s in range(min(lengths[r], slots * table.shape[1]))]
        places = list(itertools.takewhile(lambda place: 0 <= place[0] < pages.shape[-4], places))
        if not places:
            continue
        at = tuple(np.array(places).T)
        k, v = (np.repeat(x[at], heads // kv_heads, axis=1) for x in (key, value))
        logits = np.einsum("tnh,snh->tns", query[r], k) * (size**-0.5 if scale is None else scale)
        logits = logits if cap is None else cap * np.tanh(logits / cap)
        top = logits.max(-1)
        weights = np.exp(logits - top[..., None])
        lse[r] = top + np.log(weights.sum(-1))
        out[r] = np.einsum("tns,snh->tnh", weights / weights.sum(-1, keepdims=True), v)
    return out, lse


def check(found, want, bound=3e-6):
    for a, b in zip(found, want, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
        np.testing.assert_allclose(np.where(np.isneginf(a), 0, a), np.where(np.isneginf(b), 0, b), atol=bound, rtol=0)


def inputs(tokens=2, heads=4):
    rng = np.random.default_rng(1)
    query = rng.normal(size=(R, tokens, heads, H)).astype(np.float32)
    table = np.stack([rng.permutation(np.arange(1, P))[:n] for _ in range(R)]).astype(np.int32)
    return query, pool(0), table, np.array([n * p, 7, 0, 1], np.int32)


@pytest.mark.parametrize("name", ANYWHERE)
@pytest.mark.parametrize(
    ("tokens", "heads", "options"), [(1, 2, {}), (2, 8, {"scale": 0.3, "logits_soft_cap": 2.0})], ids=["one", "two"]
)
def test_against_dense(name, tokens, heads, options):
    query, pages, table, lengths = inputs(tokens, heads)
    table[3, 1:] = table[0, 0]  # what lies behind the end is not read
    run = functools.partial(paged_attention, layer=4, implementation=name, **options)
    want = dense(query, pages, table, lengths, 4, options.get("scale"), options.get("logits_soft_cap"))
    check(run(query, pages, table, lengths), want)


@pytest.mark.parametrize("name", ANYWHERE)
def test_a_row_ends_before_a_page_that_is_not_there(name):
    """Ids are never clipped: another row's keys would be read without an error."""
    query, pages, table, lengths = inputs()
    table[0, 2], table[1], table[3, 1] = P, np.iinfo(np.int32).max, -1
    check(paged_attention(query, pages, table, lengths, implementation=name), dense(query, pages, table, lengths, 0))


@pytest.mark.parametrize("name", ANYWHERE)
def test_slots_behind_the_end_may_hold_anything(name):
    """Such as what a row left that ended in NaN."""
    query, pages, table, lengths = inputs()
    table = np.arange(1, 1 + R * 2, dtype=np.int32).reshape(R, 2)
    lengths = np.array([8, 5, 0, 1], np.int32)
    spoilt = pages.copy()
    for r in range(R):
        for s in range(lengths[r], 2 * p):
            spoilt[..., table[r, s // p], s % p, :, :] = np.nan
    spoilt[..., 0, :, :, :] = np.inf
    check(paged_attention(query, spoilt, table, lengths, implementation=name), dense(query, pages, table, lengths, 0))


def test_a_traced_layer_is_cut_to_those_that_are_there():
    query, pages, table, lengths = inputs()
    run = jax.jit(lambda layer: paged_attention(query, pages, table, lengths, layer=layer))
    for given, meant in ((3, 3), (99, 5), (-1, 0)):
        check(run(jnp.int32(given)), dense(query, pages, table, lengths, meant))


def test_lengths_beyond_the_table_are_all_of_it():
    query, pages, table, _ = inputs()
    lengths = np.full(R, 2**31 - 1, np.int32)
    check(paged_attention(query, pages, table, lengths), dense(query, pages, table, lengths, 0))


def test_nothing_to_do():
    query, pages, table, lengths = inputs()
    out, lse = paged_attention(query[:0], pages, table[:0], lengths[:0])
    assert out.shape == (0, 2, 4, H) and lse.shape == (0, 2, 4)
    out, lse = paged_attention(query, pages, table[:, :0], lengths)
    assert not out.any() and np.isneginf(lse).all()


def test_gathers_pages_of_a_layer():
    _, pages, table, _ = inputs()
    table[1, 2] = P
    found = gather_pages(pages, table, jnp.int32(5))
    want = pages[1, 2][:, np.minimum(table, P - 1)].reshape(2, R, n * p, K, H)
    want[:, 1, 2 * p : 3 * p] = 0
    np.testing.assert_array_equal(found, want)


def test_the_pool_is_neither_sliced_nor_transposed():
    """XLA reads the pages where they lie: nothing but them, and what is gathered, is of their size."""
    _, pages, table, _ = inputs()
    large = jax.ShapeDtypeStruct((*LAYERS, 2, 4096, p, K, H), jnp.float32)
    compiled = jax.jit(gather_pages).lower(large, table, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**16


BAD = [
    ({"query": np.zeros((R, 1, 3, H), np.float32)}, "3 query heads cannot share 2"),
    ({"query": np.zeros((R, 1, 4, H), np.float16)}, "share one dtype"),
    ({"query": np.zeros((R, 1, 4, 8), np.float32)}, "pages must have H=8"),
    ({"pages": np.zeros((3, P, p, K, H), np.float32)}, r"\[..., 2, P, p, K, H\]"),
    ({"lengths": np.zeros(R + 1, np.int32)}, "lengths must have shape"),
    ({"layer": 6}, "layer must be in"),
    ({"implementation": "triton"}, "unknown implementation"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_says_what_is_wrong(bad, message):
    arguments = dict(zip(("query", "pages", "table", "lengths"), inputs(), strict=True)) | bad
    with pytest.raises(ValueError, match=message):
        paged_attention(**arguments)


def test_every_backend_is_tested():
    assert set(BACKENDS) <= {*ANYWHERE, "mosaic"}
