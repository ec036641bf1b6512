"""The gated delta rule on Hopper with float32 results from 16-bit inputs: the kernel with split operands, and what it is given.

What does not depend on states, T and P of every chunk, comes from XLA in float32; gradients are those of the chunked form.
"""

from functools import partial

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ring_jax._arrays import rounded_to
from ring_jax._vma import align, pcast_to, varying_axes
from ring_jax.gdn import chunked
from ring_jax.gdn.hopper import split_kernel
from ring_jax.gdn.hopper.config import CHUNK
from ring_jax.gdn.hopper.launch import lengthened, unsupported_reason
from ring_jax.gdn.inverse import unit_lower_inverse
from ring_jax.gdn.segments import blank_padding

_GROUP = 64  # chunks whose T and P are made at a time: bounds what XLA holds in between
_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def split(query, key, value, log_decay, beta, *, scale, initial_state, segment_ids):
    """See `ring_jax.gated_delta_rule`; initial_state may be None, which saves reading zeros."""
    return _rule(scale, *align(query, key, value, log_decay, beta, initial_state, segment_ids))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(scale, query, key, value, log_decay, beta, initial_state, segment_ids):
    operands = query, key, value, log_decay, beta
    with jax.enable_x64(False):  # the kernel computes indices in int32
        out, state = forward(*operands, scale=scale, initial_state=initial_state, segment_ids=segment_ids)
    return pcast_to((out.astype(value.dtype), state), varying_axes(*operands))


def _forward(scale, *arguments):
    return _rule(scale, *arguments), arguments


def _backward(scale, arguments, cotangents):
    *operands, initial_state, segment_ids = arguments

    def rule(operands, state):
        return chunked.chunked(*operands, scale=scale, initial_state=state, segment_ids=segment_ids)

    _, key, value, *_ = operands
    state = initial_state
    if state is None:
        shape = (key.shape[0], value.shape[2], key.shape[3], value.shape[3])
        state = pcast_to(jnp.zeros(shape, jnp.float32), varying_axes(*operands))
    gradients, state_gradient = jax.vjp(rule, tuple(operands), state)[1](cotangents)
    return *gradients, None if initial_state is None else state_gradient, None


_rule.defvjp(_forward, _backward)


def forward(
    query: Array,
    key: Array,
    value: Array,
    log_decay: Float[Array, "B T N"],
    beta: Float[Array, "B T N"],
    *,
    scale: float,
    initial_state: Float[Array, "B N dk dv"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T N dv"], Float[Array, "B N dk dv"]]:
    """As `launch.forward`, but out is float32 and as exact as float32 operands would make it, to about 5e-6.

    Raises:
        NotImplementedError: if `launch.unsupported_reason` gives one.
    """
    reason = unsupported_reason(query, key, value, scale=scale)
    if reason is not None:
        raise NotImplementedError(f"the Hopper kernel of the gated delta rule {reason}")
    time, heads = value.shape[1:3]
    query, key, value, log_decay, beta = blank_padding(segment_ids, query, key, value, log_decay, beta)
    inverse, scores, gates = matrices(query, key, log_decay, beta, segment_ids, scale=scale)
    query, key, value = (lengthened(x) for x in (query, key, value))
    batch, _, key_heads, key_size = key.shape
    problem = split_kernel.Problem(
        batch=batch,
        chunks=pl.cdiv(time, CHUNK),
        key_heads=key_heads,
        heads=heads,
        key_size=key_size,
        value_size=value.shape[3],
        initial=initial_state is not None,
        dtype=jnp.dtype(key.dtype),
    )
    initial = None if initial_state is None else jnp.swapaxes(initial_state, 2, 3)
    out, final = split_kernel.forward(problem, query, key, value, inverse, scores, gates, initial)
    return jnp.transpose(out, (0, 3, 1, 2))[:, :time], jnp.swapaxes(final, 2, 3)


def matrices(query, key, log_decay, beta, segment_ids, *, scale: float):
    """T and P of every chunk, [chunks, B, N, 2, 64, 64] in the dtype of the keys (the second part is what the first leaves), and
    gates [chunks, B, N, 3, 64] in float32; chunks may be more than there are."""
    batch, time, key_heads, _ = key.shape
    heads = beta.shape[2]
    chunks = pl.cdiv(time, CHUNK)
    groups = pl.cdiv(chunks, _GROUP)
    grouping = chunked.Grouping(CHUNK, pl.cdiv(chunks, groups), groups)
    per_key_head = (batch, time, key_heads, heads // key_heads)
    xs = [query, key, log_decay.reshape(per_key_head), beta.reshape(per_key_head)]
    xs = [grouping.split(x) for x in xs]
    documents = None if segment_ids is None else grouping.documents(segment_ids)
    found = lax.map(lambda xs: _group(*xs, scale=scale), (*align(*xs), documents))
    return [x.reshape(-1, batch, heads, *x.shape[5:]) for x in found]


def _group(query, key, log_decay, beta, documents, *, scale: float):
    """Of the chunks of one group; axes as in `chunked`."""
    dtype = key.dtype
    q, k = (jnp.einsum("cblkd->cbkld", x).astype(jnp.float32) for x in (query, key))
    g, beta = (jnp.einsum("cblkr->cbkrl", x).astype(jnp.float32) for x in (log_decay, beta))
    decay = chunked.decays(g, documents)
    keys = _einsum("cbkld,cbkmd->cbklm", k, k)[:, :, :, None]
    inverse = unit_lower_inverse(jnp.tril(beta[..., None] * keys * decay.between, -1)) * beta[..., None, :]
    scores = scale * _einsum("cbkld,cbkmd->cbklm", q, k)[:, :, :, None] * decay.between
    gates = jnp.stack([decay.from_start, scale * decay.from_start, decay.to_end], axis=-2)
    return _parts(inverse, dtype), _parts(scores, dtype), gates


def _parts(x, dtype):
    """[..., 64, 64] float32 as [..., 2, 64, 64] whose sum it is."""
    high = rounded_to(x, dtype)
    return jnp.stack([high, x - high], axis=-3).astype(dtype)
