"""Oracles and inputs that the tests of the gated delta rule share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ring_jax.gdn import gated_delta_rule
from tests.support.hlo import collectives as collectives
from tests.support.hlo import kinds as kinds
from tests.support.numbers import jit as jit
from tests.support.numbers import relative as relative

BOUND = 5e-6  # relative L2 of outputs and states
GRADIENT_BOUND = 1e-5


def log_decays(kind: str, shape, rng) -> np.ndarray:
    """[B, T, N] log decays: "none" (g = 0), "slow" (-1e-4), "fast" (-15), "qwen" (the spread that trained models have),
    "mixed" (within one head, mostly slow with steps of up to -15)."""
    if kind == "qwen":
        a_log, dt_bias = np.log(4 * rng.uniform(size=shape[2]) + 0.01), rng.normal(-2, 1, size=shape[2])
        return -np.exp(a_log) * np.log1p(np.exp(rng.normal(size=shape) + dt_bias))
    if kind == "mixed":
        steps = -15 * rng.uniform(size=shape) * (rng.uniform(size=shape) < 0.05)
        return steps - 1e-3 * rng.uniform(size=shape)
    return np.full(shape, {"none": 0.0, "slow": -1e-4, "fast": -15.0}[kind])


def operands(seed, batch, time, key_heads, value_heads, dk, dv, decay="qwen", dtype=np.float32):
    """query, key, value, log_decay, beta, initial_state; keys and queries of unit length."""
    rng = np.random.default_rng(seed)
    query, key = rng.normal(size=(2, batch, time, key_heads, dk))
    query, key = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    value = rng.normal(size=(batch, time, value_heads, dv))
    per_head = (batch, time, value_heads)
    beta = 1 / (1 + np.exp(-rng.normal(size=per_head)))
    state = rng.normal(size=(batch, value_heads, dk, dv))
    arrays = query, key, value, log_decays(decay, per_head, rng), beta, state
    return [x.astype(dtype) for x in arrays]


def numpy_rule(query, key, value, log_decay, beta, state, segment_ids=None, scale=None):
    """The definition in NumPy float64, one row, head and token at a time."""
    arrays = [np.asarray(x, np.float64) for x in (query, key, value, log_decay, beta, state)]
    query, key, value, log_decay, beta, state = arrays
    state, out, repeats = state.copy(), np.zeros(value.shape), value.shape[2] // key.shape[2]
    scale = key.shape[3] ** -0.5 if scale is None else scale
    for b, n in np.ndindex(*value.shape[::2]):
        current = None
        for t in range(value.shape[1]):
            segment = 0 if segment_ids is None else segment_ids[b, t]
            if segment < 0:
                continue
            if current is not None and segment != current:
                state[b, n] = 0
            current, k, s = segment, key[b, t, n // repeats], np.exp(log_decay[b, t, n]) * state[b, n]
            state[b, n] = s + beta[b, t, n] * np.outer(k, value[b, t, n] - s.T @ k)
            out[b, t, n] = scale * state[b, n].T @ query[b, t, n // repeats]
    return out, state


@functools.cache
def _value_and_gradients(implementation):
    def loss(arrays, weights, segment_ids):
        *inputs, state = arrays
        options = dict(segment_ids=segment_ids, implementation=implementation)
        out, state = gated_delta_rule(*inputs, initial_state=state, **options)
        return jnp.vdot(out, weights[0]) + jnp.vdot(state, weights[1]), (out, state)

    return jit(jax.value_and_grad(loss, has_aux=True))


def run_with_gradients(implementation, arrays, weights, segment_ids=None, wide=False):
    """((out, state), gradients in the order of `arrays`) as NumPy; in float64 where `wide`."""
    cast = functools.partial(np.asarray, dtype=np.float64) if wide else lambda x: x
    arrays, weights = jax.tree.map(cast, (list(arrays), list(weights)))
    with jax.enable_x64(wide):
        (_, results), gradients = _value_and_gradients(implementation)(arrays, weights, segment_ids)
        return jax.tree.map(np.asarray, (results, gradients))


def output_weights(arrays, seed=1):
    """Random cotangents for out and final state."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=arrays[i].shape).astype(np.float32) for i in (2, 5)]


def check_gradients(found, expected, bound=GRADIENT_BOUND) -> None:
    """Gradients of (query, key, value, log_decay, beta, state); that of log_decay against max(|dg|, |dbeta|)."""
    for name, a, b in zip(("query", "key", "value", "log_decay", "beta", "state"), found, expected, strict=True):
        if name == "log_decay":
            distance = np.linalg.norm(np.asarray(a, np.float64) - b)
            norm = max(np.linalg.norm(b), np.linalg.norm(expected[4]))
            assert distance <= bound * norm, f"d{name}: {distance / norm}"
        else:
            assert relative(a, b) <= bound, f"d{name}: {relative(a, b)}"
