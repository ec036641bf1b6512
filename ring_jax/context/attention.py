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
from ring_jax._mesh import AnyMesh, Axis, axis_size, run_sharded
from ring_jax._segment_ids import per_row
from ring_jax.context.call import Call
from ring_jax.context.parallel import ContextParallel
from ring_jax.context.shard import mask_specs
from ring_jax.context.strategies import NAMES, StrategyName, check_strategy
from ring_jax.flash import backends
from ring_jax.flash.backends import FixedMask, Implementation, with_batch
from ring_jax.flash.merge import partial_dtype
from ring_jax.flash.operands import BlockOptions, Partial
from ring_jax.mask import Mask, MaskAndOffset, ResolvedMask, causal, lengths, local_window


def ring_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K Hv"],
    bias: None = None,
    mask: Mask | ResolvedMask | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, " #rows"] | None = None,
    key_value_seq_lengths: Int[Array, " #rows"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
    context: ContextParallel,
    seq_len: int | None = None,
    key_value_seq_len: int | None = None,
    query_offset: int | Int[Array, " #rows"] = 0,
    strategy: StrategyName | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    deterministic: bool | None = None,
    carry: tuple[Float[Array, "*B T N Hv"], Float[Array, "*B T N"]] | None = None,
    return_partial: bool = False,
) -> Float[Array, "*B T N Hv"] | tuple[Float[Array, "*B T N Hv"], Float[Array, "*B T N"]]:
    """Exact attention over a sequence sharded across a context-parallel mesh axis.

        out = softmax(scale query key^T, masked) value

    Up to `return_residual` the signature is that of `jax.nn.dot_product_attention`. Arrays come and go in the
    order that `context.layout` names (`context.to_layout`); masks speak of natural order. Call it under jit on
    global arrays, or inside a `jax.shard_map` on local shards.

    Args:
        query: [B, T, N, H]; bfloat16, float16, float32 or float64.
        key, value: [B, S, K, H], [B, S, K, Hv], the query's dtype; N a multiple of K. All three may lack the batch axis,
            as in jax.nn; results then lack it, too.
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
        carry: (out, lse) of the same queries over other keys, to resume from: float32 (float64 for float64 inputs), as
            return_partial gives it.
        return_partial: return (out, lse) with out in float32 (float64), which another call can resume from, or
            `merge_partials` join, without a bit lost. Cached keys and a new chunk are two calls:

                partial = ring_attention(query, old_key, old_value, context=cp, return_partial=True)
                out = ring_attention(query, key, value, is_causal=True, context=cp, carry=partial)

    Returns:
        out [B, T, N, Hv] in the query's dtype; with return_residual or return_partial also lse [B, T, N], float32, natural log. A query
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
        return_residual=return_residual, return_partial=return_partial, seq_len=seq_len,
        key_value_seq_len=key_value_seq_len, strategy=strategy, logits_soft_cap=logits_soft_cap, deterministic=deterministic,
    )  # fmt: skip
    query, key, value, unbatched = with_batch(query, key, value)
    backends.check_inputs(query, key, value)
    if sinks is not None:
        check_array("sinks", sinks, "N", {"N": query.shape[2]}, advice="one logit for each query head")
    offset = per_row("query_offset", query_offset)
    mask = _combine(mask, is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size, query_offset)
    if isinstance(mask, ResolvedMask):
        seq_len, key_value_seq_len = _resolved_lengths(mask, context, seq_len, key_value_seq_len)
    strategy = context.strategy if strategy is None else strategy
    options = BlockOptions.of_call(query.shape[-1], scale, logits_soft_cap, deterministic)
    call = _make_call(query, key, context, seq_len, key_value_seq_len, strategy, implementation, options)
    where: Any = mask
    fixed_mask = None
    if not isinstance(mask, ResolvedMask):
        where, fixed_mask = (mask, offset), _fixed_mask(call, mask, query_offset)
        _check_rows(where, query.shape[0])
    call = dataclasses.replace(call, fixed_mask=fixed_mask, returns_partial=return_partial)
    operands = query, key, value, where, _check_sinks(sinks, carry), _check_carry(carry, query, value, unbatched)
    if context.is_manual:
        out, lse = call(*operands)
    else:
        mesh = context.resolve_mesh(query)
        in_specs, out_specs = _specs(context, mesh, *operands)
        out, lse = run_sharded(call, mesh, in_specs, out_specs, operands)
    if unbatched:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual or return_partial else out


def _check_sinks(sinks: Array | None, carry: Partial | None) -> jax.Array | None:
    if sinks is None:
        return None
    if carry is not None:
        raise ValueError("sinks belong into the first call over a row's keys; the carry's LSE includes them already")
    return jnp.asarray(sinks)


def _check_carry(carry: Partial | None, query: jax.Array, value: jax.Array, unbatched: bool) -> Partial | None:
    """The carry, with a batch axis."""
    if carry is None:
        return None
    check_instance("carry", carry, (tuple, list), "a pair (out, lse) as return_partial=True gives it")
    if len(carry) != 2:
        raise ValueError(f"carry must be a pair (out, lse) as return_partial=True gives it, got {len(carry)}")
    out, lse = (x[None] if unbatched and is_array(x) else x for x in carry)
    dtype, rows = partial_dtype(query.dtype), query.shape[:3]
    for name, x, shape in (("carry's out", out, (*rows, value.shape[-1])), ("carry's lse", lse, rows)):
        check_array(name, x)
        if x.shape != shape or x.dtype != dtype:
            raise ValueError(
                f"{name} must be {dtype} {shape}, as return_partial=True gives it, got {x.dtype} {x.shape}"
            )
    return out, lse


def _fixed_mask(call: Call, mask: Mask, query_offset: int | Array) -> FixedMask | None:
    """Which fixed mask the call has, for backends that cannot read bounds."""
    if (call.q_len, call.kv_len) != (call.queries.length, call.keys.length):
        return None
    if not mask.terms:
        return "full"
    offset = concrete(query_offset)
    plain = mask.terms == causal().terms and offset is not None and not np.any(offset)
    return "causal" if plain else None


def _specs(
    context: ContextParallel,
    mesh: AnyMesh,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: ResolvedMask | MaskAndOffset,
    sinks: jax.Array | None,
    carry: Partial | None,
) -> tuple[tuple[Any, ...], tuple[P, P]]:
    """(in_specs, out_specs) of a call's operands."""
    batch, heads = context.free(context.batch_axis), context.free(context.head_axis)
    _check_divides("batch", query.shape[0], mesh, batch)
    _check_divides("query heads", query.shape[2], mesh, heads)
    _check_divides("key-value heads", key.shape[2], mesh, heads)
    spec = P(batch, context.axis, heads, None)
    partial = spec, P(*spec[:3])
    if isinstance(mask, ResolvedMask):
        rows = P(batch if mask.start.shape[0] > 1 else None, context.axis)
        mask_spec: Any = jax.tree.map(lambda _: rows, mask)
    else:
        mask_spec = mask_specs(mask, query.shape[0], batch)
    in_specs = spec, spec, spec, mask_spec, None if sinks is None else P(heads), None if carry is None else partial
    return in_specs, partial


