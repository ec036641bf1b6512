"""Which backend computes the experts' products, and that it is the one which runs."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from ring_jax.moe import MoEWeights, moe
from ring_jax.moe.backends import select
from ring_jax.mosaic import compat
from tests.support.hopper import on_hopper


def arrays(dtype=jnp.bfloat16, experts=8, width=128, features=64, tokens=64):
    like = jax.ShapeDtypeStruct
    weights = MoEWeights(
        like((width, experts), dtype),
        like((experts, width, 2, features), dtype),
        like((experts, features, width), dtype),
    )
    return like((tokens, width), dtype), weights


def chosen(implementation, x, weights):
    return select(implementation, x, weights.gate_up, weights.down).name


def test_the_kernels_are_the_default_wherever_they_run():
    assert chosen(None, *arrays()) == "xla"
    with pytest.raises(NotImplementedError, match="'mosaic' cannot run here: needs .*Hopper|needs jax 0.11"):
        chosen("mosaic", *arrays())
    with on_hopper():
        assert chosen(None, *arrays()) == ("mosaic" if compat.INTERPRET_AVAILABLE else "xla")
        assert chosen("xla", *arrays()) == "xla"
        assert chosen(None, *arrays(jnp.float32)) == "xla"
        assert chosen(None, *arrays(width=96)) == "xla"


@pytest.mark.skipif(not compat.INTERPRET_AVAILABLE, reason="the kernels need jax 0.11 or later")
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_what_was_chosen_runs(implementation):
    x, weights = arrays()

    def loss(x, weights):
        y, _ = moe(x, weights, top_k=2, implementation=implementation)
        return y.astype(jnp.float32).sum()

    with on_hopper():
        text = jax.jit(jax.grad(loss, (0, 1))).trace(x, weights).lower(lowering_platforms=("cuda",)).as_text()
    assert ("mosaic_gpu" in text) == (implementation is None)


@pytest.mark.skipif(not compat.INTERPRET_AVAILABLE, reason="the kernels need jax 0.11 or later")
def test_the_kernels_run_on_experts_over_an_axis():
    x, weights = arrays()
    spec = MoEWeights(P(), P("expert"), P("expert"))

    def loss(x, weights):
        call = functools.partial(moe, top_k=2, expert_axis="expert", implementation="mosaic")
        sharded = jax.shard_map(lambda x, w: call(x, w)[0], in_specs=(P("expert"), spec), out_specs=P("expert"))
        return sharded(x, weights).astype(jnp.float32).sum()

    with on_hopper(2, "expert"):
        text = jax.jit(jax.grad(loss, (0, 1))).trace(x, weights).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and "all_gather" in text
