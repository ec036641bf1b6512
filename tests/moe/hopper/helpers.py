"""Inputs and float64 oracle of the grouped products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

EVEN, SKEWED, ONE_EXPERT, LONELY = "even", "skewed", "one expert", "one row"


def choose(kind: str, tokens: int, per_token: int, experts: int, rng, elsewhere: int = 0) -> np.ndarray:
    """int32 [T, k] distinct experts of each token, among them `elsewhere` that are not here."""
    total = experts + elsewhere
    share = np.ones(total)
    if kind == SKEWED:  # some experts get nothing, the first about everything
        share = rng.uniform(size=total) ** 6 + 1e-6
        share[0] = 10.0
    keys = np.log(share) - np.log(-np.log(rng.uniform(size=(tokens, total))))
    if kind == ONE_EXPERT:
        keys[:, 1] += 1e3
    if kind == LONELY:  # the last expert here has a single row
        keys[:, experts - 1] -= 1e3
        keys[tokens // 2, experts - 1] += 1e4
    return np.argsort(-keys, axis=1)[:, :per_token].astype(np.int32)


def operands(seed, tokens, per_token, experts, width, features, dtype, kind=EVEN, elsewhere=0):
    """(x, gate_up, down, weights, experts) as `run_experts` takes them."""
    rng = np.random.default_rng(seed)

    def draw(*shape, fan_in=1):
        return jnp.asarray(rng.standard_normal(shape, np.float32) * fan_in**-0.5, dtype)

    chosen = choose(kind, tokens, per_token, experts, rng, elsewhere)
    weights = jnp.asarray(rng.uniform(0.1, 1.0, chosen.shape), jnp.float32)
    gate_up, down = draw(experts, width, 2, features, fan_in=width), draw(experts, features, width, fan_in=features)
    return draw(tokens, width), gate_up, down, weights, jnp.asarray(chosen)


@functools.partial(jax.jit, static_argnums=5)
def _exact(x, gate_up, down, weights, experts, dtype):
    """The definition, expert by expert, in `dtype`."""
    x, gate_up, down, weights = (a.astype(dtype) for a in (x, gate_up, down, weights))

    def add(y, e):
        gate, up = jnp.einsum("td,dcf->ctf", x, gate_up[e], precision="highest")
        out = jnp.einsum("tf,fd->td", jax.nn.silu(gate) * up, down[e], precision="highest")
        return y + jnp.where(experts == e, weights, 0).sum(axis=1, keepdims=True) * out, None

    return jax.lax.scan(add, jnp.zeros_like(x), jnp.arange(gate_up.shape[0], dtype=jnp.int32))[0]


def exact(x, gate_up, down, weights, experts, dtype=jnp.float32):
    return _exact(x, gate_up, down, weights, experts, dtype)
