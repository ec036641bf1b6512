"""The names of layouts and strategies: what types list is what runs, and README, glossary and docstring say the same."""

import inspect
import re
from pathlib import Path
from typing import get_args

import pytest

from ring_jax import ContextParallel
from ring_jax.context.strategies import STRATEGIES, StrategyName
from ring_jax.layout import _BY_NAME, LayoutName
from tests.support import layouts

ROOT = Path(__file__).parents[1]
LAYOUTS, ATTENTION = get_args(LayoutName), get_args(StrategyName)


def test_types_list_what_runs_and_tests_walk_over_it():
    assert set(LAYOUTS) == set(_BY_NAME)
    assert {*_BY_NAME.values()} <= {*layouts.LAYOUTS.values()}
    assert set(ATTENTION) == {"auto", *STRATEGIES}


@pytest.mark.parametrize("head, names", [("layout", LAYOUTS), ("`strategy=`", ATTENTION)])
def test_readme_has_a_row_for_each(head, names):
    table = re.search(
        rf"^\| {re.escape(head)} \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", (ROOT / "README.md").read_text(), re.M
    )[1]
    rows = [line.split("|")[1] for line in table.splitlines()]
    assert {name for row in rows for name in re.findall(r'"(\w+)"', row)} == set(names)


@pytest.mark.parametrize("term, names", [("layout", LAYOUTS), ("strategy", {*ATTENTION} - {"auto"})])
def test_the_glossary_lists_them(term, names):
    (row,) = [x for x in (ROOT / "docs" / "glossary.md").read_text().splitlines() if x.startswith(f"| **{term}** |")]
    assert set(names) <= set(re.findall(r"`(\w+)`", row))


@pytest.mark.parametrize("argument, names", [("layout", LAYOUTS), ("strategy", ATTENTION)])
def test_the_context_lists_them(argument, names):
    text = inspect.getdoc(ContextParallel) or ""  # Python 3.13 leaves the indentation out of __doc__
    entry = re.search(rf"^    {argument}: (.*?)(?=\n    \w|\n\n)", text, re.M | re.S)
    assert entry and set(re.findall(r'"(\w+)"', entry[1])) == set(names)