def _make_call(
    query: jax.Array,
    key: jax.Array,
    context: ContextParallel,
    seq_len: int | None,
    key_value_seq_len: int | None,
    strategy: StrategyName,
    implementation: Implementation | None,
    options: BlockOptions,
) -> Call:
    """Lengths and shards of a call; everything that can be checked before tracing."""
    ranks = context.ranks(query)
    local_to_global = ranks if context.is_manual else 1
    query_len, key_len = query.shape[1] * local_to_global, key.shape[1] * local_to_global
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
    check_strategy(strategy, context.axis)
    queries, keys = (context.shard(length, query) for length in (query_len, key_len))
    return Call(queries, keys, q_len, kv_len, strategy, implementation, options, None, False)


def _combine(
    mask: Mask | ResolvedMask | None,
    is_causal: bool,
    query_seq_lengths: Array | None,
    key_value_seq_lengths: Array | None,
    local_window_size: int | tuple[int, int] | None,
    query_offset: int | Array,
) -> Mask | ResolvedMask:
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
    if shorthand.terms or offset is None or np.any(offset != 0):
        raise ValueError(
            "a resolved mask is complete: is_causal, lengths, local_window_size and query_offset belong into the Mask that "
            "context.resolve(mask, seq_len, query_offset=...) is given"
        )
    return mask


def _resolved_lengths(
    mask: ResolvedMask, context: ContextParallel, seq_len: int | None, key_value_seq_len: int | None
) -> tuple[int, int]:
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
    mask: Any = None,
    scale: Any = None,
    is_causal: Any = False,
    local_window_size: Any = None,
    implementation: Any = None,
    return_residual: Any = False,
    return_partial: Any = False,
    seq_len: Any = None,
    key_value_seq_len: Any = None,
    strategy: Any = None,
    logits_soft_cap: Any = None,
    deterministic: Any = None,
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
    check_flag("return_partial", return_partial)
    check_choice("strategy", strategy, NAMES, optional=True)
    backends.check_options(implementation, deterministic)
    BlockOptions.of_call(1, scale, logits_soft_cap, deterministic)
    for name, length in (("seq_len", seq_len), ("key_value_seq_len", key_value_seq_len)):
        if length is not None:
            static_length(name, length)
    if local_window_size is not None:
        local_window(local_window_size)


def _check_rows(mask_and_offset: MaskAndOffset, batch: int) -> None:
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


def _check_divides(what: str, size: int, mesh: AnyMesh, axis: Axis | None) -> None:
    ranks = axis_size(mesh, axis)
    if size % ranks:
        raise ValueError(f"{what}: {size} does not divide over mesh axis {axis!r} of size {ranks}")
