"""The work counts behind the demo's picture."""

import numpy as np
import pytest

from ring_jax.commands.balance import causal_balance, plot
from ring_jax.layout import Contiguous, Striped, Zigzag

LAYOUTS = [Contiguous(), Striped(), Zigzag(), Zigzag(block=1), Zigzag(block=16)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("seq_len", "ranks"), [(96, 3), (101, 4), (7, 5), (64, 1)])
def test_equals_counting_pairs(layout, seq_len, ranks):
    balance = causal_balance("", layout, seq_len, ranks)
    assert balance.pairs.sum() == seq_len * (seq_len + 1) // 2
    holder = {}
    length = layout.padded_length(seq_len, ranks)
    for rank in range(ranks):
        holder |= dict.fromkeys(np.asarray(layout.positions(rank, length, ranks)).tolist(), rank)
    want = np.zeros((ranks, ranks), int)
    for query in range(seq_len):
        for key in range(query + 1):
            want[holder[query], (holder[query] - holder[key]) % ranks] += 1
    np.testing.assert_array_equal(balance.pairs, want)


def test_known_balances():
    contiguous, zigzag = (causal_balance("", layout, 4096, 8) for layout in (Contiguous(), Zigzag()))
    np.testing.assert_allclose(contiguous.share, [1 / 8, 3 / 8, 5 / 8, 7 / 8, 9 / 8, 11 / 8, 13 / 8, 15 / 8], atol=1e-3)
    assert contiguous.slowdown == pytest.approx(15 / 8, abs=1e-3)
    np.testing.assert_allclose(zigzag.share, 1, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_plot_is_a_png(tmp_path, ranks):
    plot([causal_balance(str(x), x, 1024, ranks) for x in LAYOUTS], "title", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
