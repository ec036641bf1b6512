"""`vmap`, `grad` of `vmap` and `vmap` of `grad` over everything that communicates, against a Python loop over single calls.

What a collective's batching rule gets wrong has the right shape, so only numbers show it.
"""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ring_jax
from ring_jax import gdn
from ring_jax.context.strategies import STRATEGIES
from ring_jax.moe import MoEWeights, moe
from tests.gdn.helpers import jit, operands
from tests.support.mesh import make_mesh
from tests.support.strategies import ALIKE

MAPPED, RANKS = 2, 4
BOUND = {np.float32: 1e-5, np.float64: 1e-12}  # relative to the largest entry
# In float64 a wrong axis cannot hide in rounding; float32 is the same programs with other numbers.
DTYPES = pytest.mark.parametrize(
    "dtype", [np.float64, pytest.param(np.float32, marks=pytest.mark.slow)], ids=["float64", "float32"]
)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
EVERY_STRATEGY = [slow(name) if name in ALIKE else name for name in STRATEGIES]


def check(function, arrays, dtype):
    """`function` of `arrays`, which have a mapped axis first, under the three ways to map its gradient."""
    with jax.enable_x64(dtype is np.float64):
        arrays = [jnp.asarray(x, dtype) for x in arrays]
        one = [x[0] for x in arrays]
        rng = np.random.default_rng(1)
        weights = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), jax.eval_shape(function, *one))

        def loss(*arrays):
            out = function(*arrays)
            return sum(jnp.vdot(x, w) for x, w in zip(jax.tree.leaves(out), jax.tree.leaves(weights), strict=True))

        index = tuple(range(len(arrays)))
        single = jax.value_and_grad(loss, index)

        @jit
        def mapped(*arrays):
            # The mapped axis elsewhere, since batching rules differ with its place.
            behind = [jnp.moveaxis(x, 0, min(2, x.ndim - 1)) for x in arrays]
            axes = tuple(min(2, x.ndim - 1) for x in arrays)
            of_vmap = jax.grad(lambda *a: jax.vmap(loss, in_axes=axes)(*a).sum(), index)(*behind)
            of_vmap = [jnp.moveaxis(x, axis, 0) for x, axis in zip(of_vmap, axes, strict=True)]
            return jax.vmap(single)(*arrays), jax.vmap(jax.grad(loss, index), in_axes=axes)(*behind), tuple(of_vmap)

        alone = jit(single)
        values, gradients = (
            [np.stack(x) for x in zip(*leaves, strict=True)]
            for leaves in zip(*[_leaves(alone(*(x[i] for x in arrays))) for i in range(MAPPED)], strict=True)
        )
        (found_values, found), *others = mapped(*arrays)
    compare("value", found_values, values[0], BOUND[dtype])
    for way, each in zip(("vmap of grad", "vmap of grad, axis 2", "grad of vmap"), (found, *others), strict=True):
        for i, (a, b) in enumerate(zip(each, gradients, strict=True)):
            compare(f"{way}, argument {i}", a, b, BOUND[dtype])


def _leaves(value_and_gradients):
    value, gradients = value_and_gradients
    return [np.asarray(value)], [np.asarray(x) for x in gradients]


def compare(what, found, expected, bound):
    scale = np.abs(expected).max()
    assert scale > 0, f"{what}: nothing to compare"
    error = np.abs(np.asarray(found) - expected).max() / scale
    assert error <= bound, f"{what}: {error}"


def normal(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(MAPPED, *shape)) for shape in shapes]


@DTYPES
@pytest.mark.parametrize("strategy", EVERY_STRATEGY)
def test_attention(strategy, dtype):
    if strategy == "ring_ulysses":
        axis, mesh = ("outer", "inner"), make_mesh(outer=2, inner=2)
    else:
        axis, mesh = "context", make_mesh(context=RANKS)
    context = ring_jax.ContextParallel(axis, layout="zigzag", mesh=mesh, strategy=strategy)
    attend = functools.partial(ring_jax.ring_attention, context=context, is_causal=True, return_residual=True)
    check(attend, normal((2, 32, 4, 8), (2, 32, 4, 8), (2, 32, 4, 8)), dtype)


@DTYPES
@pytest.mark.parametrize(
    "ranks, way", [slow(4, "batch"), (4, "head"), slow(2, "state"), slow(4, "state"), (8, "state")]
)
def test_gated_delta_rule(ranks, way, dtype):
    """`state` gathers all pairs up to four ranks and scans beyond."""
    context = ring_jax.ContextParallel("context", layout="zigzag", mesh=make_mesh(context=ranks))
    rule = functools.partial(ring_jax.gated_delta_rule, context=context, strategy=way)
    each = [operands(i, 2, 32, 4, 4, 8, 8)[:5] for i in range(MAPPED)]
    check(rule, [np.stack(x) for x in zip(*each, strict=True)], dtype)


