"""The core where 64-bit types are on: the numbers of a 32-bit run, with integers and Python numbers that are now wide."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ring_jax
from ring_jax.gdn import Heads
from ring_jax.inference import generate
from ring_jax.inference.sampling import Sampling, sample
from ring_jax.models.qwen3_5 import Config, Qwen3_5
from ring_jax.moe import MoEWeights, moe
from tests.gdn.helpers import numpy_rule, operands, relative
from tests.support import oracle
from tests.support.mesh import make_mesh
from tests.support.strategies import ALIKE, SINGLE_AXIS


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("strategy", [slow(name) if name in ALIKE else name for name in SINGLE_AXIS])
def test_ring_attention(strategy):
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 13, 4, 8))
    context = ring_jax.ContextParallel("context", layout="striped", mesh=make_mesh(context=2), strategy=strategy)
    ids = np.array([[0] * 5 + [1] * 8] * 2)  # int64
    mask = ring_jax.documents(segment_ids=jnp.asarray(ids)) & ring_jax.lengths(jnp.array([13, 11]), jnp.array([13, 11]))

    @jax.jit
    def run(q, k, v):
        laid = [context.to_layout(x) for x in (q, k, v)]
        out = ring_jax.ring_attention(*laid, mask=mask, is_causal=True, scale=0.3, context=context, seq_len=13)
        return context.from_layout(out, 13)

    t, valid = np.arange(13), np.array([13, 11])[:, None, None]
    seen = (ids[:, :, None] == ids[:, None]) & (t <= t[:, None]) & (t < valid) & (t[:, None] < valid)
    want = oracle.attention(q, k, v, seen, scale=0.3)["out"]
    assert run(q, k, v).dtype == jnp.float64
    assert oracle.relative(run(q, k, v), want) < 1e-12
    assert oracle.relative(run(*(x.astype(np.float32) for x in (q, k, v))), want) < 1e-6


@pytest.mark.parametrize("way", [slow("batch"), "head", "state"])
def test_gated_delta_rule(way):
    arrays = operands(0, 2, 16, 2, 2, 8, 8, dtype=np.float64)
    ids = np.array([[0] * 5 + [1] * 11, [3] * 16])
    context = ring_jax.ContextParallel("context", layout="zigzag", mesh=make_mesh(context=2))
    laid = [context.to_layout(jnp.asarray(x)) for x in arrays[:5]]
    out, state = ring_jax.gated_delta_rule(
        *laid, initial_state=arrays[5], segment_ids=context.to_layout(jnp.asarray(ids)), context=context, strategy=way
    )
    want = numpy_rule(*arrays, segment_ids=ids)
    assert relative(context.from_layout(out), want[0]) < 1e-12 and relative(state, want[1]) < 1e-12


def test_experts():
    rng = np.random.default_rng(0)
    x, router = rng.normal(size=(5, 4)), rng.normal(size=(4, 3))
    gate_up, down = rng.normal(size=(3, 4, 2, 6)), rng.normal(size=(3, 6, 4))
    y, stats = moe(jnp.asarray(x), MoEWeights(*map(jnp.asarray, (router, gate_up, down))), top_k=3)
    p = np.exp(x @ router) / np.exp(x @ router).sum(axis=1, keepdims=True)
    g, u = np.einsum("td,edcf->cetf", x, gate_up)
    want = np.einsum("te,etf,efd->td", p, g / (1 + np.exp(-g)) * u, down)
    assert relative(y, want) < 1e-12 and stats.counts.sum() == 15


@pytest.mark.slow
def test_generation():
    """Prefill and decode against one pass over what they generated."""
    config = Config(
        family="qwen3_5", vocab_size=32, hidden_size=16, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=8,
        linear=Heads(1, 2, 8, 8), mlp_size=16, max_positions=128, tie_embeddings=True,
    )  # fmt: skip
    model = Qwen3_5(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    (found,) = generate(model, [[1, 2, 3]], max_new_tokens=2, stop_ids=()).tokens
    graph, state = nnx.split(model)
    again = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens).logits)(
        state, np.array([[1, 2, 3, found[0]]])
    )
    assert np.argmax(np.asarray(again)[0, -2:], axis=-1).tolist() == found
    logits = np.asarray(again)[:, -1]
    assert sample(jnp.asarray(logits), jax.random.key(0), Sampling(0.7, 1, 0.9)).tolist() == [found[1]]
