"""The cases for compute-sanitizer hold all Hopper kernels that there are."""

import re
from pathlib import Path

import jax

import ring_jax
from ring_jax.bench.small import CASES
from ring_jax.mosaic import compat
from tests.gdn.hopper.test_forward import needs_kernel
from tests.support.hopper import on_hopper


@needs_kernel
def test_every_kernel_is_in_a_case(monkeypatch):
    """By the names that the package gives them."""
    sources = (path.read_text() for path in Path(ring_jax.__file__).parent.rglob("hopper/*.py"))
    names = {
        name
        for text in sources
        for name in re.findall(r'"((?:[a-z]+_)+[a-z]+)", problem|(?<!thread_)name="([a-z_]+)"', text)
    }
    names = {name for pair in names for name in pair if name}
    launched, kernel = set(), compat.kernel

    def noted(*args, name, **options):
        launched.add(name)
        return kernel(*args, name=name, **options)

    monkeypatch.setattr(compat, "kernel", noted)
    with on_hopper():
        for case in CASES.values():
            run, operands = case()
            jax.jit(run).trace(*operands)
    assert len(names) > 10
    assert names - launched == set()
