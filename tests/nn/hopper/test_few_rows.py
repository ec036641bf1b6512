"""Products of few rows: lowered for CUDA and interpreted on the CPU, compared with float64; on a GPU too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.mosaic import compat
from ring_jax.nn.hopper import few_rows
from ring_jax.nn.hopper.config import FewRowsConfig, few_rows_config
from ring_jax.nn.hopper.few_rows import product
from ring_jax.nn.norm import Normed
from tests.support.hopper import lower
from tests.support.marks import interpreted
from tests.support.numbers import relative

# Of a norm's error: one rounding of each number, by 2^-8 (2^-11) at most.
BOUND = {jnp.bfloat16: 2.5e-3, jnp.float16: 3.5e-4}
# Depth, results, SwiGLU: layers of 0.8B, 4B and 9B.
SIZES = [
    (1024, 8320, False), (2048, 1024, False), (1024, 3584, True), (3584, 1024, False), (1024, 5120, False),
    (2560, 9216, True), (9216, 2560, False), (4096, 12416, False), (4096, 4096, False), (4096, 12288, True), (12288, 4096, False),
]  # fmt: skip


def operands(rows, depth, results, swiglu, dtype, seed=0):
    """x, w, the norm's weight, what is added."""
    rng = np.random.default_rng(seed)
    shapes = (rows, depth), (depth, results * (1 + swiglu)), (depth,), (rows, results)
    scales = 2.0, depth**-0.5, 0.1, 1.0
    return [jnp.asarray(s * rng.standard_normal(n), dtype) for n, s in zip(shapes, scales, strict=True)]


def exact(x, w, weight, added, swiglu):
    """In float64; without norm and sum where they are None."""
    x, w, weight, added = (None if a is None else np.asarray(a, np.float64) for a in (x, w, weight, added))
    if weight is not None:
        x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-6) * (1 + weight)
    y = x @ w
    if swiglu:
        gate, up = np.split(y, 2, axis=1)
        y = gate / (1 + np.exp(-gate)) * up
    return y if added is None else y + added


def run(x, w, weight, added, swiglu, config=None):
    x = x if weight is None else Normed(x, weight, 1e-6)
    return product(x, w, swiglu=swiglu, added=added, config=config)


@pytest.mark.parametrize(("depth", "results", "swiglu"), SIZES)
@pytest.mark.parametrize("rows", [1, 4])
def test_lowers(rows, depth, results, swiglu):
    config = few_rows_config(rows, depth, results, swiglu)
    assert config is not None and depth % config.step == 0 and results % config.columns == 0
    x, w, weight, added = (
        jax.ShapeDtypeStruct(a, jnp.bfloat16)
        for a in ((rows, depth), (depth, results * (1 + swiglu)), (depth,), (rows, results))
    )
    lowered = lower(lambda *a: run(*a, swiglu), x, w, weight, added)
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 1


def test_configs_are_those_that_were_fastest():
    """On an H100, docs/measurements/2026-11-27_cards.md; one row."""
    sizes = {(1024, 5120): (32, 2, 8), (2048, 1024): (8, 1, 4), (4096, 12416): (64, 2, 8), (4096, 4096): (32, 4, 8)}
    for (depth, results), wanted in sizes.items():
        assert dataclasses.astuple(few_rows_config(1, depth, results, False)) == wanted
    assert dataclasses.astuple(few_rows_config(1, 4096, 12288, True)) == (64, 4, 8)


@pytest.mark.parametrize("change", [{"columns": 24}, {"warpgroups": 3}, {"loads": 0}, {"loads": 17}])
def test_config_refuses(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(FewRowsConfig(columns=32), **change)


def test_when_it_is_worthwhile():
    S = jax.ShapeDtypeStruct

    def found(x, w, **options):
        seen = []
        lower(lambda x, w: seen.append(few_rows.worthwhile(x, w, **options)) or x, x, w)
        return seen == [True]

    x, w = S((2, 1, 1024), jnp.bfloat16), S((1024, 2048), jnp.bfloat16)
    assert found(x, w) == found(x, w, swiglu=True) == compat.INTERPRET_AVAILABLE
    assert not found(S((5, 1024), jnp.bfloat16), w), "too many rows"
    large = S((4096, 12416), jnp.bfloat16)
    assert found(S((1, 4096), jnp.bfloat16), large) == compat.INTERPRET_AVAILABLE
    assert not found(S((2, 4096), jnp.bfloat16), large), "cuBLAS reads it faster"
    assert not found(S((1, 1000), jnp.bfloat16), S((1000, 2048), jnp.bfloat16)), "no config cuts 1000"
    assert not found(S((1, 1024), jnp.float32), S((1024, 2048), jnp.float32))
    assert not found(x, S(w.shape, jnp.float32))
    assert not few_rows.worthwhile(x, w), "this is no GPU"


def test_sizes_that_no_config_cuts():
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 1000), (1000, 64)))
    with pytest.raises(NotImplementedError, match=r"cuts no weight \(1000, 64\)"):
        lower(product, x, w)


@interpreted
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(
    ("rows", "depth", "results", "swiglu", "config"),
    [
        (1, 512, 32, False, FewRowsConfig(columns=8, warpgroups=1, loads=2)),
        (3, 512, 64, True, FewRowsConfig(columns=32, warpgroups=2, loads=2)),
    ],
)
def test_interpreted(rows, depth, results, swiglu, config, normed, added):
    x, w, weight, total = operands(rows, depth, results, swiglu, jnp.bfloat16)
    arrays = x, w, weight if normed else None, total if added else None
    with compat.interpret_mode():
        found = run(*arrays, swiglu, config)
    assert found.dtype == jnp.bfloat16 and relative(found, exact(*arrays, swiglu)) < BOUND[jnp.bfloat16]


@interpreted
def test_gradient():
    """XLA's, of the same function: norm, product, SwiGLU, sum."""
    arrays = operands(2, 256, 16, True, jnp.bfloat16, seed=3)
    config = FewRowsConfig(columns=16, warpgroups=1, loads=1)

    def loss(function):
        return lambda *a: (function(*a).astype(jnp.float32) ** 2).sum()

    def plain(x, w, weight, added):
        x = x / jnp.sqrt(jnp.mean(x * x, axis=1, keepdims=True) + 1e-6) * (1 + weight)[None]
        gate, up = jnp.split(x @ w, 2, axis=1)
        return jax.nn.silu(gate) * up + added

    with compat.interpret_mode():
        found = jax.grad(loss(lambda *a: run(*a, True, config)), argnums=(0, 1, 2, 3))(*arrays)
    expected = jax.grad(loss(plain), argnums=(0, 1, 2, 3))(*(a.astype(jnp.float32) for a in arrays))
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == jnp.bfloat16 and relative(got, want) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("depth", "results", "swiglu"), SIZES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_gpu(rows, depth, results, swiglu, dtype):
    """With norm and sum and without; the bits again."""
    x, w, weight, total = operands(rows, depth, results, swiglu, dtype, seed=rows)
    assert few_rows.worthwhile(x, w, swiglu=swiglu) == (rows == 1 or w.nbytes <= few_rows._SEVERAL_ROWS)
    for arrays in ((x, w, weight, total), (x, w, None, None)):
        call = jax.jit(lambda *a: run(*a, swiglu))
        found = call(*arrays)
        assert relative(found, exact(*arrays, swiglu)) < BOUND[dtype]
        assert np.array_equal(found, call(*arrays))
