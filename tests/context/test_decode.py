"""Decode attention: partial results of ranks against dense float64 attention over the visible keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ring_jax.context.decode import attend_few, attend_parts, merge_ranks
from ring_jax.layout import as_layout

B, S, N, K, H = 3, 24, 4, 2, 8


def dense(query, key, value, visible):
    """float64 (out, lse) of queries that see the first `visible` keys of their row."""
    key, value = (np.repeat(x.astype(np.float64), N // K, axis=2) for x in (key, value))
    logits = np.einsum("btnh,bsnh->bnts", query.astype(np.float64), key) * H**-0.5
    logits[np.broadcast_to((np.arange(S) >= visible[:, None])[:, None, None], logits.shape)] = -np.inf
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(logits).sum(-1))
    weights = np.exp(logits - np.where(np.isneginf(lse), 0, lse)[..., None])
    return np.einsum("bnts,bsnh->btnh", weights, value), np.moveaxis(lse, 1, 2)


def inputs(seed, tokens=1):
    rng = np.random.default_rng(seed)
    shapes = (B, tokens, N, H), (B, S, K, H), (B, S, K, H)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("tokens", [1, 3])
def test_attends_to_the_visible_keys_only(tokens):
    query, key, value = inputs(0, tokens)
    visible = np.array([S, 7, 0], np.int32)
    key[1, 7:], value[1, 7:] = 1e4, 1e4  # finite rubbish behind the end
    out, lse = attend_few(query, jnp.stack([key, value]), visible)
    want, want_lse = dense(query, key, value, visible)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6)
    assert (out[2] == 0).all() and np.isneginf(lse[2]).all()


def test_parts_are_one_softmax():
    """Keys in three arrays, of which rows see different numbers, are as those that they see in one."""
    query, key, value = inputs(2)
    counts = np.array([[10, 9, 1], [4, 0, 1], [0, 0, 0]], np.int32)  # of arrays of 10, 9 and 5
    places = [[*range(a), *range(10, 10 + b), *range(19, 19 + c)] for a, b, c in counts]
    seen = np.zeros((2, B, S, K, H), np.float32)
    for row, place in enumerate(places):
        seen[:, row, : len(place)] = key[row, place], value[row, place]
    cuts = [slice(0, 10), slice(10, 19), slice(19, S)]
    parts = [(key[:, cut], value[:, cut], count) for cut, count in zip(cuts, counts.T, strict=True)]
    out, lse = attend_parts(jnp.asarray(query), [tuple(map(jnp.asarray, part)) for part in parts])
    want, want_lse = dense(query, *seen, np.array([len(place) for place in places]))
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_merge_to_the_whole(layout, ranks):
    query, key, value = inputs(1)
    visible = jnp.array([S, 5, 0], jnp.int32)
    layout = as_layout(layout)
    mesh = jax.make_mesh((ranks,), ("context",), devices=jax.devices()[:ranks])
    order = np.concatenate([np.asarray(layout.positions(r, S, ranks)) for r in range(ranks)])
    kv = jnp.stack([key, value])[:, :, order]

    def local(query, kv, visible):
        here = layout.count_below(visible, jax.lax.axis_index("context"), S, ranks)
        return merge_ranks(*attend_few(query, kv, here), "context")

    specs = P(), P(None, None, "context"), P()
    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P()))
    out, lse = step(jnp.asarray(query), jax.device_put(kv, jax.NamedSharding(mesh, specs[1])), visible)
    want, want_lse = dense(query, key, value, np.asarray(visible))
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6)
