"""The gated delta rule in chunks of 64 tokens: matrix products inside chunks, one small scan across them.

For one chunk that starts from state S, with A = I + strict_lower[(beta K) K^T . D], D_ij = exp(g_{j+1} + ... + g_i):

    U = A^-1 (beta V);   W = A^-1 (beta K . e^{G});   P = lower[(Q K^T) . D]
    V' = U - W S;   O = (Q . e^{G}) S + P V';   S <- e^{G_end} S + (K . e^{G_end - G})^T V'

Everything but `W S` and the new S is batched over chunks. Chunks go in groups: the groups are a scan whose body is
recomputed in the backward pass, so that what is kept is the inputs and one state for each group, O(S).

Sums of log decays are formed directly for each pair (i, j), as a product with a triangle of ones, and never as a
difference of two cumulative sums: those cancel where strong and weak decays mix, forward and backward.

Source: Yang et al., Gated Delta Networks (arXiv 2412.06464), the chunked form with the WY representation.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax._device import target
from ring_jax._vma import align
from ring_jax.gdn.checks import state_dtype
from ring_jax.gdn.inverse import BASE, unit_lower_inverse
from ring_jax.gdn.segments import document_index

CHUNK = 64
GROUP = 16  # chunks that are batched: bounds the memory of D, A, U, W, P
_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@dataclass(frozen=True)
class Grouping:
    """How many tokens form a chunk, chunks a group, and groups the padded sequence."""

    chunk: int
    chunks: int
    groups: int

    @classmethod
    def of(cls, time: int) -> "Grouping":
        chunk = CHUNK
        while chunk > 2 * BASE and chunk // 2 >= time:
            chunk //= 2
        total = max(math.ceil(time / chunk), 1)
        groups = math.ceil(total / GROUP)
        return cls(chunk, math.ceil(total / groups), groups)

    def split(self, x: jax.Array) -> jax.Array:
        """[B, T, ...] to [groups, chunks, B, chunk, ...], zeros at the end: they are exact no-ops."""
        pad = self.groups * self.chunks * self.chunk - x.shape[1]
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(x.shape[0], self.groups, self.chunks, self.chunk, *x.shape[2:])
        return jnp.moveaxis(x, 0, 2)

    def documents(self, segment_ids: jax.Array) -> jax.Array:
        """For `decays`, group by group: [groups, 2, chunks, B, chunk], each token's document and the one before it."""
        index = document_index(segment_ids)
        pad = self.groups * self.chunks * self.chunk - index.shape[1]
        index = jnp.pad(index, ((0, 0), (0, pad)), mode="edge")
        before = jnp.pad(index, ((0, 0), (1, 0)))[:, :-1]  # the document that a chunk's state comes from
        return jnp.stack([self.split(index), self.split(before)], axis=1)

    def join(self, x: jax.Array, time: int) -> jax.Array:
        """Inverse of `split`."""
        x = jnp.moveaxis(x, 2, 0)
        return x.reshape(x.shape[0], -1, *x.shape[4:])[:, :time]


