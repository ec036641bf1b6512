"""The Hopper kernels as a backend: device check, and head sizes padded to what TMA and wgmma take.

`plgpu.kernel` forgets over which manual mesh axes its outputs vary, so they are cast back here.
"""

import jax
import jax.numpy as jnp

from ring_jax._device import target
from ring_jax._vma import pcast_to, varying_axes
from ring_jax.flash.hopper import backward_launch, forward_launch
from ring_jax.flash.packed import pack, unpack
from ring_jax.mosaic import in_place

_HEAD_MULTIPLE = 64


def device_reason() -> str | None:
    """Why the device that is being compiled for cannot run Hopper kernels, or None."""
    device = target()
    if device.platform != "gpu":
        return f"needs an NVIDIA Hopper GPU, this is {device.kind}"
    if not any(name in device.kind for name in ("H100", "H200", "H800", "H20", "GH200")):
        return f"needs an NVIDIA Hopper GPU (compute capability 9.0), this is {device.kind}"
    return None


def unsupported(query: jax.Array, kv: jax.Array, logits_soft_cap: float | None = None) -> str | None:
    """Why the kernels cannot run these inputs here, or None."""
    return device_reason() or forward_launch.unsupported_reason(query, kv, logits_soft_cap=logits_soft_cap)


def halves_suffice(query: jax.Array, kv: jax.Array) -> bool:
    """Whether the kernels keep the device busy on half of the KV heads at a time."""
    return in_place.AVAILABLE and backward_launch.halves_suffice(query, kv)


def forward(
    query, kv, key_start, key_end, carry, *, scale, logits_soft_cap=None, out_dtype=None, heads=None, into=None
):
    """See `flash.backends`."""
    axes = varying_axes(query, kv, key_start, key_end, carry, into)
    options = {"scale": scale, "logits_soft_cap": logits_soft_cap, "out_dtype": out_dtype or jnp.float32}
    options |= {"heads": heads, "into": into}
    with jax.enable_x64(False):  # the kernels compute indices in int32
        partial = forward_launch.forward(query, kv, key_start, key_end, carry, **options)
    return pcast_to(partial, axes)


def backward(
    query,
    kv,
    key_start,
    key_end,
    lse,
    delta,
    dout,
    dq=None,
    *,
    scale,
    logits_soft_cap=None,
    deterministic=None,
    heads=None,
):
    """See `flash.backends`."""
    axes = varying_axes(query, kv, key_start, key_end, lse, delta, dout, dq)
    head_size, value_size = query.shape[-1], dout.shape[-1]
    padded = bool(head_size % _HEAD_MULTIPLE or value_size % _HEAD_MULTIPLE)
    # Keys in parts: an axis before all others.
    each_part = jax.vmap if key_start.ndim == 3 else lambda f: f
    if padded:
        kv = each_part(lambda kv: pack(*(_pad_heads(x) for x in unpack(kv, head_size))))(kv)
        query, dout = _pad_heads(query), _pad_heads(dout)
        dq = None if dq is None else _pad_heads(dq)
    operands = (query, kv, key_start, key_end, lse, delta, dout.astype(query.dtype), dq)
    with jax.enable_x64(False):
        options = {"scale": scale, "logits_soft_cap": logits_soft_cap, "deterministic": deterministic, "heads": heads}
        dq, dkv = backward_launch.backward(*operands, **options)
    if padded:

        def cut(dkv):
            dk, dv = unpack(dkv, query.shape[-1])
            return pack(dk[..., :head_size], dv[..., :value_size])

        dq, dkv = dq[..., :head_size], each_part(cut)(dkv)
    return pcast_to((dq, dkv), axes)


def _pad_heads(x):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % _HEAD_MULTIPLE)])
