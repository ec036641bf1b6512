import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_jax.layout import _BY_NAME, BlockCyclic, Contiguous, Layout, Striped, Zigzag, as_layout, work_per_rank
from tests.support.layouts import Backwards

LAYOUTS = st.one_of(
    st.sampled_from([*_BY_NAME.values(), Backwards()]),
    st.builds(Striped, st.integers(1, 5)),
    st.builds(Zigzag, st.integers(1, 5)),
)


def held(layout, length, ranks):
    """Positions of every rank by walking the sequence, from a table of its own of who owns a position."""

    def zigzag(position):
        block = position // (layout.block or max(length // (2 * ranks), 1)) % (2 * ranks)
        return min(block, 2 * ranks - 1 - block)

    owner = {
        Contiguous: lambda position: position // (length // ranks),
        Backwards: lambda position: ranks - 1 - position // (length // ranks),
        Striped: lambda position: position // layout.block % ranks,
        Zigzag: zigzag,
    }[type(layout)]
    shards = [[] for _ in range(ranks)]
    for position in range(length):
        shards[owner(position)].append(position)
    return shards


@settings(deadline=None, max_examples=150)
@given(LAYOUTS, st.integers(0, 90), st.integers(1, 9), st.data())
def test_closed_forms_agree_with_walking_the_sequence(layout, seq_len, ranks, data):
    length = layout.padded_length(seq_len, ranks)
    assert seq_len <= length < seq_len + 2 * ranks * (getattr(layout, "block", 1) or 1) and length % ranks == 0
    shards = held(layout, length, ranks)
    g = data.draw(st.integers(0, length))
    for rank, shard in enumerate(shards):
        assert layout.positions(rank, length, ranks).tolist() == shard
        assert layout.count_below(g, rank, length, ranks) == sum(p < g for p in shard)
        assert all(layout.rank_of(np.array(shard, int), length, ranks) == rank)
        b = layout.block_size(length, ranks)
        assert len(shard) % b == 0 and all(shard[i] + 1 == shard[i + 1] for i in range(len(shard) - 1) if (i + 1) % b)
        if isinstance(layout, BlockCyclic):
            assert layout.local_index(np.array(shard, int), length, ranks).tolist() == list(range(len(shard)))


@settings(deadline=None, max_examples=12)
@given(LAYOUTS, st.sampled_from([1, 23, 48]), st.sampled_from([1, 2, 5]))
def test_traced_closed_forms_equal_static_ones(layout, seq_len, ranks):
    length = layout.padded_length(seq_len, ranks)
    g = np.arange(length + 1, dtype=np.int32)
    for rank in range(ranks):
        traced = jnp.int32(rank)
        np.testing.assert_array_equal(layout.positions(traced, length, ranks), layout.positions(rank, length, ranks))
        got = layout.count_below(jnp.asarray(g), traced, length, ranks)
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, layout.count_below(g, rank, length, ranks))


@settings(deadline=None, max_examples=10)
@given(LAYOUTS, st.sampled_from([1, 23, 48]), st.sampled_from([1, 2, 3, 8]))
def test_restore_and_scatter_permute_gathered_shards(layout, seq_len, ranks):
    length = layout.padded_length(seq_len, ranks)
    gathered = np.concatenate([layout.positions(r, length, ranks) for r in range(ranks)])
    x = jnp.asarray(np.stack([gathered, -gathered]))
    natural = layout.restore(x, 1, ranks)
    np.testing.assert_array_equal(natural[0], np.arange(length))
    np.testing.assert_array_equal(layout.scatter(natural, -1, ranks), x)


@settings(deadline=None, max_examples=40)
@given(LAYOUTS, st.integers(1, 60), st.integers(1, 4), st.integers(1, 4))
def test_coarser_layout_is_what_groups_of_ranks_hold(layout, seq_len, outer, inner):
    ranks = outer * inner
    length = layout.padded_length(seq_len, ranks)
    for group in range(outer):
        together = np.sort(np.concatenate([layout.positions(group * inner + i, length, ranks) for i in range(inner)]))
        np.testing.assert_array_equal(layout.coarsen(inner).positions(group, length, outer), together)


def test_forms_named_in_the_rfc():
    assert Zigzag(block=1).positions(0, 10 + 2, 2).tolist() == [0, 3, 4, 7, 8, 11]  # vLLM RFC 37995
    assert Zigzag().positions(0, 8, 2).tolist() == [0, 1, 6, 7]


def test_layouts_without_fixed_block_pad_alike():
    for ranks in range(1, 9):
        for seq_len in range(1, 40):
            assert (
                len({layout.padded_length(seq_len, ranks) for layout in (Contiguous(), Zigzag(), Zigzag(1), Striped())})
                == 1
            )


def test_work_balance_of_packed_documents():
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, 32768), 15, replace=False))
    start = np.concatenate([[0], cuts])[np.searchsorted(cuts, np.arange(32768), "right")]
    end = np.arange(32768) + 1
    slowest = {}
    for name, layout in (("fine", Zigzag(128)), ("two-chunk", Zigzag()), ("contiguous", Contiguous())):
        work = work_per_rank(start, end, layout, 8)
        assert sum(work) == np.sum(end - start)
        slowest[name] = max(work) / np.mean(work)
    assert slowest["fine"] < 1.2 < slowest["two-chunk"] and 1.2 < slowest["contiguous"]


def test_zigzag_balances_causal_work_exactly():
    for ranks in (2, 3, 8):
        work = work_per_rank(np.zeros(48 * ranks, int), np.arange(48 * ranks) + 1, "zigzag", ranks)
        assert len(set(work)) == 1


class Partly:
    """A layout that is not done yet."""

    def padded_length(self, seq_len, ranks):
        return seq_len


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: as_layout("spiral"), ValueError, "unknown layout 'spiral': expected one of"),
        (lambda: as_layout(Zigzag), TypeError, "a value such as Zigzag"),
        (lambda: as_layout(Partly()), TypeError, r"lacks the methods block_size, .*, scatter of"),
        (lambda: Zigzag(block=0), ValueError, r"Zigzag\(block=...\) must be >= 1, got 0"),
        (lambda: Striped(block=True), TypeError, r"Striped\(block=...\) must be an integer, got True"),
        (
            lambda: Contiguous().positions(0, 10, 4),
            ValueError,
            "length 10 does not divide over 4 .* next length that does is 16",
        ),
        (lambda: Zigzag().padded_length(-1, 4), ValueError, "seq_len must be >= 0, got -1"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_protocol():
    assert all(isinstance(layout, Layout) for layout in (Contiguous(), Striped(), Zigzag(), Backwards()))
    assert not isinstance("zigzag", Layout)
    assert as_layout("zigzag") == Zigzag() and hash(Zigzag(3)) == hash(Zigzag(3))
    assert jax.jit(lambda x, layout: x, static_argnums=1)(1.0, Zigzag(2)) == 1.0
