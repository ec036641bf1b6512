"""The gated delta rule on one device: every implementation against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.gdn import gated_delta_rule
from ring_jax.gdn.chunked import Grouping, transition
from tests.gdn.helpers import (
    BOUND,
    check_gradients,
    jit,
    numpy_rule,
    operands,
    output_weights,
    relative,
    run_with_gradients,
)

FAST = ("chunked", "recurrent")


def packed_ids():
    """Documents of 1 to 90 tokens, with padding before, between and after them, and an empty row."""
    ids = np.full((3, 150), -1, np.int32)
    ids[0, 3:40], ids[0, 40:41], ids[0, 41:64], ids[0, 70:150] = 9, 2, 4, 0
    ids[1, :64], ids[1, 64:128], ids[1, 128:140] = 5, 3, 8
    return ids


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_agrees_with_numpy(implementation, packed):
    arrays = operands(0, 3, 150, 2, 6, 8, 5)
    ids = packed_ids() if packed else None
    out, state = jit(
        lambda *x: gated_delta_rule(*x[:5], initial_state=x[5], segment_ids=ids, implementation=implementation)
    )(*arrays)
    expected_out, expected_state = numpy_rule(*arrays, segment_ids=ids)
    assert relative(out, expected_out) <= BOUND
    assert relative(state, expected_state) <= BOUND
    if packed:
        assert np.all(np.asarray(out)[ids < 0] == 0)
        np.testing.assert_array_equal(state[2], arrays[5][2])  # a row of padding leaves the state bit for bit


@pytest.mark.parametrize("decay", ["none", "slow", "qwen", "fast", "mixed"])
@pytest.mark.parametrize("implementation", FAST)
def test_float64_at_8192_tokens(implementation, decay):
    arrays = operands(1, 1, 8192, 1, 2, 16, 16, decay)
    weights = output_weights(arrays)
    (out, state), gradients = run_with_gradients(implementation, arrays, weights)
    (expected_out, expected_state), expected = run_with_gradients("reference", arrays, weights, wide=True)
    assert expected_out.dtype == np.float64
    bound = 1e-5 if decay == "mixed" else BOUND
    assert relative(out, expected_out) <= bound
    assert relative(state, expected_state) <= bound
    check_gradients(gradients, expected)


@pytest.mark.parametrize("time, packed", [(1, True), (5, False), (16, True), (33, True), (65, False), (1029, True)])
def test_any_length(time, packed):
    arrays = operands(time, 2, time, 1, 2, 8, 4, "mixed")
    ids = np.sort(np.random.default_rng(2).integers(0, 5, size=(2, time)), axis=1).astype(np.int32) if packed else None
    weights = output_weights(arrays)
    (out, state), gradients = run_with_gradients("chunked", arrays, weights, ids)
    (expected_out, expected_state), expected = run_with_gradients("reference", arrays, weights, ids, wide=True)
    assert relative(out, expected_out) <= 1e-5
    assert relative(state, expected_state) <= 1e-5
    check_gradients(gradients, expected)


@pytest.mark.parametrize("implementation", FAST)
def test_packed_documents_are_separate_runs(implementation):
    """A border is exact: nothing of one document reaches another, forward or backward, whatever it holds."""
    arrays = operands(3, 3, 150, 2, 2, 8, 8)
    ids, weights = packed_ids(), output_weights(arrays)
    (out, state), gradients = run_with_gradients(implementation, arrays, weights, ids)
    expected = run_with_gradients("reference", arrays, weights, ids, wide=True)
    check_gradients(gradients, expected[1])
    others = [x.copy() for x in arrays]
    for x in others[:5]:
        x[0, 3:41] *= 0.5  # other documents of row 0
        x[ids < 0] = np.nan  # poison on padding
    (out2, state2), gradients2 = run_with_gradients(implementation, others, weights, ids)
    np.testing.assert_array_equal(out2[0, 41:], out[0, 41:])
    np.testing.assert_array_equal(state2, state)
    for a, b in zip(gradients2[:5], gradients[:5], strict=True):
        np.testing.assert_array_equal(a[0, 41:], b[0, 41:])
        assert np.all(a[ids < 0] == 0)
    assert np.all(gradients[5][0] != 0)


@pytest.mark.parametrize("implementation", FAST)
def test_split_anywhere(implementation):
    """[0, t) with padding behind and [t, S) with padding in front, for every t: one compiled program."""
    time = 70
    arrays = operands(4, 1, time, 1, 2, 8, 4)

    @jit
    @jax.vmap
    def split(t):
        first = jnp.arange(time) < t

        def run(mask, state):
            ids = jnp.where(mask, 0, -1)[None]
            options = dict(initial_state=state, segment_ids=ids, implementation=implementation)
            return gated_delta_rule(*arrays[:5], **options)

        early, state = run(first, arrays[5])
        late, state = run(~first, state)
        return early + late, state

    out, state = split(jnp.arange(time + 1))
    expected_out, expected_state = numpy_rule(*arrays)
    for t in range(time + 1):
        assert relative(out[t], expected_out) <= BOUND
        assert relative(state[t], expected_state) <= BOUND


@pytest.mark.parametrize("cuts", [(3,), (64,), (1, 2, 130)])
def test_split_arrays(cuts):
    """The same with arrays that are really cut, also across implementations."""
    arrays = operands(5, 2, 140, 1, 2, 8, 4, "mixed")
    state, outs = arrays[5], []
    for start, end in zip((0, *cuts), (*cuts, 140), strict=True):
        out, state = jit(gated_delta_rule)(*(x[:, start:end] for x in arrays[:5]), initial_state=state)
        outs.append(out)
    expected_out, expected_state = numpy_rule(*arrays)
    assert relative(np.concatenate(outs, axis=1), expected_out) <= 1e-5
    assert relative(state, expected_state) <= 1e-5


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_float32_states(implementation, dtype):
    arrays = [jnp.asarray(x) for x in operands(6, 1, 200, 1, 2, 8, 4)]
    half = [x.astype(dtype) for x in arrays[:3]] + [arrays[3], arrays[4].astype(dtype), arrays[5]]
    out, state = jit(lambda *x: gated_delta_rule(*x[:5], initial_state=x[5], implementation=implementation))(*half)
    assert out.dtype == dtype and state.dtype == jnp.float32
    expected_out, expected_state = numpy_rule(*(np.asarray(x.astype(jnp.float32)) for x in half))
    assert relative(state, expected_state) <= BOUND
    assert relative(out.astype(jnp.float32), expected_out) <= float(jnp.finfo(dtype).eps)


def test_equal_keys_without_decay():
    """The hardest triangular system: all keys alike, beta = 1, no decay. Powers of it reach 10^18 and cancel."""
    arrays = operands(7, 1, 256, 1, 1, 8, 4, "none")
    arrays[1] = np.broadcast_to(arrays[1][:, :1], arrays[1].shape).copy()
    arrays[4] = np.ones_like(arrays[4])
    weights = output_weights(arrays)
    (out, state), gradients = run_with_gradients("chunked", arrays, weights)
    expected, expected_gradients = run_with_gradients("reference", arrays, weights, wide=True)
    assert relative(out, expected[0]) <= BOUND
    assert relative(state, expected[1]) <= BOUND
    check_gradients(gradients, expected_gradients)


def test_transition_is_the_affine_map_of_the_array():
    arrays = operands(8, 2, 100, 1, 2, 8, 4)
    matrix, update = jit(lambda *x: transition(*x, None))(*arrays[1:5])
    _, expected = numpy_rule(*arrays)
    found = np.einsum("bnij,bnjv->bniv", np.asarray(matrix, np.float64), arrays[5]) + update
    assert relative(found, expected) <= BOUND


def test_scale_and_default_state():
    arrays = operands(9, 1, 20, 1, 1, 16, 4)
    out, _ = gated_delta_rule(*arrays[:5], scale=2.0)
    expected, _ = numpy_rule(*arrays[:5], np.zeros_like(arrays[5]), scale=2.0)
    assert relative(out, expected) <= BOUND


def test_no_tokens():
    arrays = operands(10, 2, 0, 1, 2, 8, 4)
    out, state = gated_delta_rule(*arrays[:5], initial_state=arrays[5])
    assert out.shape == (2, 0, 2, 4)
    np.testing.assert_array_equal(state, arrays[5])


def test_backward_memory_is_linear():
    """What the backward pass keeps and uses grows with S, not faster, and stays far below a state per token."""

    def temporary(time):
        shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in operands(0, 1, time, 1, 2, 32, 32)]
        loss = lambda *x: gated_delta_rule(*x[:5], initial_state=x[5], implementation="chunked")[0].sum()  # noqa: E731
        compiled = jit(jax.grad(loss, argnums=range(6))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(8192), temporary(32768)
    assert long <= 4.2 * short
    a_state_per_token = 32768 * 2 * 32 * 32 * 4
    assert long < a_state_per_token / 4


@pytest.mark.parametrize("time, expected", [(1, (16, 1, 1)), (33, (64, 1, 1)), (1024, (64, 16, 1)), (1100, (64, 9, 2))])
def test_grouping_pads_little(time, expected):
    grouping = Grouping.of(time)
    assert (grouping.chunk, grouping.chunks, grouping.groups) == expected


@pytest.mark.parametrize("time, expected", [(1, "recurrent"), (8, "recurrent"), (9, "chunked")])
def test_default_implementation(time, expected):
    arrays = operands(11, 1, time, 1, 1, 8, 4)
    text = jax.jit(gated_delta_rule).lower(*arrays[:5]).as_text(debug_info=True)
    assert f"gated_delta_rule_{expected}" in text


@pytest.mark.parametrize(
    "index, change, message",
    [
        (0, lambda x: x[:, :, 0], "query must have 4 axes .B, T, K, dk."),
        (0, lambda x: x[:, :9], "query must have shape"),
        (0, lambda x: x.astype(np.int32), "floating point"),
        (2, lambda x: x[:, :, :3], "multiple of the number of key heads"),
        (2, lambda x: x[:1], "value must have shape"),
        (3, lambda x: x[..., :1], "log_decay must have shape"),
        (3, lambda x: x.astype(jnp.bfloat16), "log_decay must be float32"),
        (4, lambda x: x[:, :1], "beta must have shape"),
        (5, lambda x: x[:, :1], "initial_state must have shape"),
        (5, lambda x: x.astype(jnp.bfloat16), "initial_state must be float32"),
    ],
)
def test_errors(index, change, message):
    arrays = operands(12, 2, 10, 2, 4, 8, 4)
    arrays[index] = change(arrays[index])
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(*arrays[:5], initial_state=arrays[5])


def test_errors_of_options():
    arrays = operands(13, 2, 10, 2, 4, 8, 4)
    with pytest.raises(ValueError, match="segment_ids must have 2 axes"):
        gated_delta_rule(*arrays[:5], segment_ids=np.zeros(10, np.int32))
    with pytest.raises(ValueError, match="segment_ids must be signed integers"):
        gated_delta_rule(*arrays[:5], segment_ids=np.zeros((2, 10), np.float32))
    with pytest.raises(
        ValueError, match="unknown implementation 'fast'.*'chunked', 'mosaic', 'mosaic_split', 'recurrent', 'reference'"
    ):
        gated_delta_rule(*arrays[:5], implementation="fast")
