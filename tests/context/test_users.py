"""What a context offers beside computing: a check for a forgotten to_layout, and pickling with its mesh."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_jax
from tests.support.mesh import make_mesh


def attend(context, x, forget=(), positions=None):
    """Causal attention with RoPE; `forget` names arrays that go without to_layout."""
    length = x.shape[1]
    query, key, value = (x if name in forget else context.to_layout(x) for name in "qkv")
    positions = context.positions(length) if positions is None else positions
    query, key = (ring_jax.nn.apply_rope(y, positions) for y in (query, key))
    out = ring_jax.ring_attention(query, key, value, is_causal=True, context=context)
    return context.from_layout(out, length)


def test_a_forgotten_to_layout_is_noticed():
    context = ring_jax.ContextParallel("context", layout="zigzag", mesh=make_mesh(context=2))
    x = jax.random.normal(jax.random.key(0), (1, 16, 2, 8))
    assert context.check_layout(attend, x) < 1e-5
    for forget in ("q", "v"):
        with pytest.raises(ValueError, match="did not go through context.to_layout"):
            context.check_layout(lambda cp, x, forget=forget: attend(cp, x, forget), x)
    with pytest.raises(ValueError, match="positions"):
        context.check_layout(lambda cp, x: attend(cp, x, positions=jnp.arange(16)), x)
    with pytest.raises(ValueError, match="return natural order"):
        context.check_layout(lambda cp, x: cp.to_layout(x), x[:, :13])


def test_pickle_and_copy_with_a_mesh():
    context = ring_jax.ContextParallel(
        "context", layout=ring_jax.Zigzag(4), batch_axis="data", mesh=make_mesh(data=2, context=4)
    )
    for found in (pickle.loads(pickle.dumps(context)), copy.deepcopy(context)):
        assert found == context and hash(found) == hash(context)
        assert found.mesh.axis_types == context.mesh.axis_types
        np.testing.assert_array_equal(
            found.from_layout(found.to_layout(jnp.arange(64).reshape(2, 32))), jnp.arange(64).reshape(2, 32)
        )
    without = ring_jax.ContextParallel("context")
    assert pickle.loads(pickle.dumps(without)) == without
    fields = context.__getstate__()
    fields["mesh"] = ([0, 1234], (1, 2), *fields["mesh"][2:])
    with pytest.raises(ValueError, match="this process has no"):
        object.__new__(ring_jax.ContextParallel).__setstate__(fields)
