"""The short causal convolution: cuts, documents, padding, tails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.gdn import causal_convolution
from tests.gdn.helpers import BOUND, jit, relative


def numpy_convolution(x, weight, tail, segment_ids=None):
    """The definition, one row and document at a time, in float64."""
    x, weight, tail = (np.asarray(a, np.float64) for a in (x, weight, tail))
    history, y, tails = len(weight) - 1, np.zeros(x.shape), tail.copy()
    for b in range(len(x)):
        ids = np.zeros(x.shape[1], int) if segment_ids is None else segment_ids[b]
        seen, current = list(tail[b]), None
        for t in np.flatnonzero(ids >= 0):
            if current is not None and ids[t] != current:
                seen = [np.zeros(x.shape[2])] * history
            current = ids[t]
            seen.append(x[b, t])
            y[b, t] = sum(w * s for w, s in zip(weight, seen[len(seen) - history - 1 :], strict=True))
        tails[b] = np.array(seen[len(seen) - history :]).reshape(tails[b].shape)
    return y, tails


def inputs(time=40, width=4, batch=4, features=6):
    rng = np.random.default_rng(width)
    shapes = (batch, time, features), (width, features), (batch, width - 1, features)
    x, weight, tail = (rng.normal(size=s).astype(np.float32) for s in shapes)
    ids = np.full((batch, time), -1, np.int32)
    ids[0] = np.sort(rng.integers(0, 20, size=time))  # documents shorter than the history
    ids[1, 5:20], ids[1, 22:30] = 3, 1
    ids[2, 38:] = 7
    return x, weight, tail, ids


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("packed", [False, True])
def test_agrees_with_numpy(width, packed):
    x, weight, tail, ids = inputs(width=width)
    ids = ids if packed else None
    y, leaving = jit(causal_convolution)(x, weight, tail=tail, segment_ids=ids)
    expected, expected_tail = numpy_convolution(x, weight, tail, ids)
    assert relative(y, expected) <= BOUND
    assert ids is None or np.all(np.asarray(y)[ids < 0] == 0)
    np.testing.assert_array_equal(leaving, expected_tail.astype(np.float32))


def test_split_anywhere():
    """For every t, with documents and padding: [0, t), then [t, S) from its tail, is one run."""
    x, weight, tail, ids = inputs()
    x, tail, ids = x[1:], tail[1:], ids[1:]  # rows of one document at a time; a border is the caller's to know
    ids = np.where(ids >= 0, 0, -1)
    ids[0, 20:22] = 0

    @jit
    @jax.vmap
    def split(t):
        early = jnp.where(jnp.arange(x.shape[1]) < t, ids, -1)
        late = jnp.where(jnp.arange(x.shape[1]) >= t, ids, -1)
        y1, middle = causal_convolution(x, weight, tail=tail, segment_ids=early)
        y2, end = causal_convolution(x, weight, tail=middle, segment_ids=late)
        return y1 + y2, end

    y, leaving = split(jnp.arange(x.shape[1] + 1))
    expected, expected_tail = numpy_convolution(x, weight, tail, ids)
    for t in range(x.shape[1] + 1):
        assert relative(y[t], expected) <= BOUND
        np.testing.assert_array_equal(leaving[t], expected_tail.astype(np.float32))


def test_fewer_tokens_than_the_history():
    x, weight, tail, _ = inputs(time=2)
    y, leaving = causal_convolution(x, weight, tail=tail)
    expected, expected_tail = numpy_convolution(x, weight, tail)
    assert relative(y, expected) <= BOUND
    np.testing.assert_array_equal(leaving, expected_tail.astype(np.float32))


def test_nothing_leaks_backward():
    """Gradients stop at document borders too, and padding may hold anything."""
    x, weight, tail, ids = inputs()
    target = np.zeros(x.shape, np.float32)
    target[0, ids[0] == ids[0, 20]] = 1.0
    target[1, 5:20] = 1.0
    x[ids < 0] = np.nan
    loss = lambda x, tail: jnp.vdot(causal_convolution(x, weight, tail=tail, segment_ids=ids)[0], target)  # noqa: E731
    dx, dtail = jit(jax.grad(loss, argnums=(0, 1)))(x, tail)
    assert np.all(dx[0, ids[0] != ids[0, 20]] == 0) and np.any(dx[0] != 0)
    assert np.all(dtail[1] != 0), "the first document sees the tail across left padding"
    assert np.all(dx[1, :5] == 0) and np.all(dx[1, 20:] == 0) and np.all(np.isfinite(dx))


def test_half_precision_sums_in_float32():
    x, weight, tail, _ = inputs()
    x, weight, tail = (jnp.asarray(a, jnp.bfloat16) for a in (x, weight, tail))
    y, leaving = causal_convolution(x, weight, tail=tail)
    assert y.dtype == leaving.dtype == jnp.bfloat16
    expected, _ = numpy_convolution(*(a.astype(jnp.float32) for a in (x, weight, tail)))
    assert relative(y.astype(jnp.float32), expected) <= float(jnp.finfo(jnp.bfloat16).eps)


def test_errors():
    x, weight, tail, ids = inputs()
    with pytest.raises(ValueError, match=r"conv1d.weight \[F, 1, W\] is weight\[:, 0\].T"):
        causal_convolution(x, weight.T)
    with pytest.raises(ValueError, match="tail must have "):
        causal_convolution(x, weight, tail=tail[:, :2])
    with pytest.raises(ValueError, match="segment_ids must have shape"):
        causal_convolution(x, weight, segment_ids=ids[:1])
