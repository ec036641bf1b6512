"""Which backend computes the gated delta rule, and that it is the one which runs, also in a layer."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import ring_jax
from ring_jax.gdn.backends import select
from ring_jax.nn import GatedDeltaNet
from tests.support.hopper import on_hopper

RUNS = jax.__version_info__ >= (0, 11, 2)


def operands(dtype=jnp.bfloat16, time=100, size=64):
    like = jax.ShapeDtypeStruct
    key, rows = like((1, time, 2, size), dtype), like((1, time, 4), jnp.float32)
    return key, key, like((1, time, 4, size), dtype), rows, rows


def test_the_kernel_is_the_default_wherever_it_runs():
    def chosen(implementation=None, **changes):
        return select(implementation, *operands(**changes)[:3]).name

    assert chosen() == "chunked" and chosen(time=2) == "recurrent"
    with pytest.raises(NotImplementedError, match="'mosaic' cannot run here: needs .*Hopper"):
        chosen("mosaic")
    with pytest.raises(ValueError, match="unknown implementation 'triton'"):
        chosen("triton")
    with on_hopper():
        assert chosen() == ("mosaic" if RUNS else "chunked")
        assert chosen(dtype=jnp.float32) == "chunked"
        assert chosen(size=96) == "chunked" and chosen(time=1) == "recurrent" and chosen("chunked") == "chunked"
        if not RUNS:
            with pytest.raises(NotImplementedError, match="needs jax 0.11.2 or later"):
                chosen("mosaic")


@pytest.mark.skipif(not RUNS, reason="the kernel needs jax 0.11.2 or later")
@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({}, "gated_delta_forward"),
        ({"implementation": "chunked"}, None),
        ({"precision": "highest"}, "gated_delta_split"),
        ({"precision": "highest", "implementation": "chunked"}, None),
        ({"precision": "highest", "implementation": "mosaic"}, "gated_delta_split"),
    ],
    ids=str,
)
def test_what_was_chosen_runs(options, kernel):
    def loss(*operands):
        return ring_jax.gated_delta_rule(*operands, **options)[0].astype(jnp.float32).sum()

    with on_hopper():
        text = jax.jit(jax.value_and_grad(loss)).trace(*operands()).lower(lowering_platforms=("cuda",)).as_text()
    assert ("mosaic_gpu" in text) == (kernel is not None) and (kernel or "module") in text


@pytest.mark.skipif(not RUNS, reason="the kernel needs jax 0.11.2 or later")
def test_a_layer_in_16_bits_runs_the_kernel():
    layer = GatedDeltaNet(32, 1, 2, 64, 64, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    with on_hopper():
        call = jax.jit(lambda x: layer(x)[0])
        text = (
            call.trace(jax.ShapeDtypeStruct((1, 100, 32), jnp.bfloat16)).lower(lowering_platforms=("cuda",)).as_text()
        )
    assert "mosaic_gpu" in text


@pytest.mark.skipif(not RUNS, reason="the kernel needs jax 0.11.2 or later")
@pytest.mark.parametrize(
    ("strategy", "changes", "kernel"),
    [
        (None, {"time": 1}, False),
        (None, {"dtype": jnp.float32}, False),
        ("state", {"time": 1024}, True),
        ("head", {"time": 1024}, True),
    ],
)
def test_highest_precision(strategy, changes, kernel):
    """Nothing of it in 16 bits, over ranks neither: there states pass by XLA's transition."""
    options: dict = {"precision": "highest"}
    with on_hopper(2, "context"):
        if strategy is not None:
            mesh = jax.sharding.get_abstract_mesh()
            options |= {
                "context": ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh),
                "strategy": strategy,
            }
        call = functools.partial(ring_jax.gated_delta_rule, **options)
        text = jax.jit(call).trace(*operands(**changes)).lower(lowering_platforms=("cuda",)).as_text()
    assert ("gated_delta_split" in text) == kernel
    assert "gated_delta_forward" not in text and "gated_delta_transition" not in text


@pytest.mark.skipif(not RUNS, reason="the kernels need jax 0.11.2 or later")
def test_chunks_are_prepared_once():
    """Passing states, a chunk's transition and the rule itself want the same inverses: one program text, which XLA merges."""
    with on_hopper(2, "context"):
        context = ring_jax.ContextParallel("context", layout="zigzag", mesh=jax.sharding.get_abstract_mesh())
        call = functools.partial(ring_jax.gated_delta_rule, context=context, strategy="state")
        text = jax.jit(call).trace(*operands(time=1024)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 3, "preparation, transition, rule"
    assert text.count("call @prepare") == 2
