"""Ring attention behind the ``attention_fn`` hook of Flax's multi-head attention layers.

Flax hands its hook more than the arrays. `nnx.MultiHeadAttention` passes a fixed set of keywords (newer releases add
``is_causal`` and ``input_positions``); linen passes only those keywords that the hook's signature *names*, so a hook
with ``**kwargs`` would never hear of dropout. `AttentionFn` therefore names every argument of both, and honours or
rejects each one:

=============================== ======================================================================================
``dtype``                       honoured: query, key and value are cast to it; None promotes them to a common dtype
``is_causal``                   honoured: adds to what the defaults say
``mask``                        a `ring_jax.Mask` is honoured and joins the default one; an array is rejected
``input_positions``             honoured with the default ``rope`` (without them: the layout's), rejected without it
``deterministic``               honoured: switches dropout off
``dropout_rate``                rejected when it would act (positive, and not deterministic)
``dropout_rng``                 without effect, as in Flax, where no dropout acts; so is ``broadcast_dropout``
``force_fp32_for_softmax``      always so here
``promote_dtype``               honoured
``bias``, ``module``            rejected: bias, and sowing of weights, would need the S x S matrix
``precision``                   honoured: the block is as precise as HIGHEST for its dtype; dot algorithms are rejected
``*_einsum``, ``*_dot_general`` rejected: a fused block has no einsum to replace
=============================== ======================================================================================
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ring_jax._checks import (
    check_array,
    check_callable,
    check_dtype,
    check_flag,
    check_instance,
    check_number,
    check_precision,
    describe,
    is_array,
)
from ring_jax._segment_ids import per_row
from ring_jax.context.attention import check_options, ring_attention
from ring_jax.context.parallel import ContextParallel
from ring_jax.mask import Mask, ResolvedMask

_CHECKED = frozenset(inspect.signature(check_options).parameters)
_NOT_DEFAULTS = ("query", "key", "value", "bias", "return_residual", "context")


def attention_fn(context: ContextParallel, **defaults: Any) -> AttentionFn:
    """Ring attention over `context` as the ``attention_fn`` of Flax's nnx and linen multi-head attention.

    Args:
      context: the mesh axes and the layout of the sequence.
      **defaults: keyword arguments of `ring_jax.ring_attention` for every call (``is_causal``, ``mask``,
        ``local_window_size``, ``scale``, ``seq_len``, ``strategy``, ...), without arrays: pass a mask that holds arrays
        (segment ids, lengths) to the layer's call as ``mask=`` instead. Also ``rope``, a function (x [B, T, N, H],
        positions [B, T]) -> x [B, T, N, H]. Positions are the layer's ``input_positions``, which newer Flax has;
        without them those of the context's layout, on every Flax, nnx and linen alike.

    Returns:
      An `AttentionFn`, equal and hashable by value, so that two models built alike share compiled programs.

    Raises:
      TypeError: for a keyword that `ring_jax.ring_attention` does not have.
      ValueError: for a default that holds an array.

    Example:
      >>> import jax, jax.numpy as jnp, ring_jax
      >>> from flax import nnx
      >>> mesh = jax.make_mesh((1,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> cp = ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh)
      >>> attention_fn = cp.attention_fn(is_causal=True)
      >>> layer = nnx.MultiHeadAttention(2, 16, decode=False, attention_fn=attention_fn, rngs=nnx.Rngs(0))
      >>> layer(cp.to_layout(jnp.ones((1, 8, 16)))).shape
      (1, 8, 16)
    """
    check_instance("context", context, ContextParallel, "a ring_jax.ContextParallel")
    known = _ring_options()
    defaults = {name: tuple(value) if isinstance(value, list) else value for name, value in defaults.items()}
    for name in defaults:
        if name not in known:
            raise TypeError(f"attention_fn got an unknown default {name!r}; it takes {', '.join(sorted(known))}")
    _check_defaults(defaults)
    for name, value in defaults.items():
        if isinstance(value, np.ndarray) or any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value)):
            raise ValueError(
                f"the attention_fn default {name!r} holds an array, which would be frozen into the layer. Pass it to "
                "the layer's call (mask=ring_jax.documents(...)), or call ring_jax.ring_attention yourself"
            )
    return AttentionFn(context, tuple(sorted(defaults.items())))


def _check_defaults(defaults: dict[str, Any]) -> None:
    checked = {name: value for name, value in defaults.items() if name in _CHECKED}
    check_options(**checked)
    check_callable("rope", defaults.get("rope"), "a function (x, positions) -> x", optional=True)
    for name in ("query_seq_lengths", "key_value_seq_lengths", "query_offset"):
        if name in defaults and (name == "query_offset" or defaults[name] is not None):
            per_row(name, defaults[name])
    if defaults.get("sinks") is not None:
        raise ValueError("attention_fn takes no sinks, which are an array: call ring_jax.ring_attention yourself")


@dataclasses.dataclass(frozen=True)
class AttentionFn:
    """Ring attention with the call signature that Flax expects; made by `attention_fn`, described in its module."""

    context: ContextParallel
    defaults: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        check_instance("context", self.context, ContextParallel, "a ring_jax.ContextParallel")
        pairs = self.defaults if isinstance(self.defaults, tuple) else (None,)
        if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            raise TypeError(
                f"defaults must be a tuple of (name, value), got {describe(self.defaults)}: use attention_fn"
            )

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K Hv"],
        bias: None = None,
        mask: Mask | ResolvedMask | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: None = None,
        promote_dtype: Callable[..., Any] | None = None,
        is_causal: bool = False,
        input_positions: Int[Array, "... T"] | None = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: None = None,
        qk_attn_weights_einsum: None = None,
        attn_weights_value_einsum: None = None,
    ) -> Float[Array, "*B T N Hv"]:
        """Attention over the context axis; see the module docstring for what each argument does.

        Raises:
          ValueError: for shapes that do not belong together, or ``input_positions`` without ``rope`` or the reverse.
          NotImplementedError: for an argument that ring attention cannot honour.
        """
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_array(name, x)
        flags = {"broadcast_dropout": broadcast_dropout, "deterministic": deterministic, "is_causal": is_causal}
        for name, flag in (flags | {"force_fp32_for_softmax": force_fp32_for_softmax}).items():
            check_flag(name, flag)
        check_number("dropout_rate", dropout_rate, low=0, high=1)
        check_dtype("dtype", dtype, optional=True)
        check_callable("promote_dtype", promote_dtype, "a function (arrays, dtype=) -> arrays", optional=True)
        del broadcast_dropout, dropout_rng, force_fp32_for_softmax
        _reject(bias=bias, module=module, einsum_dot_general=einsum_dot_general)
        _reject(qk_attn_weights_einsum=qk_attn_weights_einsum, attn_weights_value_einsum=attn_weights_value_einsum)
        _reject_dropout(dropout_rate, deterministic)
        check_precision("precision", precision)
        _reject_precision(precision)

        options = dict(self.defaults)
        rope = options.pop("rope", None)
        options["mask"] = _combine_masks(mask, options.get("mask"))
        options["is_causal"] = is_causal or options.get("is_causal", False)

        query, key, value = _promote((query, key, value), dtype, promote_dtype)
        batch = _common_batch(query, key, value)
        query, key, value = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value))
        query, key = _rotate(rope, query, key, input_positions, self.context)
        out = ring_attention(query, key, value, context=self.context, **options)
        assert isinstance(out, jax.Array)
        return out.reshape(*batch, *out.shape[-3:])


def _ring_options() -> frozenset[str]:
    return frozenset(inspect.signature(ring_attention).parameters).difference(_NOT_DEFAULTS) | {"rope"}


_WHY_NOT = {
    "bias": "an additive bias needs the S x S matrix of logits",
    "module": "sow_weights=True asks for the S x S matrix of weights, which is never formed",
    "einsum_dot_general": "the fused block has no einsum to replace",
    "qk_attn_weights_einsum": "the fused block has no einsum to replace",
    "attn_weights_value_einsum": "the fused block has no einsum to replace",
}


def _reject(**arguments: Any) -> None:
    for name, given in arguments.items():
        if given is not None:
            raise NotImplementedError(f"ring attention cannot honour {name}: {_WHY_NOT[name]}")


def _reject_dropout(rate: float, deterministic: bool) -> None:
    if rate > 0.0 and not deterministic:
        raise NotImplementedError(
            f"ring attention has no attention dropout, got dropout_rate={rate} with deterministic=False. Use "
            "dropout_rate=0.0 in the layer, or drop activations outside attention"
        )


def _reject_precision(precision: Any) -> None:
    for given in precision if isinstance(precision, tuple) else (precision,):
        # float32 products run at HIGHEST and 16-bit ones are exact, so every named precision is met.
        try:
            known = given is None or isinstance(jax.lax.Precision(given), jax.lax.Precision)
        except (ValueError, TypeError):
            known = False
        if not known:
            raise NotImplementedError(
                f"ring attention cannot honour precision={given!r}: expected None or a jax.lax.Precision; its block "
                "chooses the algorithm by dtype"
            )


def _combine_masks(mask: Any, default: Mask | None) -> Mask | ResolvedMask | None:
    if mask is None:
        return default
    if isinstance(mask, ResolvedMask):
        if default is not None:
            raise ValueError("a resolved mask is complete and cannot join the mask that attention_fn has as a default")
        return mask
    if not isinstance(mask, Mask):
        raise (NotImplementedError if is_array(mask) else TypeError)(
            f"ring attention takes a ring_jax.Mask, got mask={type(mask).__name__} with shape "
            f"{getattr(mask, 'shape', None)}. Say it as intervals: ring_jax.causal() & ring_jax.documents(...) & "
            "ring_jax.lengths(...). Flax's decode=True makes such an array, and is not supported"
        )
    return mask if default is None else mask & default


def _promote(arrays: tuple[Array, ...], dtype: Any, promote_dtype: Callable[..., Any] | None) -> tuple[Array, ...]:
    if promote_dtype is not None:
        return tuple(promote_dtype(arrays, dtype=dtype))
    if dtype is None:
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(*arrays)
    return tuple(x.astype(dtype) for x in arrays)


def _common_batch(query: Array, key: Array, value: Array) -> tuple[int, ...]:
    shapes = query.shape, key.shape, value.shape
    if min(len(s) for s in shapes) < 3 or not shapes[0][:-3] == shapes[1][:-3] == shapes[2][:-3]:
        raise ValueError(
            "expected query [B..., T, N, H], key [B..., S, K, H] and value [B..., S, K, Hv] with the same batch axes, "
            f"got {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    return shapes[0][:-3]


def _rotate(
    rope: Any, query: Array, key: Array, positions: Array | None, context: ContextParallel
) -> tuple[Array, Array]:
    if rope is None and positions is None:
        return query, key
    if rope is None:
        raise ValueError(
            "got input_positions, which act only through rotary embeddings: "
            "use context.attention_fn(rope=ring_jax.nn.apply_rope)"
        )
    if query.shape[1] != key.shape[1]:
        raise ValueError(
            f"positions cannot serve queries of length {query.shape[1]} and keys of length {key.shape[1]} at once: rotate them "
            "outside of the attention_fn"
        )
    if positions is None:  # older Flax has no such argument
        length = query.shape[1] * (context.ranks() if context.is_manual else 1)
        positions = context.positions(length, like=query)
    check_array("input_positions", positions, kind="integer")
    if positions.shape[-1:] != query.shape[1:2] or math.prod(positions.shape[:-1]) not in (1, query.shape[0]):
        raise ValueError(
            f"input_positions must be [T] or [B..., T] for {query.shape[0]} rows of T={query.shape[1]}, got {positions.shape}"
        )
    positions = jnp.broadcast_to(positions.reshape(-1, positions.shape[-1]), query.shape[:2])
    return rope(query, positions), rope(key, positions)
