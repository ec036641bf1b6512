"""Every strategy with the Hopper kernels lowers for CUDA on a machine without a GPU, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import ring_jax
from ring_jax.flash.backends import select
from ring_jax.flash.operands import BlockOptions
from ring_jax.mosaic import compat
from tests.support.hopper import on_hoppers
from tests.support.marks import needs_in_place


@pytest.fixture
def hopper():
    with on_hoppers(context=4):
        yield jax.sharding.get_abstract_mesh()


@pytest.mark.parametrize("strategy, blocks", [("ring", 4), ("pass_q", 4), ("all_gather", 2), ("ulysses", 1)])
def test_strategies_lower_for_cuda(hopper, strategy, blocks):
    context = ring_jax.ContextParallel("context", layout="zigzag", strategy=strategy)
    query, key = (jax.ShapeDtypeStruct((1, 1024, n, 128), jnp.bfloat16) for n in (8, 4))

    def attend(q, k, v):
        return ring_jax.ring_attention(q, k, v, is_causal=True, context=context)

    def gradients(q, k, v, d):
        return jax.vjp(attend, q, k, v)[1](d)

    def kernels(f, *args):
        text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        return text.count("stablehlo.custom_call @mosaic_gpu")

    forward = kernels(attend, query, key, key)
    assert forward == blocks, "implementation=None must pick the Hopper kernel, unrolled hop by hop"
    assert kernels(gradients, query, key, key, query) >= 2 * blocks


@needs_in_place
@pytest.mark.parametrize("strategy, kernels", [("ring", 4 + 5), ("all_gather", 3 + 4)])
def test_own_keys_at_both_ends_and_short_shards_in_halves(hopper, strategy, kernels):
    context = ring_jax.ContextParallel("context", layout="zigzag", strategy=strategy)
    query, key = (jax.ShapeDtypeStruct((1, 16384, n, 128), jnp.bfloat16) for n in (32, 8))

    def gradients(q, k, v, d):
        attend = functools.partial(ring_jax.ring_attention, is_causal=True, context=context)
        return jax.vjp(attend, q, k, v)[1](d)

    text = jax.jit(gradients).trace(query, key, key, query).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == kernels


def test_kernels_lower_under_x64(hopper):
    context = ring_jax.ContextParallel("context", layout="zigzag", strategy="all_gather")
    x = jax.ShapeDtypeStruct((1, 512, 2, 128), jnp.bfloat16)

    def loss(q, k, v):
        return ring_jax.ring_attention(q, k, v, is_causal=True, context=context).astype(jnp.float32).sum()

    with jax.enable_x64(True):
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, x, x).lower(lowering_platforms=("cuda",))


def test_named_kernel_says_why_it_cannot_run_here():
    x = jnp.ones((1, 8, 2, 64), jnp.bfloat16)
    bounds = jnp.zeros((1, 8), jnp.int32), jnp.full((1, 8), 8, jnp.int32)
    with pytest.raises(
        NotImplementedError, match="implementation='mosaic' cannot run here: needs an NVIDIA Hopper GPU, this is cpu"
    ):
        ring_jax.flash_attention(x, x, x, *bounds, implementation="mosaic")


def test_the_kernel_is_the_default_wherever_it_runs(hopper):
    def chosen(dtype, head_size, cap=None):
        query, kv = (
            jax.ShapeDtypeStruct((1, 64, 4, head_size), dtype),
            jax.ShapeDtypeStruct((2, 1, 64, 2, head_size), dtype),
        )
        options = BlockOptions(1.0, cap)
        return select(None, query, kv, options).name, select("mosaic", query, kv, options).name

    for case in ((jnp.bfloat16, 128), (jnp.float16, 256), (jnp.bfloat16, 64), (jnp.bfloat16, 128, 30.0)):
        assert chosen(*case) == ("mosaic", "mosaic")
    with pytest.raises(NotImplementedError, match="needs bfloat16 or float16, got float32"):
        chosen(jnp.float32, 128)


@pytest.mark.parametrize("deterministic", [None, True, False])
def test_repeatable_gradients_or_the_fastest(hopper, deterministic):
    bounds = jnp.zeros((1, 256), jnp.int32), jnp.full((1, 256), 256, jnp.int32)
    x = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)

    def loss(*qkv):
        return ring_jax.flash_attention(*qkv, *bounds, deterministic=deterministic)[0].sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    # At this head size repeating costs more than 10%, so it has to be asked for.
    assert ("flash_backward_fused" in text) == (deterministic is not True and compat.INTERPRET_AVAILABLE)


@pytest.mark.parametrize("implementation", [None, "cudnn"])
def test_auto_takes_the_ring_where_cudnn_needs_one(implementation):
    """cuDNN takes no causal mask over gathered keys: on other GPUs than Hopper that would leave XLA."""
    device = AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", platform="gpu", num_cores=108)
    mesh = AbstractMesh((4,), ("context",), axis_types=(AxisType.Auto,), abstract_device=device)
    context = ring_jax.ContextParallel("context", layout="zigzag")
    x = jax.ShapeDtypeStruct((1, 4096, 4, 128), jnp.bfloat16)

    def text(is_causal):
        attend = functools.partial(
            ring_jax.ring_attention, is_causal=is_causal, context=context, implementation=implementation
        )
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.jit(attend).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()

    causal, full = text(True), text(False)
    assert "cudnn" in causal and "collective_permute" in causal and "all_gather" not in causal
    assert "cudnn" in full and "collective_permute" not in full


def test_cudnn_does_not_promise_to_repeat(hopper):
    query, kv = jnp.zeros((1, 64, 2, 128), jnp.bfloat16), jnp.zeros((2, 1, 64, 2, 128), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="need not repeat bit by bit"):
        select("cudnn", query, kv, BlockOptions(1.0, deterministic=True), "full")
