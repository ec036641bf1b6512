"""The ring on real GPUs, with the block that implementation=None picks there, against the float32 reference."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import ring_jax
from ring_jax.bench.flash_forward import relative_error
from ring_jax.bench.ring import check, draw, make_context, stack
from ring_jax.flash import backends
from ring_jax.flash.backends import select
from ring_jax.flash.operands import BlockOptions
from tests.support.strategies import SINGLE_AXIS


@pytest.mark.multi_gpu
@pytest.mark.parametrize("strategy", SINGLE_AXIS)
@pytest.mark.parametrize("heads, kv_heads, head_size", [(8, 4, 64), (8, 4, 128), (8, 4, 256)])
def test_forward_and_gradients_over_all_gpus(strategy, heads, kv_heads, head_size):
    ranks = 2 if len(jax.devices()) < 4 else 4
    implementation = "mosaic" if jax.devices()[0].compute_capability == "9.0" else None
    assert check(ranks, strategy, heads, kv_heads, head_size, implementation=implementation) < 1e-2


@pytest.fixture
def halves(monkeypatch):
    """The kernels take halves of the heads, also where shards are short."""
    jax.clear_caches()
    backend = dataclasses.replace(backends.BACKENDS["mosaic"], can_split_heads=lambda query, kv: True)
    monkeypatch.setitem(backends.BACKENDS, "mosaic", backend)
    yield
    jax.clear_caches()


@pytest.mark.multi_gpu
@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
@pytest.mark.parametrize("kv_heads, head_size", [(2, 64), (3, 128), (4, 256)])
def test_halves_of_the_heads_at_a_time(strategy, kv_heads, head_size, halves):
    ranks = 2 if len(jax.devices()) < 4 else 4
    assert check(ranks, strategy, 12, kv_heads, head_size, implementation="mosaic") < 1e-2


@pytest.mark.multi_gpu
@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
def test_halves_in_a_scan_over_layers(strategy, halves):
    test_a_scan_over_layers_gives_what_a_loop_gives(strategy, 1024)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
@pytest.mark.parametrize("length", [1024, 1048])  # whole query tiles are resumed in place, others are not
def test_a_scan_over_layers_gives_what_a_loop_gives(strategy, length):
    """XLA once took slices of the scan's arrays into one fusion with the kernel, and lost what is updated in place."""
    context = make_context(2 if len(jax.devices()) < 4 else 4, strategy)
    query, keys, values = draw(context, length, 8, 4, 128, layers=3)

    def loss(*args):
        for key, value in zip(*args[1:], strict=True):
            args = (ring_jax.ring_attention(args[0], key, value, is_causal=True, context=context), *args[1:])
        return jnp.sum(args[0].astype(jnp.float32) ** 2)

    scanned = stack(context, is_causal=True, layers=3, gradients=True)(query, keys, values)
    unrolled = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, keys, values)
    assert max(map(relative_error, scanned, unrolled)) < 5e-3


@pytest.mark.gpu
def test_hopper_gets_the_mosaic_kernel():
    query, kv = jnp.ones((1, 128, 4, 128), jnp.bfloat16), jnp.ones((2, 1, 128, 4, 128), jnp.bfloat16)
    hopper = jax.devices()[0].compute_capability == "9.0"
    assert select(None, query, kv, BlockOptions(1.0)).name == ("mosaic" if hopper else "xla")