@DTYPES
@pytest.mark.parametrize("way", ["state", *(pytest.param(way, marks=pytest.mark.slow) for way in ("batch", "head"))])
def test_gdn_layers(way, dtype):
    """With what the convolution and the projections move, and padding of segment ids."""
    mesh = make_mesh(context=2)
    context = ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh)
    heads = gdn.Heads(2, 2, 8, 8)
    (x,) = normal((2, 16, 12))
    kernel, conv = (0.3 * np.random.default_rng(2).normal(size=s) for s in ((12, heads.features), (4, heads.features)))
    ids = np.array([[0] * 5 + [1] * 8 + [-1] * 3] * 2, np.int32)

    def layer(params, x, cache, partition):
        mixed, tail = partition.causal_convolution(x @ params[0], params[1])
        q, k, v = (y.reshape(*y.shape[:2], 2, 8) for y in jnp.split(jnp.tanh(mixed), 3, axis=-1))
        wide = q.dtype
        log_decay = -jnp.ones(q.shape[:3], wide)
        out, state = partition.gated_delta_rule(q, k, v, log_decay, jnp.full(q.shape[:3], 0.3, wide))
        return out, (state, tail)

    def run(x, kernel, conv):
        return gdn.run(layer, (kernel, conv), x, context=context, strategy=way, segment_ids=jnp.asarray(ids))

    check(run, [x, *(np.stack([w] * MAPPED) for w in (kernel, conv))], dtype)


@DTYPES
@pytest.mark.parametrize("spread", [True, slow(False)], ids=["gathered", "same tokens"])
def test_experts(spread, dtype):
    """The exchange of experts; `ragged` has no CPU form, and its collective no batching rule."""
    mesh = make_mesh(expert=2, tensor=2)
    tokens = P("expert" if spread else None)

    def run(x, router, gate_up, down):
        def local(x, weights):
            options = {"expert_axis": "expert", "tensor_axis": "tensor", "tokens_spread": spread}
            return moe(x, weights, top_k=2, **options)[0]

        kernels = MoEWeights(P(), P("expert", None, None, "tensor"), P("expert", "tensor"))
        spread_out = jax.shard_map(local, mesh=mesh, in_specs=(tokens, kernels), out_specs=tokens)
        return spread_out(x, MoEWeights(router, gate_up, down))

    check(run, normal((8, 6), (6, 4), (4, 6, 2, 4), (4, 4, 6)), dtype)


@DTYPES
@pytest.mark.parametrize("layout", ["zigzag", slow("striped")])
def test_resharding(layout, dtype):
    context = ring_jax.ContextParallel("context", layout=layout, mesh=make_mesh(context=RANKS))

    def there_and_back(x):
        x = jnp.sin(context.to_layout(x))
        other = jnp.cos(context.relayout(x, ring_jax.Zigzag(2)))
        return x, other, context.from_layout(x * x, 13)

    check(there_and_back, normal((2, 13, 3)), dtype)


_ALONE = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
import ring_jax
from ring_jax.models.qwen3_5 import Config, Qwen3_5
from ring_jax.gdn import Heads

rng = np.random.default_rng(0)
for batch, key_heads, heads in ((2, 2, 4), (1, 1, 2)):
    q, k = rng.normal(size=(2, 2, batch, 16, key_heads, 8)) / 3
    v, g, b = rng.normal(size=(2, batch, 16, heads, 8)), -rng.uniform(size=(2, batch, 16, heads)), rng.uniform(size=(2, batch, 16, heads))
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v, g, b)]
    gradient = jax.grad(lambda *a: (ring_jax.gated_delta_rule(*a, implementation="chunked")[0] ** 2).sum(), tuple(range(5)))
    found = jax.jit(jax.vmap(gradient))(*arrays)
    for i in range(2):
        for a, b in zip(found, jax.jit(gradient)(*(x[i] for x in arrays))):
            np.testing.assert_allclose(a[i], b, atol=1e-5 * float(abs(b).max()))

config = Config(family="qwen3_5", vocab_size=32, hidden_size=16, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=8,
                linear=Heads(1, 2, 8, 8), mlp_size=16, max_positions=64, tie_embeddings=True)
model = Qwen3_5(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
graph, state = nnx.split(model)
tokens = jnp.asarray(rng.integers(0, 32, size=(2, 2, 12)), jnp.int32)
gradient = jax.grad(lambda state, tokens: nnx.merge(graph, state).loss(tokens))
found = jax.jit(jax.vmap(gradient, in_axes=(None, 0)))(state, tokens)
one = jax.jit(gradient)
for i in range(2):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(one(state, tokens[i]))):
        np.testing.assert_allclose(a[i], b, atol=2e-5 * max(float(abs(b).max()), 1e-3))
print("right")
"""


def test_vmap_of_grad_on_cpus_does_not_end_the_process():
    """In a process of its own; see docs/upstream/cpu_product_sum.py."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    found = subprocess.run([sys.executable, "-c", _ALONE], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0 and found.stdout.strip() == "right", found.stderr[-2000:]
