"""The shapes and dtypes in public annotations hold: checked by jaxtyping at run time, here and nowhere else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from flax import nnx
from jaxtyping import TypeCheckError, jaxtyped

import ring_jax
from ring_jax.nn import Attention, apply_rope

checked = functools.partial(jaxtyped, typechecker=beartype)
T, S, N, K, H, HV = 30, 32, 4, 2, 8, 6


@functools.cache
def context():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("context",))
    return ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh)


def arrays(dtype=jnp.float32):
    return jnp.ones((2, S, N, H), dtype), jnp.ones((2, S, K, H), dtype), jnp.ones((2, S, K, HV), dtype)


def holds(function, *args):
    """Traces `function`, which is quick, with the annotations of what it calls checked."""
    jax.eval_shape(function, *args)


@pytest.mark.parametrize("strategy", ["ring", "pass_q", "all_gather", "ulysses"])
def test_ring_attention(strategy):
    def call(query, key, value, lengths, sinks):
        return checked(ring_jax.ring_attention)(
            query,
            key,
            value,
            mask=ring_jax.documents(cu_seqlens=jnp.asarray([0, 11, T])),
            is_causal=True,
            local_window_size=(4, 0),
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            query_offset=lengths,
            sinks=sinks,
            return_residual=True,
            seq_len=T,
            context=context(),
            strategy=strategy,
        )

    holds(call, *arrays(), jnp.asarray([T, 20]), jnp.zeros(N))


def test_flash_attention_and_merge():
    def call(query, key, value):
        start, end = jnp.zeros((2, S), jnp.int32), jnp.full((2, S), S)
        partial = checked(ring_jax.flash_attention)(query, key, value, start, end)
        partial = checked(ring_jax.flash_attention)(query, key, value, start, end, carry=partial)
        return checked(ring_jax.merge_partials)(*partial, *partial)

    holds(call, *arrays())


def test_masks():
    ids = jnp.asarray([[0] * 5 + [1] * 7])
    for mask in (
        checked(ring_jax.documents)(segment_ids=ids),
        checked(ring_jax.documents)(cu_seqlens=jnp.asarray([0, 5, 12])),
        checked(ring_jax.lengths)(jnp.asarray([3]), jnp.asarray([3]), left_padding=jnp.asarray([1])),
        checked(ring_jax.prefix)(jnp.asarray([3])),
        checked(ring_jax.window)(3, None),
    ):
        checked(ring_jax.Mask.interval)(mask, q_len=12, kv_len=12)


def test_context_parallel():
    cp, x = context(), jnp.ones((2, T, 3))
    holds(lambda x: checked(ring_jax.ContextParallel.from_layout)(cp, cp.to_layout(x), T), x)
    holds(lambda x: checked(ring_jax.ContextParallel.relayout)(cp, cp.to_layout(x), "striped"), x)
    checked(ring_jax.ContextParallel.positions)(cp, T)


def test_flax():
    holds(checked(apply_rope), jnp.ones((2, S, N, H)), jnp.arange(S))
    holds(lambda *qkv: checked(type(context().attention_fn()).__call__)(context().attention_fn(), *qkv), *arrays())
    layer = Attention(16, N, K, context=context(), rngs=nnx.Rngs(0))
    nnx.eval_shape(lambda layer, x: checked(Attention.__call__)(layer, x, seq_len=T), layer, jnp.ones((2, S, 16)))


def test_a_wrong_shape_is_caught():
    out, lse = jnp.ones((2, S, N, H)), jnp.ones((2, S, N))
    with pytest.raises(TypeCheckError):
        checked(ring_jax.merge_partials)(out, lse[:1], out, lse)
