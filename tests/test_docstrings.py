"""Every docstring example of the package runs, and gives what it says."""

import doctest
import importlib
import inspect
import pkgutil
import re

import jax
import pytest

import ring_jax

# Modules that need a GPU toolchain at import, or start a program.
_SKIPPED = re.compile(r"ring_jax\.(bench\b|__main__|commands\b)")


def modules():
    found = (module.name for module in pkgutil.walk_packages(ring_jax.__path__, "ring_jax."))
    return [name for name in found if not _SKIPPED.match(name)]


class Finder(doctest.DocTestFinder):
    """Finds the docstrings of functions whose annotations are checked (`tests.support.shapes`), too."""

    def _from_module(self, module, object):
        return super()._from_module(module, inspect.unwrap(object) if inspect.isroutine(object) else object)


def examples():
    """(module, example) of all docstrings that hold some."""
    finder = Finder(exclude_empty=True)
    for name in modules():
        module = importlib.import_module(name)
        for test in finder.find(module, name):
            if test.examples:
                yield test


EXAMPLES = list(examples())


def test_there_are_examples():
    assert len(EXAMPLES) > 30


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_example(example):
    if any(doctest.OPTIONFLAGS_BY_NAME["SKIP"] in piece.options for piece in example.examples):
        pytest.fail(f"{example.name} has an example that never runs")
    example.globs["jax"] = jax
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    output: list[str] = []
    runner.run(example, out=output.append)
    assert runner.failures == 0, "".join(output)
