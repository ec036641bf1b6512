"""Norms and rotary embedding of queries and keys: lowered for CUDA and interpreted on the CPU, compared with float64; on a GPU too."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ring_jax.models.qwen3_5 import Config
from ring_jax.models.qwen3_5.layers import FullAttention
from ring_jax.mosaic import compat
from ring_jax.nn.hopper import heads
from ring_jax.nn.hopper.heads import queries_and_keys
from ring_jax.nn.rope import angles
from tests.support.hopper import lower
from tests.support.marks import interpreted
from tests.support.numbers import relative

# Of a norm's error: one rounding of each number, by 2^-8 (2^-11) at most.
BOUND = {jnp.bfloat16: 2.5e-3, jnp.float16: 3.5e-4}
# Batch, tokens, key-value heads, queries of each, head size, columns that rotate.
SIZES = [
    (1, 8, 2, 4, 256, 64),
    (3, 1, 1, 2, 256, 64),
    (2, 6, 2, 1, 128, 128),
    (1, 32, 1, 3, 64, 64),
    (1, 4, 1, 1, 256, 128),
    (2, 4, 1, 2, 256, 256),
]


def operands(batch, time, kv_heads, group, size, rotary, dtype, seed=0):
    rng = np.random.default_rng(seed)
    x = 3.0 * rng.standard_normal((batch, time, kv_heads * (2 * group + 2) * size))
    weights = 0.3 * rng.standard_normal((2, size))
    positions = rng.integers(0, 1000, (batch, time)) if batch > 1 else np.arange(time) + 100
    return jnp.asarray(x, dtype), *jnp.asarray(weights, dtype), *angles(jnp.asarray(positions), rotary, 1e6)


def formula(x, q_weight, k_weight, cos, sin, group, xp=jnp):
    (batch, time, _), size, half = x.shape, len(q_weight), cos.shape[-1]
    x = x.reshape(batch, time, -1, 2 * group + 2, size)
    q, k = x[..., : 2 * group : 2, :].reshape(batch, time, -1, size), x[..., 2 * group, :]

    def one(x, weight):
        x = x / xp.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6) * (1 + weight)[None, None, None]
        a, b, c, s = x[..., :half], x[..., half : 2 * half], cos[:, :, None], sin[:, :, None]
        return xp.concatenate([a * c - b * s, b * c + a * s, x[..., 2 * half :]], axis=-1)

    return one(q, q_weight), one(k, k_weight)


def exact(*arrays):
    """In float64."""
    *arrays, group = arrays
    return formula(*(np.asarray(a, np.float64) for a in arrays), group, np)


@interpreted
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_lowers_and_interpreted(sizes):
    group = sizes[3]
    arrays = operands(*sizes, jnp.bfloat16)
    run = functools.partial(queries_and_keys, group=group, epsilon=1e-6)
    assert lower(run, *arrays).as_text().count("custom_call @mosaic_gpu") == 1
    with compat.interpret_mode():
        found = run(*arrays)
    for got, want in zip(found, exact(*arrays, group), strict=True):
        assert got.dtype == jnp.bfloat16 and relative(got, want) < BOUND[jnp.bfloat16]


@interpreted
def test_gradient():
    """XLA's, of the same function."""
    x, *weights, cos, sin = operands(2, 4, 2, 2, 128, 64, jnp.bfloat16, seed=1)

    def loss(function):
        return lambda *a: sum((y.astype(jnp.float32) ** 3).sum() for y in function(*a))

    plain = lambda *a: formula(*a, cos, sin, 2)  # noqa: E731
    run = lambda *a: queries_and_keys(*a, cos, sin, group=2, epsilon=1e-6)  # noqa: E731
    with compat.interpret_mode():
        found = jax.grad(loss(run), argnums=(0, 1, 2))(x, *weights)
    wanted = jax.grad(loss(plain), argnums=(0, 1, 2))(*(a.astype(jnp.float32) for a in (x, *weights)))
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == jnp.bfloat16 and relative(got, want) < 0.02


@interpreted
@pytest.mark.parametrize("each_row", [True, False])
def test_a_layer_says_the_same_with_it_and_without(each_row, monkeypatch):
    config = dataclasses.replace(Config.preset("qwen3.5-9b"), hidden_size=64, num_heads=4, num_kv_heads=2)
    make = lambda shape, axes, kind, dtype: nnx.Param(0.1 * jnp.ones(shape, dtype))  # noqa: E731
    layer = FullAttention(config, make, jnp.bfloat16)
    x = operands(2, 4, 2, 2, 256, 64, jnp.bfloat16, seed=3)[0]
    positions = jnp.asarray([[5, 6, 7, 8], [0, 1, 2, 3]]) if each_row else jnp.arange(4)
    by_head = x.reshape(2, 4, 2, 6, 256)
    parts = by_head[..., :4:2, :].reshape(2, 4, 4, 256), by_head[..., 4, :]
    plain = layer._normed_and_turned(x, *parts, positions)
    monkeypatch.setattr(heads, "worthwhile", lambda *_: True)
    with compat.interpret_mode():
        found = layer._normed_and_turned(x, *parts, positions)
    for got, want in zip(found, plain, strict=True):
        assert relative(got, want) < 4e-3  # which rounds twice


def test_when_it_is_worthwhile():
    x = jax.ShapeDtypeStruct((1, 64, 2 * 10 * 256), jnp.bfloat16)

    def found(x, *sizes):
        seen = []
        lower(lambda x: seen.append(heads.worthwhile(x, *sizes)) or x, x)
        return seen == [True]

    assert found(x, 256, 64) == compat.INTERPRET_AVAILABLE
    assert not found(x, 256, 32) and not found(x, 96, 64) and not found(x.update(dtype=jnp.float32), 256, 64)
    assert not heads.worthwhile(x, 256, 64), "this is no GPU"
    odd = lambda tokens: jax.ShapeDtypeStruct((1, tokens, 2 * 10 * 256), jnp.bfloat16)  # noqa: E731
    assert not found(odd(100_001), 256, 64), "a program for each token"
    assert found(odd(1), 256, 64) == compat.INTERPRET_AVAILABLE


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "sizes",
    [*SIZES, (1, 1, 2, 4, 256, 64), (1, 8192, 4, 4, 256, 64), (3, 1001, 2, 4, 256, 64), (1, 300004, 1, 1, 64, 64)],
    ids=str,
)
def test_gpu(sizes, dtype):
    arrays = operands(*sizes, dtype, seed=2)
    call = jax.jit(functools.partial(queries_and_keys, group=sizes[3], epsilon=1e-6))
    found = call(*arrays)
    for got, want in zip(found, exact(*arrays, sizes[3]), strict=True):
        assert relative(got, want) < BOUND[dtype]
    assert all(np.array_equal(a, b) for a, b in zip(found, call(*arrays), strict=True))
