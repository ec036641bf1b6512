"""`ring_attention` resumed from a partial: cached keys and a new chunk are two calls, as exact as one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_jax
from tests.context.harness import inputs
from tests.support import oracle
from tests.support.mesh import make_mesh
from tests.support.strategies import SINGLE_AXIS

OLD, NEW, RANKS = 40, 24, 4


def two_calls(x, context, **options):
    """Attention of the last NEW of OLD + NEW positions, causal: to the old keys, then to their own. In natural order."""
    rows = {name: x[name][:, -NEW:] for name in ("query", "dout", "dlse")}
    query = context.to_layout(jnp.asarray(rows["query"]))
    old = [context.to_layout(jnp.asarray(x[name][:, :OLD])) for name in ("key", "value")]
    new = [context.to_layout(jnp.asarray(x[name][:, OLD:])) for name in ("key", "value")]

    def attend(query, old, new, sinks):
        partial = ring_jax.ring_attention(
            query,
            *old,
            context=context,
            seq_len=NEW,
            key_value_seq_len=OLD,
            sinks=sinks,
            return_partial=True,
            **options,
        )
        assert partial[0].dtype == partial[1].dtype == jnp.float32
        return ring_jax.ring_attention(
            query, *new, is_causal=True, context=context, seq_len=NEW, carry=partial, return_residual=True, **options
        )

    @jax.jit
    def everything(operands, cotangents):
        results, pull = jax.vjp(attend, *operands)
        return results, pull(cotangents)

    cotangents = jnp.asarray(rows["dout"], query.dtype), jnp.asarray(rows["dlse"])
    operands = query, old, new, jnp.asarray(x["sinks"])
    (out, lse), gradients = everything(operands, tuple(map(context.to_layout, cotangents)))
    dq, (dk_old, dv_old), (dk_new, dv_new), dsinks = gradients
    assert out.dtype == query.dtype
    back = lambda y, length: np.asarray(context.from_layout(y, length), np.float64)  # noqa: E731
    return {
        "out": back(out, NEW), "lse": back(lse, NEW), "dq": back(dq, NEW), "dsinks": dsinks,
        "dk": np.concatenate([back(dk_old, OLD), back(dk_new, NEW)], axis=1),
        "dv": np.concatenate([back(dv_old, OLD), back(dv_new, NEW)], axis=1),
    }  # fmt: skip


def expected(x):
    visible = np.arange(OLD + NEW) <= OLD + np.arange(NEW)[:, None]
    visible = np.broadcast_to(visible, (x["query"].shape[0], *visible.shape))
    rows = (x[name][:, -NEW:] for name in ("query", "dout", "dlse"))
    query, dout, dlse = rows
    return oracle.attention(
        query, x["key"], x["value"], visible, scale=x["query"].shape[-1] ** -0.5, sinks=x["sinks"], dout=dout, dlse=dlse
    )


@pytest.mark.parametrize("strategy", SINGLE_AXIS)
def test_a_chunk_after_cached_keys_is_two_calls(strategy):
    x = inputs(2, OLD + NEW, OLD + NEW, 4, 4, 8)
    context = ring_jax.ContextParallel("context", layout="zigzag", mesh=make_mesh(context=RANKS), strategy=strategy)
    oracle.assert_close(two_calls(x, context), expected(x), 2e-6)


def test_nothing_is_rounded_between_the_calls():
    """In bfloat16 the error is that of one call over all keys."""
    x = {
        name: v if name in ("dlse", "sinks") else jnp.asarray(v, jnp.bfloat16)
        for name, v in inputs(1, OLD + NEW, OLD + NEW, 4, 2, 16).items()
    }
    x = {name: np.asarray(v) for name, v in x.items()}
    context = ring_jax.ContextParallel("context", layout="zigzag", mesh=make_mesh(context=RANKS), strategy="ring")
    wide = {name: v.astype(np.float64) for name, v in x.items()}
    want, got = expected(wide), two_calls(x, context)
    one = jnp.asarray(want["out"], jnp.bfloat16).astype(jnp.float32)  # what rounding the result alone costs
    assert oracle.relative(got["out"], want["out"]) <= 1.5 * oracle.relative(one, want["out"]) + 1e-3


def test_what_a_carry_must_be():
    context = ring_jax.ContextParallel("context", mesh=make_mesh(context=2))
    x = jnp.ones((1, 8, 2, 4), jnp.bfloat16)
    lse = jnp.zeros((1, 8, 2))
    for carry, error, message in (
        (
            (x, lse),
            ValueError,
            "carry's out must be float32 .1, 8, 2, 4., as return_partial=True gives it, got bfloat16",
        ),
        ((jnp.ones((1, 8, 2, 4)), lse[..., :1]), ValueError, "carry's lse must be float32 .1, 8, 2."),
        (x, TypeError, "carry must be a pair"),
        ((1.0, lse), TypeError, "carry's out must be an array"),
    ):
        with pytest.raises(error, match=message):
            ring_jax.ring_attention(x, x, x, context=context, carry=carry)
    with pytest.raises(ValueError, match="sinks belong into the first call"):
        ring_jax.ring_attention(x, x, x, context=context, carry=(jnp.ones((1, 8, 2, 4)), lse), sinks=jnp.zeros(2))
