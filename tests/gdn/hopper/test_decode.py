"""The Hopper decode kernels: lowered for CUDA and interpreted on the CPU, compared with the oracle on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.gdn import causal_convolution, gated_delta_rule
from ring_jax.gdn.convolved import l2_normalize
from ring_jax.gdn.heads import Heads
from ring_jax.gdn.hopper import decode
from ring_jax.gdn.hopper.decode import DecodeConfig
from ring_jax.mosaic import compat
from ring_jax.nn.gdn import gated_rms_norm
from tests.gdn.helpers import BOUND, numpy_rule, operands, relative
from tests.support.hopper import lower
from tests.support.marks import interpreted, needs_in_place

WIDTH = 4


def step_inputs(seed, batch, time, heads, dtype, layers=None):
    """mixed, ba, state, tail, and the rest by name. Decays from nearly none to below exp(-15)."""
    rng = np.random.default_rng(seed)

    def draw(*shape, dtype=dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    n, dk, dv = heads.value_heads, heads.key_size, heads.value_size
    ba = draw(batch, time, 2 * n) * jnp.asarray(3, dtype)
    stack = () if layers is None else (layers,)
    state = draw(*stack, batch, n, dk, dv, dtype=jnp.float32)
    rest = {
        "weight": draw(WIDTH, heads.features),
        "a_log": jnp.asarray(np.log(rng.uniform(0.0, 16, n)), jnp.float32),
        "dt_bias": jnp.asarray(rng.uniform(-9, 1, n), dtype),
        "gate": draw(batch, time, n, dv),
        "norm_weight": draw(dv, dtype=jnp.float32),
    }
    return draw(batch, time, heads.features), ba, state, draw(batch, WIDTH - 1, heads.features), rest


def oracle(heads, mixed, ba, state, tail, weight, a_log, dt_bias, gate=None, norm_weight=None):
    """The layer's formulas one after the other, in the dtype of the arrays."""
    batch, time, _ = mixed.shape
    y, leaving = causal_convolution(mixed, weight, tail=tail)
    parts = jnp.split(jax.nn.silu(y), np.cumsum(heads.parts)[:-1], axis=2)
    sizes = heads.key_size, heads.key_size, heads.value_size
    q, k, v = (p.reshape(batch, time, -1, s) for p, s in zip(parts, sizes, strict=True))
    b, a = jnp.split(ba, 2, axis=2)
    g = -jnp.exp(a_log)[None, None] * jax.nn.softplus(a + dt_bias[None, None])
    options = {"initial_state": state, "implementation": "reference"}
    out, state = gated_delta_rule(l2_normalize(q), l2_normalize(k), v, g, jax.nn.sigmoid(b), **options)
    return out if gate is None else gated_rms_norm(out, gate, norm_weight, 1e-6), state, leaving


def in_float64(function, *arguments):
    def widen(x):
        return np.asarray(x.astype(jnp.float32), np.float64)

    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        return jax.tree.map(np.asarray, jax.jit(function)(*jax.tree.map(widen, arguments)))


def packed(heads, mixed, ba, rest):
    """What `decode.step` takes: projections by key heads, NaN where nothing is to be read, and the weights."""
    z = rest["gate"] if "gate" in rest else jnp.full((*mixed.shape[:2], heads.parts[2]), jnp.nan, mixed.dtype)
    parts = [*jnp.split(mixed, np.cumsum(heads.parts)[:-1], axis=2), z, *jnp.split(ba, 2, axis=2)]
    projected = jnp.concatenate([x.reshape(*x.shape[:2], heads.key_heads, -1) for x in parts], axis=3)
    more = heads.stride - projected.shape[3]
    projected = jnp.pad(projected, ((0, 0),) * 3 + ((0, more),), constant_values=jnp.nan)
    conv = tuple(jnp.split(rest["weight"], np.cumsum(heads.parts)[:-1], axis=-1))
    weights = decode.StepWeights(conv, rest["a_log"], rest["dt_bias"], rest.get("norm_weight"))
    return projected, weights


