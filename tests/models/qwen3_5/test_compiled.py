"""What XLA makes of the model for a GPU: products read weights and cached keys where they lie, the cache is updated in
place. Nothing of the size of a weight is written, so none is copied, joined or sliced out first (but by prefill's scan)."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from tests.models.qwen3_5 import compiled

ROOT = pathlib.Path(__file__).parents[3]


def plugin() -> str | None:
    """The folder that holds jax's CUDA plugin: RING_JAX_CUDA_PLUGIN, or where it is installed."""
    folder = os.environ.get("RING_JAX_CUDA_PLUGIN")
    if folder is None and importlib.util.find_spec("jax_plugins") is not None:
        found = importlib.util.find_spec("jax_plugins.xla_cuda13")
        folder = None if found is None or found.origin is None else str(pathlib.Path(found.origin).parents[2])
    return folder


@pytest.fixture(scope="module")
def described():
    """What programs compiled for a described H100 write."""
    folder = plugin()
    if folder is None:
        pytest.skip("needs jax's CUDA plugin to compile for a GPU: RING_JAX_CUDA_PLUGIN names no folder that holds it")
    command = [sys.executable, "-m", "tests.models.qwen3_5.compiled", folder]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


def test_the_reader_sees_copies():
    """On this machine's own compiler: a sliced and a joined weight are found, an update in place is not one."""
    w = jax.ShapeDtypeStruct((2, 1024, 1024), jnp.float32)
    joined = jax.jit(lambda w: jnp.concatenate([w[0], w[1]], axis=1) * 1.5).lower(w).compile().as_text()
    assert compiled.large_results(joined, 1 << 20)
    update = jax.jit(lambda w: jax.lax.dynamic_update_slice(w, jnp.ones((1, 1, 8)), (1, 3, 0)), donate_argnums=0)
    assert compiled.large_results(update.lower(w).compile().as_text(), 1 << 20) == []


def check(name: str, large: list[str]) -> None:
    """A scan's own slices of the stacked weights are copies, one of each weight; decode has no scan."""
    found = large if name in ("decode", "engine") else [x for x in large if x.split()[1] != "dynamic-slice"]
    assert found == [], f"{name} writes arrays of the size of a weight"


@pytest.mark.parametrize("name", ["decode", "engine", "prefill", "long prefill"])
def test_nothing_is_copied_for_a_described_h100(described, name):
    check(name, described[name])


def test_a_steady_decode_asks_the_host_nothing(described):
    """What a GPU's loop or branch depends on it sends to the host, and waits: a call would return when its last step has begun."""
    assert described["asks the host"] == []
    branch = jax.jit(lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x)).lower(jnp.ones(64)).compile().as_text()
    until = jax.jit(lambda x: jax.lax.while_loop(lambda x: x[0] < 9, lambda x: 2 * x, x)).lower(jnp.ones(64))
    fixed = jax.jit(lambda x: jax.lax.fori_loop(0, 9, lambda _, x: jnp.sin(x), x)).lower(jnp.ones(64))
    assert [len(compiled.asks_the_host(text)) for text in (branch, until.compile().as_text())] == [1, 1]
    assert compiled.asks_the_host(fixed.compile().as_text()) == []


def test_scan_copies_no_weight_where_products_are_cublas(described):
    """Even the scan's own slices are read where they lie."""
    assert described["prefill, products by cuBLAS"] == []


def test_attention_is_rounded_by_its_kernel(described):
    assert described["attention in float32"] == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["decode", "prefill", "long prefill"])
def test_nothing_is_copied(name):
    program, operands = compiled.model_and_programs()[1][name]
    check(name, compiled.unwanted(name, program.lower(*operands).compile().as_text()))
