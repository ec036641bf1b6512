"""The experts' forward kernels: lowered for CUDA and interpreted on the CPU, compared with float32 on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.moe.hopper import backend
from ring_jax.moe.hopper.config import SHARED_MEMORY_BYTES, ExpertsConfig, GroupedConfig, experts_config
from ring_jax.moe.hopper.plan import Plan
from ring_jax.moe.hopper.rows_kernel import rows_product
from ring_jax.mosaic import compat
from tests.moe.hopper.helpers import EVEN, LONELY, ONE_EXPERT, SKEWED, exact, operands
from tests.support.hopper import lower
from tests.support.marks import interpreted
from tests.support.numbers import relative

# Rounding hidden values and rows to bfloat16: 2^-9 at most each, 0.3 times that in the mean.
BOUND = {jnp.bfloat16: 4e-3, jnp.float16: 5e-4}

LAYERS = [(256, 8, 2048, 512), (8, 2, 512, 192), (64, 6, 1024, 1408)]  # experts, of a token, width, features


def shapes(tokens, layer, dtype):
    experts, per_token, width, features = layer
    S = jax.ShapeDtypeStruct
    return (
        S((tokens, width), dtype),
        S((experts, width, 2, features), dtype),
        S((experts, features, width), dtype),
        S((tokens, per_token), jnp.float32),
        S((tokens, per_token), jnp.int32),
    )


# Lowering for CUDA, on the CPU.


@pytest.mark.parametrize("tokens", [1, 16, 512, 8192])
def test_lowers_every_config(tokens):
    text = lower(backend.run_experts, *shapes(tokens, LAYERS[0], jnp.bfloat16)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize("layer", LAYERS[1:], ids=str)
def test_lowers_other_layers(layer):
    lower(backend.run_experts, *shapes(300, layer, jnp.float16))


def test_long_sequences_go_in_parts():
    """Memory does not grow without bound: 3 parts of 43691 tokens at most, 8 rows each."""
    text = lower(backend.run_experts, *shapes(131072 + 1, LAYERS[0], jnp.bfloat16)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 6 and "1048584x2048" not in text


# Configs, refusals and plans.


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("per_expert", [0, 4, 20, 1000])
def test_configs_fit_the_layers(layer, per_expert):
    _, _, width, features = layer
    config = experts_config(per_expert, features, width)
    assert max(config.up.shared_memory_bytes, config.down.shared_memory_bytes) <= SHARED_MEMORY_BYTES
    assert features % config.up.result_columns == 0 and width % config.down.columns == 0


@pytest.mark.parametrize(
    "change", [{"rows": 24}, {"rows": 256}, {"columns": 320}, {"width": 16}, {"stages": 2}, {"warpgroups": 3}]
)
def test_config_refuses(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(GroupedConfig(stages=3), **change)


def test_unsupported_reasons():
    def reason(dtype=jnp.bfloat16, layer=LAYERS[0]):
        return backend.unsupported_arrays(*shapes(4, layer, dtype)[:3])

    assert reason() is None
    assert "bfloat16" in reason(jnp.float32)
    assert "width" in reason(layer=(8, 2, 192, 64))
    assert "features" in reason(layer=(8, 2, 256, 96))
    assert "Hopper" in backend.unsupported_reason(*shapes(4, LAYERS[0], jnp.bfloat16)[:3])


@pytest.mark.parametrize("kind", [EVEN, SKEWED, ONE_EXPERT, LONELY])
def test_plan_holds_every_row_once(kind):
    experts = np.asarray(operands(3, 200, 3, 7, 8, 8, jnp.float32, kind, elsewhere=2)[-1])
    plan = jax.jit(Plan.of, static_argnums=(1, 2))(experts, 7, 32)
    order, flat, found = np.asarray(plan.order), experts.reshape(-1), []
    assert np.array_equal(plan.tokens, order // 3) and sorted(order) == list(range(600))
    for expert, first, rows, _ in np.asarray(plan.tiles)[: int(plan.count[0])]:
        assert 0 < rows <= 32 and (flat[order[first : first + rows]] == expert).all()
        found += order[first : first + rows].tolist()
    assert found == [int(a) for a in order if flat[a] < 7]
    for expert, (first, end) in enumerate(np.asarray(plan.groups)):
        assert (flat[order[first:end]] == expert).all() and end - first == (flat == expert).sum()


def test_plan_of_many_assignments():
    """Key and place no longer fit one word: two operands are sorted."""
    experts = jax.random.randint(jax.random.key(0), (2**12, 2), 0, 2**20, jnp.int32)
    plan = jax.jit(lambda e: Plan.of(e, 2**20 - 5, 2**13).order)(experts)
    flat = np.asarray(experts).reshape(-1)
    assert np.array_equal(plan, np.argsort(np.minimum(flat, 2**20 - 5), kind="stable"))


# Interpreted on the CPU: barriers, slots, tiles, group ends.

SMALL = ExpertsConfig(
    up=GroupedConfig(columns=128, stages=4, swiglu=True, multiprocessors=2),
    down=GroupedConfig(columns=128, stages=3, multiprocessors=3),
)
KEPT = GroupedConfig(columns=128, stages=3, swiglu=True, multiprocessors=2)
FEW = ExpertsConfig(
    up=GroupedConfig(rows=16, warpgroups=1, columns=64, width=32, stages=4, swiglu=True, multiprocessors=2),
    down=GroupedConfig(rows=16, warpgroups=1, columns=128, stages=3, multiprocessors=2),
)


@interpreted
@pytest.mark.parametrize(
    ("tokens", "kind", "config"),
    [(150, SKEWED, SMALL), pytest.param(9, LONELY, FEW, marks=pytest.mark.slow), (1, EVEN, FEW)],
    ids=["many", "few", "one"],
)
def test_interpreted(tokens, kind, config):
    arrays = operands(1, tokens, 2, 4, 128, 64, jnp.bfloat16, kind, elsewhere=2)
    with compat.interpret_mode():
        found = jax.jit(functools.partial(backend.run_experts, config=config))(*arrays)
    assert found.dtype == jnp.float32
    assert relative(found, exact(*arrays)) < BOUND[jnp.bfloat16]


@interpreted
def test_interpreted_argument_is_kept():
    """Gate and up, in the order of rows."""
    x, gate_up, _, _, experts = operands(2, 20, 2, 2, 64, 128, jnp.bfloat16)
    with compat.interpret_mode():
        plan = jax.jit(Plan.of, static_argnums=(1, 2))(experts, 2, 128)
        hidden, kept = rows_product(x, gate_up.reshape(2, 64, 256), plan, KEPT, gather=True, keep=True)
    order = np.asarray(plan.order)
    kernels = np.asarray(gate_up, np.float64)[np.asarray(experts).reshape(-1)[order]]
    gate, up = np.einsum("rd,rdcf->crf", np.asarray(x, np.float64)[order // 2], kernels)
    assert relative(kept, np.concatenate([gate, up], axis=1)) < 3e-3
    assert relative(hidden, gate / (1 + np.exp(-gate)) * up) < 3e-3


# On a GPU.


def check(seed, tokens, layer, dtype, kind, elsewhere=0, **options):
    experts, per_token, width, features = layer
    arrays = operands(seed, tokens, per_token, experts, width, features, dtype, kind, elsewhere)
    found = jax.jit(functools.partial(backend.run_experts, **options))(*arrays)
    error = relative(found, exact(*arrays))
    assert error < BOUND[dtype], error
    return error


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kind", [EVEN, SKEWED, ONE_EXPERT, LONELY])
@pytest.mark.parametrize("tokens", [1, 3, 40, 700, 2500])
def test_gpu(tokens, kind, dtype):
    check(tokens, tokens, (16, 4, 512, 256), dtype, kind, elsewhere=5)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 128, 4096])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_gpu_layers(layer, tokens):
    check(7, tokens, layer, jnp.bfloat16, SKEWED)
