"""The ring on real GPUs, with the block that implementation=None picks there, against the float32 reference."""

import jax
import jax.numpy as jnp
import pytest

from ring_jax.bench.ring import check
from ring_jax.flash.backends import select


@pytest.mark.multi_gpu
@pytest.mark.parametrize("strategy", ["ring", "all_gather", "pass_q", "ulysses"])
@pytest.mark.parametrize("heads, kv_heads, head_size", [(8, 4, 64), (8, 4, 128), (8, 4, 256)])
def test_forward_and_gradients_over_all_gpus(strategy, heads, kv_heads, head_size):
    ranks = 2 if len(jax.devices()) < 4 else 4
    implementation = "mosaic" if jax.devices()[0].compute_capability == "9.0" else None
    assert check(ranks, strategy, heads, kv_heads, head_size, implementation=implementation) < 1e-2


@pytest.mark.gpu
def test_hopper_gets_the_mosaic_kernel():
    query, kv = jnp.ones((1, 128, 4, 128), jnp.bfloat16), jnp.ones((2, 1, 128, 4, 128), jnp.bfloat16)
    hopper = jax.devices()[0].compute_capability == "9.0"
    assert select(None, query, kv).name == ("mosaic" if hopper else "xla")