def check_step(seed, batch, time, heads, dtype, gated, config=None, layers=None):
    mixed, ba, state, tail, rest = step_inputs(seed, batch, time, heads, dtype, layers)
    if not gated:
        del rest["gate"], rest["norm_weight"]
    layer = None if layers is None else layers - 1
    projected, weights = packed(heads, mixed, ba, rest)
    at, tails = None, tail
    if layers is not None:  # the weights of the first of two groups, the tail of the last layer
        at, tails = (layer, 0), jnp.stack([jnp.full_like(tail, jnp.nan)] * layer + [tail])
        weights = jax.tree.map(lambda w: jnp.stack([w, jnp.full_like(w, jnp.nan)]), weights)
    run = jax.jit(functools.partial(decode.step, heads=heads, config=config, at=at))
    before = np.asarray(state)
    out, new, leaving = run(projected, state, tails, weights)
    np.testing.assert_array_equal(before, state)  # the caller's array is its own
    if layers is not None:
        np.testing.assert_array_equal(new[:layer], before[:layer])
        state, new = state[layer], new[layer]

    def plain(mixed, ba, state, tail, rest):
        return oracle(heads, mixed, ba, state, tail, **rest)

    want, want_state, want_leaving = in_float64(plain, mixed, ba, state, tail, rest)
    assert out.dtype == leaving.dtype == dtype
    assert relative(out.astype(jnp.float32), want) <= float(jnp.finfo(dtype).eps) / 3 + BOUND
    assert relative(new, want_state) <= BOUND
    np.testing.assert_array_equal(np.asarray(leaving, np.float64), want_leaving)


def check_present(seed, heads, dtype, batch=3):
    mixed, ba, state, tail, rest = step_inputs(seed, batch, 1, heads, dtype, layers=2)
    projected, weights = packed(heads, mixed, ba, rest)
    tails, weights = jnp.stack([tail + 1, tail]), jax.tree.map(lambda w: w[None], weights)
    run = jax.jit(functools.partial(decode.step, heads=heads, at=(1, 0)))
    present = np.arange(batch) % 2 == 0
    out, states, leaving = run(projected, state, tails, weights, present=present)
    want, all_states, all_leaving = run(projected, state, tails, weights)
    np.testing.assert_array_equal(out[present], want[present])
    np.testing.assert_array_equal(states[0], state[0])
    np.testing.assert_array_equal(states[1][present], all_states[1][present])
    np.testing.assert_array_equal(states[1][~present], state[1][~present])
    np.testing.assert_array_equal(leaving[present], all_leaving[present])
    np.testing.assert_array_equal(leaving[~present], tail[~present])
    assert (all_states[1][~present] != state[1][~present]).any()


def check_rule(seed, batch, time, key_heads, value_heads, size, dtype, decay, config=None):
    *arrays, state = operands(seed, batch, time, key_heads, value_heads, size, size, decay)
    q, k, v, g, beta = arrays
    q, k, v, beta = (jnp.asarray(x, dtype) for x in (q, k, v, beta))
    run = jax.jit(functools.partial(decode.recurrent, scale=size**-0.5, config=config))
    out, new = run(q, k, v, jnp.asarray(g), beta, initial_state=jnp.asarray(state))
    want, want_state = numpy_rule(
        *(np.asarray(x.astype(jnp.float32)) for x in (q, k, v)), g, beta.astype(jnp.float32), state
    )
    assert out.dtype == dtype
    assert relative(out.astype(jnp.float32), want) <= float(jnp.finfo(dtype).eps) / 3 + BOUND
    assert relative(new, want_state) <= BOUND


# Interpreted on the CPU.


@interpreted
@pytest.mark.parametrize(
    ("gated", "config", "layers"),
    [
        (True, None, 2),
        (True, DecodeConfig(columns=64, warpgroups=1), None),
        (False, None, 2),
        (True, DecodeConfig(columns=64, warpgroups=1, slots=3, walkers=2), 2),
        (False, DecodeConfig(columns=64, warpgroups=1, slots=4, walkers=1), None),
    ],
)
def test_interpreted_step(gated, config, layers):
    with compat.interpret_mode():
        batch = 2 if config is None or not config.slots else 3  # six heads: one walker has six, two have three each
        check_step(1, batch, 2, Heads(1, 2, 64, 64), jnp.float32, gated, config, layers)


