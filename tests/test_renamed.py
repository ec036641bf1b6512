"""Public spellings of before still work for this release, and warn."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ring_jax
from ring_jax import gdn
from ring_jax.models.qwen3_5 import Sharding
from ring_jax.moe import MoEWeights, moe
from tests.support.mesh import make_mesh


def context():
    return ring_jax.ContextParallel("context", layout="zigzag", mesh=make_mesh(context=2))


def layer(**options):
    return ring_jax.nn.GatedDeltaNet(8, 1, 1, 4, 4, context=context(), rngs=nnx.Rngs(0), **options)


def rule(**options):
    x = jnp.ones((1, 8, 1, 4)) / 2
    return ring_jax.gated_delta_rule(x, x, x, -x[..., 0], x[..., 0], context=context(), **options)[0]


def run(**options):
    return gdn.run(lambda _, x, caches, split: (x, caches), None, jnp.ones((2, 8, 3)), context=context(), **options)[0]


@pytest.mark.parametrize(
    ("call", "old", "new"),
    [
        (rule, {"way": "state"}, {"strategy": "state"}),
        (run, {"way": "batch"}, {"strategy": "batch"}),
        (lambda **o: layer(**o).strategy, {"way": "head"}, {"strategy": "head"}),
        (lambda **o: Sharding(context(), **o).gdn_strategy, {"way": "state"}, {"gdn_strategy": "state"}),
    ],
    ids=["gated_delta_rule", "run", "GatedDeltaNet", "Sharding"],
)
def test_arguments(call, old, new):
    with pytest.warns(DeprecationWarning, match="way= is called .*strategy= now"):
        found = call(**old)
    np.testing.assert_array_equal(found, call(**new))


def test_experts():
    weights, x = MoEWeights(jnp.ones((4, 8)), jnp.ones((8, 4, 2, 6)), jnp.ones((8, 6, 4))), jnp.ones((3, 4))
    with pytest.warns(DeprecationWarning, match="exchange= is called strategy= now"):
        moe(x, weights, top_k=2, exchange=None)  # was the default


def test_partitions():
    alone = ring_jax.nn.GatedDeltaNet(8, 1, 1, 4, 4, rngs=nnx.Rngs(0))
    with pytest.warns(DeprecationWarning, match="spread= is called partition= now"):
        alone(jnp.ones((1, 3, 8)), spread=gdn.OneDevice())
    with pytest.warns(DeprecationWarning, match="gdn.Spread is called Partition now"):
        assert gdn.Spread is gdn.Partition
    with pytest.warns(DeprecationWarning, match="gdn.choose_way is called choose_strategy now"):
        assert gdn.choose_way is gdn.choose_strategy
