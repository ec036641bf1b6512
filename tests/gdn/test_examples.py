"""The examples in the docstrings."""

import doctest
import importlib

import pytest

MODULES = ("chunked", "context", "conv", "inverse", "operation", "plan", "segments")


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    found = doctest.testmod(importlib.import_module(f"ring_jax.gdn.{name}"))
    assert found.failed == 0
    assert found.attempted > 0 or name in ("chunked", "context")