@interpreted
def test_rows_without_a_token():
    """Their states and tails stay bit for bit; the others' are what they are without them."""
    with compat.interpret_mode():
        check_present(4, Heads(1, 2, 64, 64), jnp.float32)


@interpreted
@pytest.mark.parametrize("decay", ["none", "slow", "fast", "qwen", "mixed"])
def test_interpreted_rule(decay):
    with compat.interpret_mode():
        check_rule(2, 1, 3, 1, 2, 64, jnp.float32, decay)


# Lowering for CUDA, on the CPU.


CONFIGS = [
    (True, DecodeConfig(columns=32, warpgroups=4)),
    (True, DecodeConfig(columns=64, warpgroups=2)),
    (True, DecodeConfig(columns=128, warpgroups=1)),
    (False, DecodeConfig(columns=32, warpgroups=1)),
    (False, DecodeConfig(columns=64, warpgroups=1)),
    (True, DecodeConfig(columns=128, warpgroups=1, slots=3)),
    (False, DecodeConfig(columns=128, warpgroups=1, slots=3)),
]


@needs_in_place
@pytest.mark.parametrize(("gated", "config"), CONFIGS)
def test_lowers_step(gated, config):
    heads = Heads(4, 8, 128, 128)
    *arrays, rest = jax.eval_shape(functools.partial(step_inputs, 0, 2, 2, heads, jnp.bfloat16))
    if not gated:
        del rest["gate"], rest["norm_weight"]

    def run(mixed, ba, state, tail, rest):
        projected, weights = packed(heads, mixed, ba, rest)
        return decode.step(projected, state, tail, weights, heads=heads, config=config)

    text = lower(run, *arrays, rest, donate=(2,)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert text.count("output_operand_alias<") == 1


@needs_in_place
def test_layers_share_kernels():
    heads = Heads(2, 4, 128, 128)
    mixed, ba, state, tail, rest = jax.eval_shape(functools.partial(step_inputs, 0, 1, 1, heads, jnp.bfloat16, 3))

    def run(mixed, ba, states, tail, rest):
        projected, weights = packed(heads, mixed, ba, rest)
        weights, tails = jax.tree.map(lambda w: w[None], weights), jnp.stack([tail] * 3)
        found = []  # all of it is used, as models do: what is not would be cut out, layer by layer
        for layer in range(3):
            out, states, leaving = decode.step(projected, states, tails, weights, heads=heads, at=(layer, 0))
            found.append((out, leaving))
        return found, states

    text = lower(run, mixed, ba, state, tail, rest, donate=(2,)).as_text()
    # States as they came in and as a layer left them differ in their types, by which jax tells programs apart.
    assert text.count("custom_call @mosaic_gpu") <= 2 and text.count(" call @_launch") == 3


@needs_in_place
@pytest.mark.parametrize(("key_size", "value_size"), [(64, 64), (128, 64), (256, 128)])
def test_lowers_rule(key_size, value_size):
    batch, time, heads = 3, 8, 4

    def run(q, k, v, g, beta, state):
        return decode.recurrent(q, k, v, g, beta, scale=0.1, initial_state=state)

    keys = jax.ShapeDtypeStruct((batch, time, heads, key_size), jnp.float16)
    values = jax.ShapeDtypeStruct((batch, time, heads, value_size), jnp.float16)
    per_head = jax.ShapeDtypeStruct((batch, time, heads), jnp.float32)
    state = jax.ShapeDtypeStruct((batch, heads, key_size, value_size), jnp.float32)
    text = lower(run, keys, keys, values, per_head, per_head, state).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1


# Refusals.


def test_unsupported_reasons():
    x = jax.ShapeDtypeStruct((1, 1), jnp.bfloat16)
    reason = decode.unsupported_reason
    assert "Hopper" in reason(1, 128, 128, x, compute_capability="8.0")
    if compat.INTERPRET_AVAILABLE:
        assert reason(1, 128, 128, x, compute_capability="9.0") is None
        assert "1 to 8 tokens" in reason(9, 128, 128, x)
        assert "head sizes" in reason(1, 96, 128, x)
        assert "bfloat16" in reason(1, 128, 128, jax.ShapeDtypeStruct((1, 1), jnp.float64))
        assert "empty" in reason(1, 128, 128, jax.ShapeDtypeStruct((0, 1), jnp.float32))
    else:
        assert "jax 0.11" in reason(1, 128, 128, x)


@pytest.mark.parametrize("change", [{"columns": 48}, {"warpgroups": 3}])
def test_config_refuses(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(DecodeConfig(columns=32, warpgroups=4), **change)


@pytest.mark.parametrize(("dk", "dv"), [(64, 64), (128, 128), (256, 128)])
@pytest.mark.parametrize("whole_heads", [True, False])
def test_default_config_fits(dk, dv, whole_heads):
    for batch in (1, 256):
        config = decode.decode_config(batch, 32, dk, dv, whole_heads)
        assert dv % (config.columns * config.warpgroups) == 0
        assert not whole_heads or dv == config.columns * config.warpgroups
        assert dk * config.columns <= 128 * decode.STATE_REGISTERS


@needs_in_place
def test_errors():
    heads = Heads(1, 2, 64, 64)
    mixed, ba, state, tail, rest = step_inputs(0, 1, 1, heads, jnp.float32)
    projected, weights = packed(heads, mixed, ba, rest)
    step = functools.partial(decode.step, heads=heads)
    with pytest.raises(ValueError, match="projected must have shape"):
        step(projected[..., 1:], state, tail, weights)
    with pytest.raises(ValueError, match="state must be float32"):
        step(projected, state.astype(jnp.bfloat16), tail, weights)
    with pytest.raises(ValueError, match="does not fit a value head of 64 as a whole"):
        step(projected, state, tail, weights, config=DecodeConfig(columns=32, warpgroups=1))
    with pytest.raises(ValueError, match="one of 1 layers and one of 1 groups, got \\(1, 0\\)"):
        stacked = jax.tree.map(lambda x: x[None], (state, tail, weights))
        step(projected, *stacked, at=(1, 0))


# On a GPU.

MODEL = Heads(16, 32, 128, 128)


@pytest.mark.gpu
@pytest.mark.parametrize(("gated", "config"), CONFIGS)
def test_gpu_configs(gated, config):
    check_step(3, 3, 2, MODEL, jnp.bfloat16, gated, config)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "time", "heads", "dtype"),
    [
        (1, 1, MODEL, jnp.bfloat16),
        (37, 1, Heads(16, 64, 128, 128), jnp.float16),
        (2, 8, Heads(2, 6, 64, 64), jnp.float32),
        (2, 4, Heads(3, 3, 256, 64), jnp.bfloat16),
    ],
)
@pytest.mark.parametrize("gated", [True, False])
def test_gpu_step(batch, time, heads, dtype, gated):
    check_step(4, batch, time, heads, dtype, gated, layers=3 if batch == 2 else None)


@pytest.mark.gpu
def test_gpu_rows_without_a_token():
    check_present(7, MODEL, jnp.bfloat16, batch=5)


@pytest.mark.gpu
@pytest.mark.parametrize("decay", ["none", "slow", "fast", "qwen", "mixed"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_gpu_rule(decay, dtype):
    check_rule(5, 3, 5, 4, 8, 128, dtype, decay)


@pytest.mark.gpu
def test_gpu_many_steps_of_slow_decay():
    """Rounding must not add up: 4096 tokens that hardly decay, 8 at a time, in one buffer."""
    *arrays, state = operands(6, 1, 4096, 1, 2, 128, 128, "slow")
    q, k, v, g, beta = (jnp.asarray(x) for x in arrays)
    run = jax.jit(functools.partial(decode.recurrent, scale=0.1), donate_argnames="initial_state")
    new, outs = jnp.asarray(state), []
    for start in range(0, 4096, 8):
        out, new = run(*(x[:, start : start + 8] for x in (q, k, v, g, beta)), initial_state=new)
        outs.append(np.asarray(out))
    want, want_state = numpy_rule(*arrays, state, scale=0.1)
    assert relative(np.concatenate(outs, axis=1), want) <= BOUND
    assert relative(new, want_state) <= BOUND
