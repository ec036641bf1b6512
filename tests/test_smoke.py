"""The shortest run of the heart: every strategy, forward and gradients, against `jax.nn`; a model that writes. Runs on every jax in CI."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_jax
from ring_jax.inference import generate
from tests.inference.checkpoint import CONFIG
from tests.inference.harness import over
from tests.support.strategies import SINGLE_AXIS

SEQ_LEN = 60


@pytest.mark.parametrize("strategy", SINGLE_AXIS)
def test_smoke(strategy):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:4]), ("context",))
    cp = ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh, strategy=strategy)
    qkv = [jax.random.normal(jax.random.key(i), (2, SEQ_LEN, heads, 16)) for i, heads in enumerate((8, 4, 4))]

    def ours(query, key, value):
        query, key, value = (cp.to_layout(x) for x in (query, key, value))
        out = ring_jax.ring_attention(query, key, value, is_causal=True, seq_len=SEQ_LEN, context=cp)
        out = cp.from_layout(out, SEQ_LEN)
        return jnp.sum(jnp.sin(out)), out

    def theirs(query, key, value):
        out = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return jnp.sum(jnp.sin(out)), out

    got, want = (jax.jit(jax.grad(f, argnums=(0, 1, 2), has_aux=True))(*qkv) for f in (ours, theirs))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_smoke_generate():
    """Over two ranks as on one device; the engine beneath has no snapshots here."""
    prompt, options = list(range(1, 20)), {"max_new_tokens": 3, "stop_ids": ()}
    alone, spread = (generate(over(CONFIG, **axes), [prompt], **options).tokens for axes in ({}, {"context": 2}))
    assert spread == alone and len(alone[0]) == 3