def chunked(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    *,
    scale: float,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """See `ring_jax.gated_delta_rule`."""
    operands = query, key, value, log_decay, beta
    return _chunked(operands, scale=scale, initial_state=initial_state, segment_ids=segment_ids, outputs=True)


def transition(
    key: jax.Array, value: jax.Array, log_decay: jax.Array, beta: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(M, B) of S_out = M S_in + B over the whole array, float32 [B, N, dk, dk] and [B, N, dk, dv].

    The rule applied to the states [0 | I] side by side, with nothing written into the second: S_out = [B | M].
    Padding must be zeros already. M = I and B = 0 where all is padding; M = 0 where a document border lies inside.
    """
    batch, _, _, dk = key.shape
    heads, dv = value.shape[2:]
    dtype = state_dtype(key, value, log_decay, beta)
    identity = jnp.eye(dk, dv + dk, k=dv, dtype=dtype)
    state = jnp.broadcast_to(identity, (batch, heads, dk, dv + dk))
    operands = key, key, value, log_decay, beta
    _, state = _chunked(operands, scale=1.0, initial_state=state, segment_ids=segment_ids, outputs=False)
    return state[..., dv:], state[..., :dv]


def _chunked(
    operands: Any, *, scale: float, initial_state: jax.Array, segment_ids: jax.Array | None, outputs: bool
) -> tuple[Any, jax.Array]:
    query, key, value, log_decay, beta = operands
    dtype = state_dtype(query, key, value, log_decay, beta)
    batch, time, heads, dk = key.shape
    repeats, dv = value.shape[2] // heads, value.shape[3]
    grouping = Grouping.of(time)
    grouped = (batch, time, heads, repeats)
    xs = [query, key, value.reshape(*grouped, dv), log_decay.reshape(grouped), beta.reshape(grouped)]
    xs = [grouping.split(x) for x in xs]
    documents = None if segment_ids is None else grouping.documents(segment_ids)
    state = initial_state.reshape(batch, heads, repeats, dk, -1)
    state, xs, documents = align(state, xs, documents)

    @partial(jax.checkpoint, prevent_cse=False)
    def group(state: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array | None]:
        return _group(state, *inputs, scale=scale, dtype=dtype, outputs=outputs)

    state, out = lax.scan(group, state, (xs, documents))
    state = state.reshape(initial_state.shape)
    return (grouping.join(out, time).reshape(batch, time, heads * repeats, dv) if outputs else None), state


def _group(
    state: jax.Array, operands: Any, documents: jax.Array | None, *, scale: float, dtype: Any, outputs: bool
) -> tuple[jax.Array, jax.Array | None]:
    """One group of chunks. A state wider than d_v goes through it without being written to there.

    Axes: c chunk, b batch, k key head, r value heads of it, l and m tokens, d and v sizes.
    """
    query, key, value, log_decay, beta = operands
    q = jnp.einsum("cblkd->cbkld", query).astype(dtype) * scale
    k = jnp.einsum("cblkd->cbkld", key).astype(dtype)
    v = jnp.einsum("cblkrv->cbkrlv", value).astype(dtype)
    g, beta = (jnp.einsum("cblkr->cbkrl", x).astype(dtype) for x in (log_decay, beta))
    decay = decays(g, documents)

    repeats = v.shape[3]
    keys = _to_value_heads(_einsum("cbkld,cbkmd->cbklm", k, k), repeats)
    inverse = unit_lower_inverse(jnp.tril(beta[..., None] * keys * decay.between, -1))
    u = _einsum("cbkrlm,cbkrmv->cbkrlv", inverse, beta[..., None] * v)
    u = jnp.pad(u, [(0, 0)] * (u.ndim - 1) + [(0, state.shape[-1] - v.shape[-1])])
    k_each = _to_value_heads(k, repeats)
    w = _einsum("cbkrlm,cbkrmd->cbkrld", inverse, (beta * decay.from_start)[..., None] * k_each)
    k_out = decay.to_end[..., None] * k_each

    def chunk(state: jax.Array, xs: Any) -> tuple[Any, Any]:
        u, w, k_out, total = xs
        v_new = u - _einsum("bkrld,bkrdv->bkrlv", w, state)
        following = total[..., None, None] * state + _einsum("bkrld,bkrlv->bkrdv", k_out, v_new)
        return following, ((state, v_new) if outputs else None)

    state, kept = lax.scan(chunk, state, (u, w, k_out, decay.total))
    if not outputs:
        return state, None
    states, v_new = kept
    scores = _to_value_heads(_einsum("cbkld,cbkmd->cbklm", q, k), repeats) * decay.between
    q_in = decay.from_start[..., None] * _to_value_heads(q, repeats)
    out = _einsum("cbkrld,cbkrdv->cbkrlv", q_in, states) + _einsum("cbkrlm,cbkrmv->cbkrlv", scores, v_new)
    return state, jnp.einsum("cbkrlv->cblkrv", out).astype(value.dtype)


def _to_value_heads(x: jax.Array, repeats: int) -> jax.Array:
    """[c, b, k, ...], the same for all value heads of a key head: [c, b, k, r, ...].

    On CPUs the copies are made, and nothing is fused with them: their gradient is a sum over r, and where that is fused with
    a product over arrays that have an axis of size one, as it is under `vmap`, XLA ends the process (jax 0.10.2; see
    docs/upstream/cpu_product_sum.py).
    """
    x = x[:, :, :, None]
    if target().platform != "cpu":
        return x
    return lax.optimization_barrier(jnp.broadcast_to(x, (*x.shape[:3], repeats, *x.shape[4:])))


@dataclass(frozen=True)
class Decays:
    """Products of decays in every chunk, each zero where a document border lies between."""

    between: jax.Array  # [..., L, L], D_ij for i >= j, else 0
    from_start: jax.Array  # [..., L], e^G: from the state that enters to token i
    to_end: jax.Array  # [..., L], e^{G_end - G}: from token j to the state that leaves
    total: jax.Array  # [...], e^{G_end}


def decays(g: jax.Array, documents: jax.Array | None) -> Decays:
    """Of chunks of log decays [..., L] in documents [2, c, b, L], or None."""
    size = g.shape[-1]
    triangle = jnp.tril(jnp.ones((size, size), bool))
    same = triangle.reshape((1,) * (g.ndim - 1) + triangle.shape)
    summed = jnp.where(jnp.tril(same, -1), g[..., :, None], 0)  # g_l where l > j
    exponent = _einsum("il,...lj->...ij", triangle.astype(g.dtype), summed)
    start = _einsum("il,...l->...i", triangle.astype(g.dtype), g)
    from_start, to_end = jnp.exp(start), jnp.exp(exponent[..., -1, :])
    total = jnp.exp(start[..., -1])
    if documents is not None:
        index, entering = documents[0], documents[1][..., :1]  # [c, b, L], [c, b, 1]
        same = same & (index[..., :, None] == index[..., None, :])[:, :, None, None]
        reaches = (index == entering)[:, :, None, None]
        from_start = jnp.where(reaches, from_start, 0)
        to_end = jnp.where((index == index[..., -1:])[:, :, None, None], to_end, 0)
        total = jnp.where(reaches[..., -1], total, 0)
    # Masked before the exponential as well: a sum of positive log decays above the diagonal must not overflow.
    between = jnp.where(same, jnp.exp(jnp.where(same, exponent, 0)), 0)
    return Decays(between, from_start, to_end, total)
