"""cuDNN's fused attention as a backend, for masks that are one whole block: full, or causal from the first position.

cuDNN takes no key intervals and no offsets, only such masks, so what a call's mask is must be known while tracing
(`Backend.fixed_mask`). The ring cuts its causal hops into whole halves for it (`ring_jax.context.cudnn_ring`).

`jax.nn.dot_product_attention` returns the LSE rounded and drops its gradient, so this calls the primitives below it,
which are private to jax: forward with the float32 LSE, and backward from a *given* LSE and output. That backward
computes delta = rowsum(dO . O) itself; ours includes dLSE and perhaps other KV blocks, so it is handed an O parallel to dO with
just that row sum, O' = delta dO / |dO|^2. Rounding O' costs delta no more than rounding O costs cuDNN's own.

Partial results come out of cuDNN in the input's dtype, so a ring of C hops rounds C times: 4e-3 in bfloat16.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from ring_jax._arrays import Shaped
from ring_jax._device import target
from ring_jax._vma import pcast_to, varying_axes
from ring_jax.flash.kv import pack, unpack
from ring_jax.flash.merge import merge_partials
from ring_jax.flash.operands import BlockOptions, Bounds, Gradients, Partial, RowGradients

# Stands for dO where dO is zero and delta is not: so small that dP and dV do not notice.
_TINY = 2.0**-60
_BTNH = 0


def unsupported_reason(query: Shaped, kv: Shaped, options: BlockOptions) -> str | None:
    """Why cuDNN cannot run these inputs here, or None."""
    if options.logits_soft_cap is not None:
        return "cuDNN has no soft cap for logits"
    if query.dtype != jnp.bfloat16 or kv.dtype != query.dtype:
        return f"needs bfloat16 (delta travels through it, which float16's range does not hold), got {query.dtype}"
    if kv.ndim != 5:
        return "needs key and value of one head size"
    if 0 in query.shape or 0 in kv.shape:
        return f"empty arrays, got {query.shape} and {kv.shape}"
    return _device_reason(query.shape[-1])


def _device_reason(head_size: int) -> str | None:
    device = target()
    if device.platform != "gpu":
        return f"needs an NVIDIA GPU, this is {device.platform}"
    capability = 9.0 if device.compute_capability is None else device.compute_capability
    if capability < 8.0:
        return f"needs compute capability 8.0 or later, this is {capability}"
    largest = 256 if capability >= 9.0 else 128
    if head_size > largest or head_size % 8:
        return f"needs head sizes that are multiples of 8 and at most {largest} on this GPU, got {head_size}"
    return None


def forward(
    query: jax.Array,
    kv: jax.Array,
    bounds: Bounds,
    carry: Partial | None,
    options: BlockOptions,
    *,
    causal: bool,
    out_dtype: DTypeLike | None = None,
) -> Partial:
    """See `flash.backends`; the bounds must say what `causal` says."""
    axes = varying_axes(query, kv, bounds, carry)
    key, value = unpack(kv, query.shape[-1])
    # The barrier is for scans, as in `flash.hopper.forward_launch`: XLA may clone a call into the write of its residual.
    out, lse = lax.optimization_barrier(_attend(query, key, value, scale=options.scale, causal=causal))
    out, lse = pcast_to((out.astype(jnp.float32), jnp.moveaxis(lse, 1, 2)), axes)
    if carry is not None:
        out, lse = merge_partials(carry[0], carry[1], out, lse)
    return out.astype(out_dtype or jnp.float32), lse


def backward(
    query: jax.Array, kv: jax.Array, bounds: Bounds, rows: RowGradients, options: BlockOptions, *, causal: bool
) -> Gradients:
    """See `flash.backends`; the bounds must say what `causal` says."""
    axes = varying_axes(query, kv, bounds, rows)
    key, value = unpack(kv, query.shape[-1])
    dout, out = with_row_sum(rows.dout.astype(query.dtype), rows.delta)
    grads = _pull(query, key, value, jnp.moveaxis(rows.lse, 2, 1), out, dout, scale=options.scale, causal=causal)
    dq, dk, dv = (x.astype(jnp.float32) for x in grads)
    return pcast_to((dq, pack(dk, dv)), axes)


def with_row_sum(dout: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(dO, O') in dO's dtype with rowsum(dO . O') = delta; rows of dO that are zero become tiny."""
    wide = dout.astype(jnp.float32)
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    none = square < _TINY
    first = lax.broadcasted_iota(jnp.int32, dout.shape, dout.ndim - 1) == 0
    wide = jnp.where(none, jnp.where(first, _TINY, 0.0), wide)
    square = jnp.where(none, _TINY * _TINY, square)
    return wide.astype(dout.dtype), (wide * (delta[..., None] / square)).astype(dout.dtype)


def _primitives() -> ModuleType:
    # Private to jax, so imported only where it is used.
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def _options(scale: float, causal: bool) -> dict[str, Any]:
    masks = _primitives().MaskType
    options: dict[str, Any] = dict(
        scale=float(scale),
        seed=42,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=masks.CAUSAL if causal else masks.NO_MASK,
        layout=_BTNH,
        sliding_window_length=None,
    )
    # jax 0.12 added what it calls score_mod.
    if hasattr(_primitives(), "_dot_product_attention_fwd_impl_wrapper"):
        options |= {"score_mod_name": None, "score_mod_jaxpr": None}
    return options


def _unused(query: jax.Array) -> tuple[jax.Array, ...]:
    return (jnp.zeros(0, query.dtype),) * 7  # bias, lengths, offsets, page tables


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float, causal: bool) -> list[jax.Array]:
    """(out [B, T, N, H], lse [B, N, T] float32)."""
    return _primitives()._dot_product_attention_fwd_p.bind(
        query, key, value, *_unused(query), **_options(scale, causal), is_training=True
    )


def _pull(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lse: jax.Array,
    out: jax.Array,
    dout: jax.Array,
    *,
    scale: float,
    causal: bool,
) -> list[jax.Array]:
    """(dq, dk, dv) in the input's dtype."""
    return _primitives()._dot_product_attention_bwd_p.bind(
        query, key, value, *_unused(query), lse, out, dout, **_options(scale, causal)
    )
