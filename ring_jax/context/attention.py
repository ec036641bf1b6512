"""`ring_attention`: attention over a sequence spread over a mesh axis, from one call."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ring_jax._checks import (
    check_array,
    check_choice,
    check_flag,
    check_instance,
    concrete,
    describe,
    is_array,
    static_length,
)
from ring_jax._vma import pcast_to, varying_axes
from ring_jax.context import halves
from ring_jax.context.parallel import ContextParallel, axis_size, mask_specs, run_sharded
from ring_jax.context.shard import Shard
from ring_jax.context.strategies import NAMES, STRATEGIES, choose
from ring_jax.flash import backends
from ring_jax.flash.api import make_spec, static_scalars
from ring_jax.flash.merge import partial_dtype
from ring_jax.flash.packed import pack, pack_like
from ring_jax.mask import Mask, ResolvedMask, causal, lengths, local_window, per_row


def ring_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    bias: None = None,
    mask: Mask | ResolvedMask | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, " B"] | None = None,
    key_value_seq_lengths: Int[Array, " B"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    context: ContextParallel,
    seq_len: int | None = None,
    key_value_seq_len: int | None = None,
    query_offset: int | Int[Array, " B"] = 0,
    strategy: str | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    deterministic: bool | None = None,
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Exact attention over a sequence sharded across a context-parallel mesh axis.

        out = softmax(scale query key^T, masked) value

    Up to `return_residual` the signature is that of `jax.nn.dot_product_attention`. Arrays come and go in the
    order that `context.layout` names (`context.to_layout`); masks speak of natural order. Call it under jit on
    global arrays, or inside a `jax.shard_map` on local shards.

    Args:
        query: [B, T, N, H]; bfloat16, float16, float32 or float64.
        key, value: [B, S, K, H], [B, S, K, Hv], the query's dtype; N a multiple of K.
        bias: not supported, must be None.
        mask: a `Mask` (`causal() & documents(...)`, ...) or one resolved by `context.resolve`. Arrays are refused: a
            mask must be one interval of keys per query.
        scale: of the logits; default H ** -0.5.
        is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size: shorthand for `causal()`, `lengths(q, kv)`
            and `window(l, r)`, intersected with `mask`. Causal is top-left aligned for T != S; see query_offset.
        implementation: block backend, "xla", "reference", ...; None takes the best that runs here.
        return_residual: also return the LSE. Its gradient is exact.
        context: how the arrays are spread.
        seq_len, key_value_seq_len: real lengths where arrays were padded by `to_layout`; the rest is masked.
            key_value_seq_len defaults to seq_len where the padded lengths agree (self-attention): pass it for any other keys.
            Padding must hold finite values, as `to_layout` leaves it.
        query_offset: key position of query 0, for a chunk after a cached prefix; integer or int32 [B].
        strategy: overrides `context.strategy`.
        logits_soft_cap: c > 0 for c * tanh(logits / c).
        sinks: float [N], one extra logit per head that takes part in the softmax but has no value. The LSE includes it.
        deterministic: True for gradients that repeat bit by bit, False for the fastest, None as the implementation likes;
            see `flash_attention`.

    Returns:
        out [B, T, N, Hv] in the query's dtype; with return_residual also lse [B, T, N], float32, natural log. A query
        that sees no key gives out 0 and lse -inf (or its sink), with zero gradients; jax.nn gives the mean of V there.

    Raises:
        TypeError, ValueError: arguments that are not what they should be, or do not fit together.
        NotImplementedError: what is not supported, with the reason.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> cp = ContextParallel("context", layout="zigzag", mesh=mesh)
        >>> x = cp.to_layout(jnp.ones((1, 6, 2, 8)))
        >>> out = ring_attention(x, x, x, is_causal=True, context=cp, seq_len=6)
        >>> cp.from_layout(out, seq_len=6).shape
        (1, 6, 2, 8)

    Source: Liu et al., Ring Attention, arXiv 2310.01889; vLLM pull request 39875.
    """
    check_instance("context", context, ContextParallel, "a ring_jax.ContextParallel")
    if bias is not None:
        raise NotImplementedError(
            "bias is not supported: blocks see intervals of keys, not arrays of logits. Express masking with mask=; "
            "for additive biases gather the sequence and use jax.nn.dot_product_attention"
        )
    check_options(
        mask=mask, scale=scale, is_causal=is_causal, local_window_size=local_window_size, implementation=implementation,
        return_residual=return_residual, seq_len=seq_len, key_value_seq_len=key_value_seq_len, strategy=strategy,
        logits_soft_cap=logits_soft_cap, deterministic=deterministic,
    )  # fmt: skip
    backends.check_inputs(query, key, value)
    if sinks is not None:
        check_array("sinks", sinks, "N", {"N": query.shape[2]}, advice="one logit for each query head")
    offset = per_row("query_offset", query_offset)
    mask = _combine(mask, is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size, query_offset)
    if isinstance(mask, ResolvedMask):
        seq_len, key_value_seq_len = _resolved_lengths(mask, context, seq_len, key_value_seq_len)
    strategy = context.strategy if strategy is None else strategy
    call = _plan(
        query, key, value, context, seq_len, key_value_seq_len, strategy, scale, logits_soft_cap, implementation
    )
    call = dataclasses.replace(call, deterministic=deterministic)
    resolved = isinstance(mask, ResolvedMask)
    if not isinstance(mask, ResolvedMask):
        _check_rows((mask, offset), query.shape[0])
        call = dataclasses.replace(call, whole=_whole(call, mask, query_offset))
        if strategy == "auto" and call.strategy == "all_gather":
            call = _ring_for_cudnn(call, mask, query_offset, query, key, value)
    sinks = None if sinks is None else jnp.asarray(sinks)
    where = mask if resolved else (mask, offset)
    if context.is_manual:
        out, lse = call(query, key, value, where, sinks)
    else:
        out, lse = _sharded(call, context, query, key, value, where, sinks)
    return (out, lse) if return_residual else out


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of one call, and what one rank does in it."""

    queries: Shard
    keys: Shard
    q_len: int
    kv_len: int
    strategy: str
    scale: float | None
    logits_soft_cap: float | None
    implementation: str | None
    whole: str | None = None
    deterministic: bool | None = None

    def __call__(self, query, key, value, mask, sinks):
        """On local shards, inside a shard_map that is manual over the context axis."""
        B, T, N, _ = query.shape
        kv = pack(key, value)
        choice = self.implementation, self.whole, self.deterministic
        spec = make_spec(query, kv, self.scale, self.logits_soft_cap, *choice)
        if isinstance(mask, ResolvedMask):
            start, end = mask.start, mask.end
            if start.shape[1] != T or start.shape[0] not in (1, B):
                raise ValueError(
                    f"the resolved mask has local shape {start.shape}, the queries are [{B}, {T}]: resolve it with this seq_len and batch"
                )
        else:
            start, end = self.queries.bounds(mask[0], self.q_len, self.kv_len, mask[1])
        start, end = (jnp.broadcast_to(x, (B, T)) for x in (start, end))
        # Replicated inputs become varying before the custom VJP: their psum is the transpose of this cast.
        axes = varying_axes(query, kv, start, sinks, self.queries.rank())
        query, kv, start, end, sinks = pcast_to((query, kv, start, end, sinks), axes)
        carry, acc_dtype = None, partial_dtype(query.dtype)
        if T == 0 or key.shape[1] == 0:
            sinks = jnp.full(N, -jnp.inf, acc_dtype) if sinks is None else sinks.astype(acc_dtype)
            nothing = jnp.zeros((B, T, N, value.shape[-1]), query.dtype), jnp.broadcast_to(sinks, (B, T, N))
            return pcast_to(nothing, axes)
        if sinks is not None:
            lse = jnp.broadcast_to(sinks.astype(acc_dtype), (B, T, N))
            carry = (pcast_to(jnp.zeros((B, T, N, value.shape[-1]), acc_dtype), axes), lse)
        return STRATEGIES[self.strategy](spec, self.keys, query, kv, start, end, carry)


def _whole(call: _Call, mask: Mask, query_offset) -> str | None:
    """Which whole mask the blocks see, for backends that cannot read bounds."""
    if (call.q_len, call.kv_len) != (call.queries.length, call.keys.length):
        return None
    if not mask.parts:
        return "full"
    natural = call.keys.ranks == 1 or call.strategy == "ulysses"
    cut = call.strategy in ("ring", "ring_ulysses") and halves.serves(call.keys.layout) and call.q_len == call.kv_len
    offset = concrete(query_offset)
    plain = mask.parts == causal().parts and offset is not None and not np.any(offset)
    return "causal" if plain and (natural or cut) else None


def _ring_for_cudnn(call: _Call, mask: Mask, query_offset, query, key, value) -> _Call:
    """`call` as a ring where cuDNN would then be the block: it takes no causal mask over gathered keys."""
    ring = dataclasses.replace(call, strategy="ring")
    ring = dataclasses.replace(ring, whole=_whole(ring, mask, query_offset))
    if ring.whole == call.whole:
        return call
    inputs: Any = query, pack_like(key, value), call.logits_soft_cap, ring.whole, call.deterministic
    implementation = backends.select(None, *inputs).name if call.implementation is None else call.implementation
    return ring if implementation == "cudnn" else call


def _sharded(call: _Call, context: ContextParallel, query, key, value, mask, sinks):
    mesh = context.resolve_mesh(query)
    batch, heads = context.free(context.batch_axis), context.free(context.head_axis)
    _check_divides("batch", query.shape[0], mesh, batch)
    _check_divides("query heads", query.shape[2], mesh, heads)
    _check_divides("key-value heads", key.shape[2], mesh, heads)
    spec = P(batch, context.axis, heads, None)
    if isinstance(mask, ResolvedMask):
        rows = P(batch if mask.start.shape[0] > 1 else None, context.axis)
        mask_spec: Any = jax.tree.map(lambda _: rows, mask)
    else:
        mask_spec = mask_specs(mask, query.shape[0], batch)
    in_specs = (spec, spec, spec, mask_spec, None if sinks is None else P(heads))
    return run_sharded(call, mesh, in_specs, (spec, P(*spec[:3])), (query, key, value, mask, sinks))


def _plan(
    query, key, value, context, seq_len, key_value_seq_len, strategy, scale, logits_soft_cap, implementation
) -> _Call:
    """Lengths, shards and strategy of a call; everything that can be checked before tracing."""
    ranks = context.ranks(query)
    whole = ranks if context.is_manual else 1
    query_len, key_len = query.shape[1] * whole, key.shape[1] * whole
    for name, length in (("query", query_len), ("key", key_len)):
        check_divides(name, length, ranks, context)
    q_len = query_len if seq_len is None else static_length("seq_len", seq_len)
    if key_value_seq_len is not None:
        kv_len = static_length("key_value_seq_len", key_value_seq_len)
    elif seq_len is None or query_len == key_len:
        kv_len = q_len if query_len == key_len else key_len
    else:
        raise ValueError(
            f"seq_len={seq_len} is the queries' real length; the keys are another sequence (padded lengths {query_len} and {key_len}), "
            "so pass key_value_seq_len too"
        )
    for name, given, length in (("seq_len", q_len, query_len), ("key_value_seq_len", kv_len, key_len)):
        if not 0 <= given <= length:
            raise ValueError(f"{name}={given} is not in [0, {length}], the length of the array")
    if (strategy == "ring_ulysses") != isinstance(context.axis, tuple) and strategy != "auto":
        raise ValueError(
            f"strategy {strategy!r} does not fit context axis {context.axis!r}: 'ring_ulysses' takes two mesh axes (outer, inner), "
            "the others one"
        )
    if strategy == "auto":
        head_ranks = 1 if context.is_manual else axis_size(context.resolve_mesh(query), context.free(context.head_axis))
        strategy, _ = choose(
            query_len=query_len, key_len=key_len, ranks=ranks, axis=context.axis, head_size=query.shape[3],
            query_heads=query.shape[2] // head_ranks, kv_heads=key.shape[2] // head_ranks,
        )  # fmt: skip
    scale, logits_soft_cap = static_scalars(scale, logits_soft_cap)
    queries, keys = (Shard(context.axis, ranks, context.layout, length) for length in (query_len, key_len))
    return _Call(queries, keys, q_len, kv_len, strategy, scale, logits_soft_cap, implementation)


def _combine(mask, is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size, query_offset):
    """`mask` and the shorthand arguments as one mask."""
    counts = {"query_seq_lengths": query_seq_lengths, "key_value_seq_lengths": key_value_seq_lengths}
    for name, count in counts.items():
        if count is not None:
            per_row(name, count)
    shorthand = Mask()
    if is_causal:
        shorthand &= causal()
    if query_seq_lengths is not None or key_value_seq_lengths is not None:
        shorthand &= lengths(query_seq_lengths, key_value_seq_lengths)
    if local_window_size is not None:
        shorthand &= local_window(local_window_size)
    if not isinstance(mask, ResolvedMask):
        return shorthand if mask is None else mask & shorthand
    offset = concrete(query_offset)
    if shorthand.parts or offset is None or np.any(offset != 0):
        raise ValueError(
            "a resolved mask is complete: is_causal, lengths, local_window_size and query_offset belong into the Mask that "
            "context.resolve(mask, seq_len, query_offset=...) is given"
        )
    return mask


def _resolved_lengths(mask: ResolvedMask, context: ContextParallel, seq_len, key_value_seq_len) -> tuple[int, int]:
    """The lengths that a resolved mask was made for; what the call says beside it must agree."""
    if mask.layout != context.layout:
        raise ValueError(
            f"the mask was resolved for layout {mask.layout}, this context has {context.layout}: resolve it with this one"
        )
    for name, given, made_for in (
        ("seq_len", seq_len, mask.q_len),
        ("key_value_seq_len", key_value_seq_len, mask.kv_len),
    ):
        if given is not None and given != made_for:
            raise ValueError(f"{name}={given}, but the mask was resolved for {made_for}: resolve it with this length")
    return mask.q_len, mask.kv_len


def check_options(
    *,
    mask=None,
    scale=None,
    is_causal=False,
    local_window_size=None,
    implementation=None,
    return_residual=False,
    seq_len=None,
    key_value_seq_len=None,
    strategy=None,
    logits_soft_cap=None,
    deterministic=None,
) -> None:
    """Checks what is known before any array is, of `ring_attention` and of the defaults of an `attention_fn`."""
    if mask is not None and not isinstance(mask, (Mask, ResolvedMask)):
        kind = NotImplementedError if is_array(mask) else TypeError
        raise kind(
            f"mask must be a ring_jax.Mask such as causal() & documents(segment_ids=...), got {describe(mask)}: a mask array need "
            "not be one interval of keys per query, and would cost O(T S) memory"
        )
    check_flag("is_causal", is_causal)
    check_flag("return_residual", return_residual)
    check_choice("strategy", strategy, NAMES, optional=True)
    backends.check_options(implementation, deterministic)
    static_scalars(scale, logits_soft_cap)
    for name, length in (("seq_len", seq_len), ("key_value_seq_len", key_value_seq_len)):
        if length is not None:
            static_length(name, length)
    if local_window_size is not None:
        local_window(local_window_size)


def _check_rows(mask_and_offset, batch: int) -> None:
    for rows in {x.shape[0] for x in jax.tree.leaves(mask_and_offset)} - {1, batch}:
        raise ValueError(
            f"mask, query_seq_lengths, key_value_seq_lengths and query_offset must have one row or the batch's {batch}, got {rows}"
        )


def check_divides(name: str, length: int, ranks: int, context: ContextParallel) -> None:
    """Raises ValueError where a sequence was not laid out."""
    padded = context.layout.padded_length(length, ranks)
    if padded != length:
        raise ValueError(
            f"{name} length {length} does not divide over {ranks} context ranks in layout {context.layout}: lay the arrays out with "
            f"context.to_layout, which pads to {padded}, and pass seq_len={length}"
        )


def _check_divides(what: str, size: int, mesh, axis) -> None:
    ranks = axis_size(mesh, axis)
    if size % ranks:
        raise ValueError(f"{what}: {size} does not divide over mesh axis {axis!r} of size {ranks}")
