"""One meaning of segment ids for attention and the delta rule: padding ends a document, known or traced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_jax
from tests.gdn.helpers import jit, numpy_rule, operands, relative
from tests.support.mesh import make_mesh

# Ids, and the same documents with ids of their own.
CASES = {
    "padding inside": ([0, 0, -1, 0, 0, 0, 0, 0], [0, 0, -1, 1, 1, 1, 1, 1]),
    "twice": ([4, -1, 4, 4, -2, -1, 4, 4], [0, -1, 1, 1, -1, -1, 2, 2]),
    "left padding": ([-1, -1, 3, 3, -1, 3, 1, -1], [-1, -1, 0, 0, -1, 1, 2, -1]),
    "chunk border": ([0, 0, 0, -1, 0, 0, 0, -1], [0, 0, 0, -1, 1, 1, 1, -1]),
}


def rule_by_hand(arrays, ids):
    """The definition, document by document of ids that are all different; the state of the last one."""
    *inputs, state = arrays
    return numpy_rule(*inputs, state, segment_ids=np.asarray(ids)[None])


@pytest.mark.parametrize("name", CASES)
def test_attention(name):
    ids, plain = (np.array(x) for x in CASES[name])
    same = (plain[:, None] == plain[None, :]) & (plain >= 0)[:, None]
    known = ring_jax.documents(segment_ids=ids).interval(q_len=8, kv_len=8)
    traced = jax.jit(lambda ids: ring_jax.documents(segment_ids=ids).interval(q_len=8, kv_len=8))(ids)
    s = np.arange(8)
    for start, end in (known, traced):
        start, end = np.asarray(start)[0], np.asarray(end)[0]
        np.testing.assert_array_equal((s >= start[:, None]) & (s < end[:, None]), same)


def test_delta_rule():
    arrays = operands(0, 1, 8, 1, 2, 8, 8)

    def call(implementation, ids, state):
        options = {"segment_ids": ids, "implementation": implementation}
        return ring_jax.gated_delta_rule(*arrays[:5], initial_state=state, **options)

    run = {name: jit(functools.partial(call, name)) for name in ("chunked", "recurrent", "reference")}
    for name, (ids, plain) in CASES.items():
        out, state = rule_by_hand(arrays, plain)
        for implementation, rule in run.items():
            found = rule(np.array([ids], np.int32), arrays[5])
            assert relative(found[0], out) < 5e-6, (name, implementation)
            assert relative(found[1], state) < 5e-6, (name, implementation)
    known = ring_jax.gated_delta_rule(
        *arrays[:5], segment_ids=np.array([CASES["twice"][0]]), implementation="recurrent"
    )
    want = rule_by_hand([*arrays[:5], np.zeros_like(arrays[5])], CASES["twice"][1])
    assert relative(known[0], want[0]) < 5e-6


@pytest.mark.parametrize("way", ["batch", "head", "state"])
def test_delta_rule_and_convolution_over_ranks(way):
    """Over two ranks of two chunks each, and the convolution before it, whose window would reach across the padding."""
    context = ring_jax.ContextParallel("context", layout="zigzag", mesh=make_mesh(context=2))
    arrays = operands(1, 1, 8, 2, 2, 8, 8)
    weight = np.random.default_rng(2).normal(size=(4, 2)).astype(np.float32)
    inputs = np.random.default_rng(3).normal(size=(1, 8, 2)).astype(np.float32)

    def layer(_, xs, cache, partition):
        x, *rest = xs
        return (partition.causal_convolution(x, weight)[0], partition.gated_delta_rule(*rest)[0]), ()

    @jit
    def run(ids):
        xs = jax.tree.map(context.to_layout, (inputs, *arrays[:5]))
        ids = context.to_layout(ids, fill=-1)
        found, _ = ring_jax.gdn.run(layer, None, xs, context=context, strategy=way, segment_ids=ids)
        return jax.tree.map(lambda x: context.from_layout(x, 8), found)

    for name, (ids, plain) in CASES.items():
        convolved, out = run(np.array([ids], np.int32))
        want = np.zeros((8, 2))
        for t, j in np.ndindex(8, 4):
            source = t - 3 + j
            if source >= 0 and plain[t] >= 0 and plain[source] == plain[t]:
                want[t] += weight[j] * inputs[0, source]
        assert relative(convolved[0], want) < 5e-6, name
        wanted, _ = rule_by_hand([*arrays[:5], np.zeros_like(arrays[5])], plain)
        assert relative(out, wanted) < 5e-6, name


def test_padding_of_to_layout_is_padding():
    """A length that does not divide: the state is that of the real tokens, by fill=-1 or by seq_len, whatever ids end in."""
    arrays, ids = operands(4, 1, 9, 2, 2, 8, 8), np.full((1, 9), 3, np.int32)
    want, state = numpy_rule(*arrays[:5], np.zeros_like(arrays[5]), segment_ids=ids)
    context = ring_jax.ContextParallel("context", layout="zigzag", mesh=make_mesh(context=4))
    laid = [context.to_layout(jnp.asarray(x)) for x in arrays[:5]]
    by_fill = {"segment_ids": context.to_layout(ids, fill=-1)}
    by_length = {"segment_ids": context.to_layout(ids), "seq_len": 9}
    for way in ("state", "batch"):
        for options in (by_fill, by_length):
            out, found = ring_jax.gated_delta_rule(*laid, context=context, strategy=way, **options)
            assert relative(found, state) < 5e-6
            assert relative(context.from_layout(out, 9), want) < 5e-6
    padded = [np.pad(x, [(0, 0), (0, 3)] + [(0, 0)] * (x.ndim - 2), constant_values=-1.0) for x in arrays[:5]]
    assert relative(ring_jax.gated_delta_rule(*padded, seq_len=9)[1], state) < 5e-6


def test_ids_that_come_back():
    """Known: an error, in every call. Traced: one more document, and a check that works there."""
    ids = np.array([[0, 1, 0, 1]])
    with pytest.raises(ValueError, match="two separate runs"):
        ring_jax.documents(segment_ids=ids)
    arrays = operands(0, 1, 4, 1, 1, 8, 8)[:5]
    with pytest.raises(ValueError, match="two separate runs"):
        ring_jax.gated_delta_rule(*arrays, segment_ids=ids)
    context = ring_jax.ContextParallel("context", layout="zigzag", mesh=make_mesh(context=2))
    with pytest.raises(ValueError, match="two separate runs"):
        ring_jax.gated_delta_rule(*map(context.to_layout, arrays), segment_ids=context.to_layout(ids), context=context)
    rows = np.array([[0, 1, 0, 1], [7, 7, 2, 2], [0, -1, 0, 1], [-1, -1, -1, -1], [0, 1, -1, 0], [5, -1, -3, 5]])
    found = jax.jit(ring_jax.contiguous_segments)(rows)
    assert found.tolist() == [False, True, True, True, False, True]
    with pytest.raises(ValueError, match="two separate runs"):
        ring_jax.documents(segment_ids=rows[4])
