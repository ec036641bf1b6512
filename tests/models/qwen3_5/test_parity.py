"""Logits, hidden states, caches and greedy text equal those of transformers, on any number of context ranks.

Against golden files; `test_parity_hf.py` runs transformers itself.
"""

import dataclasses
import itertools

import numpy as np
import pytest

from tests.models.qwen3_5 import tiny
from tests.models.qwen3_5.golden import CASES, Golden
from tests.models.qwen3_5.harness import Spread, check_greedy, check_prefill, close, ranks

ALL, GREEDY = tuple(CASES), tuple(name for name, case in CASES.items() if case.greedy)


def test_weights_are_those_of_the_golden_files():
    """Otherwise another NumPy draws other numbers: write the files anew (make_golden.py)."""
    for name, case in CASES.items():
        np.testing.assert_allclose(tiny.fingerprint(case.weights()), Golden.load(name).fingerprint, rtol=1e-6)


def test_bounds_would_notice():
    """An error of 1e-4 in one value, or of 2e-5 of the norm, is one."""
    wanted = Golden.load("dense").logits
    off = wanted.copy()
    off[3, 5] += 1.1e-4
    with pytest.raises(AssertionError):
        close("logits", off, wanted)
    with pytest.raises(AssertionError):
        close("logits", wanted * (1 + 2e-5), wanted, most=None)


def quick(name: str, count: int, way: str = "auto") -> Spread:
    """Default tests save compilations of Qwen3-Next; the slow ones make them."""
    return dataclasses.replace(ranks(count), way=way, shared=name == "next")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "next_raw" else n for n in ALL])
def test_one_rank(name):
    check_prefill(name, ranks(1))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow) if n in ("dense", "dense_no_decay", "head256") else n
        for n in ALL
        if n != "next_raw"
    ],
)
def test_eight_ranks(name):
    """States go from rank to rank; three rows alone would let `auto` split the batch."""
    check_prefill(name, quick(name, 8, "state"))


@pytest.mark.slow
@pytest.mark.parametrize("name, count", [*itertools.product(ALL, (2, 4, 8))])
def test_some_ranks(name, count):
    check_prefill(name, ranks(count))


@pytest.mark.slow
@pytest.mark.parametrize("count, way", [(2, "state"), (4, "state"), (2, "head")])
@pytest.mark.parametrize("name", ["dense", "dense_no_decay", "moe", "next"])
def test_ways_of_spreading_gdn(name, count, way):
    check_prefill(name, Spread(context=count, way=way))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "striped"])
def test_other_layouts(layout):
    check_prefill("dense", Spread(context=4, layout=layout))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "pass_q", "all_gather"])
def test_strategies_of_attention(strategy):
    check_prefill("dense", Spread(context=4, strategy=strategy))


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_text_on_one_rank(name):
    check_greedy(name, quick(name, 1))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "dense" else n for n in GREEDY])
def test_greedy_text_on_four_ranks(name):
    check_greedy(name, quick(name, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name, count", [("next", 1), ("next", 4), *itertools.product(GREEDY, (2, 8))])
def test_greedy_text_on_some_ranks(name, count):
    check_greedy(name, ranks(count))
