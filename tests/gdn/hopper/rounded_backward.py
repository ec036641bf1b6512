"""What the Hopper backward computes, in plain JAX: as `rounded` does for the forward.

In float32 and float64 nothing is rounded, so that the formulas themselves can be held to autodiff.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax._arrays import rounded_to
from ring_jax.gdn.hopper.config import CHUNK
from ring_jax.gdn.hopper.gates import document_starts
from ring_jax.gdn.hopper.gradient_kernel import WEAK
from ring_jax.gdn.inverse import unit_lower_inverse
from ring_jax.gdn.segments import blank_padding

HIGHEST = lax.Precision.HIGHEST


def rounded_backward(operands, cotangents, *, scale, initial_state, segment_ids=None):
    """As `backward_launch.backward`."""
    query, key, value, log_decay, beta, out_gradient = blank_padding(segment_ids, *operands, cotangents[0])
    dtype = value.dtype
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    batch, time, key_heads, _ = key.shape
    heads = value.shape[2]

    narrow = partial(rounded_to, dtype=dtype)

    def chunks(x):
        """[B, T, n, d] to [B, N, chunks, 64, d], zeros at the end."""
        x = jnp.pad(x.astype(wide), ((0, 0), (0, -time % CHUNK), (0, 0), (0, 0)))
        x = jnp.repeat(jnp.moveaxis(x, 2, 1), heads // x.shape[2], axis=1)
        return x.reshape(*x.shape[:2], -1, CHUNK, x.shape[3])

    q, k, v, d_out = (chunks(x) for x in (query, key, value, out_gradient))
    log_decay, beta = (chunks(x[..., None])[..., 0] for x in (log_decay, beta))
    starts = None if segment_ids is None else document_starts(segment_ids)[:, None]
    total, from_start, to_end, decay = _gates(log_decay, starts)
    keys, scores = _einsum("...id,...jd->...ij", k, k), _einsum("...id,...jd->...ij", q, k)
    inverse = narrow(unit_lower_inverse(jnp.tril(keys * decay * beta[..., None, :], -1)))
    p = narrow(scale * scores * decay)

    def ahead(state, xs):
        k, v, inverse, beta, from_start, to_end = xs
        read = narrow(state)
        y = narrow(v - from_start[..., None] * _einsum("...id,...dv->...iv", k, read))
        z = _einsum("...ij,...jv->...iv", inverse, y)
        state = from_start[..., -1, None, None] * state
        state = state + _einsum("...id,...iv->...dv", k, narrow((to_end * beta)[..., None] * z))
        return state, (read, narrow(z))

    def back(gradient, xs):
        q, k, d_out, p, inverse, beta, from_start, to_end = xs
        read = narrow(gradient)
        du = to_end[..., None] * _einsum("...id,...dv->...iv", k, read) + _einsum("...ij,...iv->...jv", p, d_out)
        dv = _einsum("...ij,...iv->...jv", inverse, narrow(beta[..., None] * du))
        gradient = from_start[..., -1, None, None] * gradient
        gradient = gradient + _einsum("...id,...iv->...dv", q, narrow(scale * from_start[..., None] * d_out))
        gradient = gradient - _einsum("...id,...iv->...dv", k, narrow(from_start[..., None] * dv))
        return gradient, (read, narrow(dv))

    _, (states, z) = _over_chunks(ahead, initial_state.astype(wide), (k, v, inverse, beta, from_start, to_end))
    xs = (q, k, d_out, p, inverse, beta, from_start, to_end)
    state_gradient, (ends, dv) = _over_chunks(back, cotangents[1].astype(wide), xs, reverse=True)

    a = scale * _einsum("...iv,...jv->...ij", d_out, z) * decay
    b = -jnp.tril(_einsum("...iv,...jv->...ij", dv, z) * decay, -1)
    a_beta, b_beta = a * beta[..., None, :], b * beta[..., None, :]
    read_q = (scale * from_start)[..., None] * _einsum("...iv,...dv->...id", d_out, states)
    read_k = -from_start[..., None] * _einsum("...iv,...dv->...id", dv, states)
    written = to_end[..., None] * _einsum("...iv,...dv->...id", z, ends)
    dq = read_q + _einsum("...ij,...jd->...id", narrow(a_beta), k)
    row = read_k + _einsum("...ij,...jd->...id", narrow(b_beta), k)
    column = written + _einsum("...ij,...id->...jd", narrow(a), q) + _einsum("...ij,...id->...jd", narrow(b), k)
    dk, strong = row + beta[..., None] * column, jnp.abs(beta) > WEAK
    d_beta = jnp.where(strong, _dot(dv, z) / jnp.where(strong, beta, 1.0), _dot(k, column))
    # Sums of what depends on each log decay: of pairs i >= l > j, of reads at i >= l, of writes at j < l.
    ones = jnp.ones((CHUNK, CHUNK), wide)
    pair_dtype = jnp.bfloat16 if jnp.dtype(dtype).itemsize == 2 else wide

    def crossing(x):
        x = rounded_to(jnp.tril(x, -1), pair_dtype)
        return _einsum("li,...ij,lj->...l", jnp.triu(ones), x, jnp.tril(ones, -1))

    d_decay = crossing(a_beta * scores) + crossing(b_beta * keys)
    d_decay = d_decay + _einsum("li,...i->...l", jnp.triu(ones), _dot(q, read_q) + _dot(k, read_k))
    d_decay = d_decay + _einsum("lj,...j->...l", jnp.tril(ones, -1), beta * _dot(k, written))
    d_decay = d_decay + (from_start[..., -1] * jnp.sum(states * ends, (-2, -1)))[..., None]

    def whole(x, dtype, groups=heads):
        x = x.reshape(batch, heads, -1, x.shape[-1])[:, :, :time]
        x = jnp.sum(x.reshape(batch, groups, heads // groups, time, -1), 2)
        return jnp.moveaxis(x, 1, 2).astype(dtype)

    gradients = whole(dq, query.dtype, key_heads), whole(dk, key.dtype, key_heads)
    gradients += (whole(dv, dtype),)
    gradients += tuple(whole(x[..., None], wide)[..., 0] for x in (d_decay, d_beta))
    return (*blank_padding(segment_ids, *gradients), state_gradient)


def _gates(log_decay, starts):
    total = jnp.cumsum(log_decay, axis=-1)
    from_start, to_end = jnp.exp(total), jnp.exp(total[..., -1:] - total)
    square = (*total.shape, CHUNK)
    row, column = (lax.broadcasted_iota(jnp.int32, square, axis) for axis in (total.ndim - 1, total.ndim))
    visible = row >= column
    if starts is not None:
        place = lax.broadcasted_iota(jnp.int32, starts.shape, starts.ndim - 1)
        from_start = jnp.where(starts < 0, from_start, 0.0)
        to_end = jnp.where(place >= starts[..., -1:], to_end, 0.0)
        visible = visible & (starts[..., None] <= column)
    decay = jnp.where(visible, total[..., :, None] - total[..., None, :], 0)
    return total, from_start, to_end, jnp.where(visible, jnp.exp(decay), 0)


def _over_chunks(step, state, xs, reverse=False):
    state, found = lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), xs), reverse=reverse)
    return state, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), found)


def _dot(x, y):
    return jnp.sum(x * y, axis=-1)


def _einsum(formula, *operands):
    return jnp.einsum(formula, *operands, precision=HIGHEST)
