"""The experts' gradients: lowered for CUDA and interpreted on the CPU, compared with float32 on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ring_jax.moe.hopper import backend
from ring_jax.moe.hopper.config import SHARED_MEMORY_BYTES, GroupedConfig, outer_config, product_config
from ring_jax.moe.hopper.outer_kernel import outer_product
from ring_jax.moe.hopper.plan import Plan
from ring_jax.moe.hopper.rows_kernel import rows_product
from ring_jax.mosaic import compat
from tests.moe.hopper.helpers import EVEN, LONELY, ONE_EXPERT, SKEWED, exact, operands
from tests.moe.hopper.test_forward import LAYERS, shapes
from tests.support.hopper import lower
from tests.support.marks import interpreted
from tests.support.numbers import relative

NAMES = "dx", "dgate_up", "ddown", "dweights"
# Gate, up and the gradients between the products are rounded as well: a few roundings in a row.
BOUND = {jnp.bfloat16: 1e-2, jnp.float16: 1.3e-3}


def gradients(function, arrays, cotangent):
    *arrays, experts = arrays
    return jax.vjp(lambda *a: function(*a, experts), *arrays)[1](cotangent)


def compare(arrays, dtype, seed=3, **options):
    cotangent = jnp.asarray(np.random.default_rng(seed).standard_normal(arrays[0].shape), jnp.float32)
    found = jax.jit(functools.partial(gradients, functools.partial(backend.run_experts, **options)))(arrays, cotangent)
    wide = tuple(a.astype(jnp.float32) for a in arrays[:-1]) + arrays[-1:]
    wanted = jax.jit(functools.partial(gradients, exact))(wide, cotangent)
    errors = {name: relative(a, b) for name, a, b in zip(NAMES, found, wanted, strict=True)}
    assert max(errors.values()) < BOUND[dtype], errors
    return errors


@pytest.mark.parametrize("tokens", [1, 2048])
def test_lowers(tokens):
    def run(*arrays):
        return gradients(backend.run_experts, arrays, jnp.ones(arrays[0].shape, jnp.float32))

    # The first product forward (nothing needs the second one), two backward, and two gradients of weights.
    assert lower(run, *shapes(tokens, LAYERS[0], jnp.bfloat16)).as_text().count("custom_call @mosaic_gpu") == 5
    lower(run, *shapes(tokens, LAYERS[1], jnp.float16))


def test_lowers_inside_shard_map():
    """Experts over two ranks: weights vary over the axis, tokens are the same."""
    axes = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("expert",), devices=jax.devices("cpu")[:2], axis_types=axes)

    def local(x, gate_up, down, weights, experts):
        experts = experts - jax.lax.axis_index("expert") * gate_up.shape[0]
        return jax.lax.psum(backend.run_experts(x, gate_up, down, weights, experts, total=256), "expert")

    run = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("expert"), P("expert"), P(), P()), out_specs=P())

    def both(*arrays):
        *arrays, experts = arrays
        y, pull = jax.vjp(lambda *a: run(*a, experts), *arrays)
        return y, pull(y)

    text = jax.jit(both).trace(*shapes(512, LAYERS[0], jnp.bfloat16)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 6


@pytest.mark.parametrize("size", [64, 128, 192, 512, 1408, 2048])
def test_configs_fit(size):
    for config in (product_config(size), outer_config(size, size)):
        assert config.shared_memory_bytes <= SHARED_MEMORY_BYTES and size % config.columns == 0
    assert size % outer_config(size, size).rows == 0


@interpreted
def test_interpreted_outer_product():
    """Rows of experts that end anywhere, and one expert without rows."""
    rng = np.random.default_rng(2)
    experts = jnp.asarray(np.array([[0, 2]] * 30 + [[2, 3]] * 9 + [[5, 2]] * 3), jnp.int32)
    x, rows = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((42, 128), (84, 64)))
    with compat.interpret_mode():
        plan = jax.jit(Plan.of, static_argnums=(1, 2))(experts, 4, 128)
        config = GroupedConfig(columns=64, stages=3, multiprocessors=2)
        first = outer_product(x, rows, plan, config, gather_a=True)
        config = GroupedConfig(rows=64, columns=128, stages=3, warpgroups=1, multiprocessors=1)
        second = outer_product(rows, x, plan, config, gather_b=True)
    wanted = np.zeros((4, 128, 64))
    for expert, (begin, end) in enumerate(np.asarray(plan.groups)):
        left = np.asarray(x, np.float64)[np.asarray(plan.tokens)[begin:end]]
        wanted[expert] = left.T @ np.asarray(rows, np.float64)[begin:end]
    assert not np.asarray(first)[1].any()
    assert relative(first, wanted) < 3e-3 and relative(second, wanted.swapaxes(1, 2)) < 3e-3


@interpreted
def test_interpreted_transposed_weights():
    x, _, down, _, experts = operands(4, 40, 2, 3, 128, 64, jnp.bfloat16, SKEWED)
    config = GroupedConfig(columns=64, stages=4, multiprocessors=2)
    with compat.interpret_mode():
        plan = jax.jit(Plan.of, static_argnums=(1, 2))(experts, 3, 128)
        found = rows_product(x, down, plan, config, gather=True, transposed=True)
    rows, order = np.asarray(x, np.float64)[np.asarray(plan.tokens)], np.asarray(plan.order)
    kernels = np.asarray(down, np.float64)[np.asarray(experts).reshape(-1)[order]]
    assert relative(found, np.einsum("rd,rfd->rf", rows, kernels)) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kind", [EVEN, SKEWED, ONE_EXPERT, LONELY])
@pytest.mark.parametrize("tokens", [1, 40, 1500])
def test_gpu(tokens, kind, dtype):
    compare(operands(tokens, tokens, 4, 16, 512, 256, dtype, kind, elsewhere=5), dtype)


@pytest.mark.gpu
def test_gpu_recomputes():
    compare(operands(9, 700, 4, 16, 512, 256, jnp.bfloat16, SKEWED), jnp.bfloat16, recompute=True)


@pytest.mark.gpu
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_gpu_layers(layer):
    experts, per_token, width, features = layer
    compare(operands(8, 2048, per_token, experts, width, features, jnp.bfloat16, SKEWED), jnp.bfloat16)
