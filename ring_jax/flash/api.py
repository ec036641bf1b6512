"""`flash_attention`: one attention block over key intervals, with its derivative rule."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ring_jax._checks import check_array, check_instance, check_number, concrete
from ring_jax._vma import align
from ring_jax.flash import parts
from ring_jax.flash.backends import Backend, check_inputs, check_options, select
from ring_jax.flash.merge import carry_gradient, partial_dtype
from ring_jax.flash.packed import pack, pack_like

Partial = tuple[jax.Array, jax.Array]  # (out, lse)

OUT_NAME, LSE_NAME = "ring_jax_out", "ring_jax_lse"


def named(out, lse) -> Partial:
    """Residuals that a remat policy can save by name, so that neither kernel nor ring runs twice. Call it in the
    forward *rule*: inside the primal function of a custom VJP, policies do not see the names."""
    return checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static part of an attention call: what runs it, and its two scalars."""

    backend: Backend
    scale: float
    logits_soft_cap: float | None

    def forward(self, query, kv, start, end, carry, out_dtype=None, heads=None, into=None) -> Partial:
        """(out, lse) of one block, of keys in parts where bounds are [P, B, T] (`flash.parts`). `heads` and `into`, of backends
        that take them, as in `flash.backends`."""
        share = self._share(heads, into=into)
        if start.ndim == 3 and not self.backend.parts:
            return parts.forward(self.forward, query, kv, start, end, carry, out_dtype)
        return self.backend.forward(query, kv, start, end, carry, out_dtype=out_dtype, **share, **self._options)

    def backward(self, query, kv, start, end, lse, delta, dout, dq=None, heads=None) -> Partial:
        """(dq, dkv) of one block, float32; adds to `dq` where that is given. Keys in parts, and `heads`, as in `forward`."""
        share = self._share(heads)
        if start.ndim == 3 and not self.backend.parts:
            return parts.backward(self.backward, query, kv, start, end, lse, delta, dout, dq)
        operands, options = (query, kv, start, end, lse, delta, dout), self._options
        if self.backend.adds:
            return self.backend.backward(*operands, dq, **share, **options)
        own, dkv = self.backend.backward(*operands, **options)
        return own if dq is None else dq + own, dkv

    def _share(self, heads, **more) -> dict[str, Any]:
        """The options that only backends of shares of the heads take; none for all heads."""
        if heads is None:
            assert not any(x is not None for x in more.values())
            return {}
        assert self.backend.parts and self.backend.adds, f"{self.backend.name} takes no share of the heads"
        return {"heads": heads, **more}

    @property
    def _options(self) -> dict[str, float | None]:
        return {"scale": self.scale, "logits_soft_cap": self.logits_soft_cap}


def make_spec(query, kv, scale, logits_soft_cap, implementation, whole=None, deterministic=None) -> Spec:
    """Resolve defaults, on the shapes and the device that the block will see; arguments as in `backends.select`."""
    scale, logits_soft_cap = static_scalars(scale, logits_soft_cap)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return Spec(select(implementation, query, kv, logits_soft_cap, whole, deterministic), scale, logits_soft_cap)


def static_scalars(scale, logits_soft_cap) -> tuple[float | None, float | None]:
    """Both as Python floats (or None); raises unless they are finite numbers known at trace time."""
    if scale is not None:
        scale = check_number("scale", scale, advice="multiply a traced scale into the query instead")
    if logits_soft_cap is not None:
        logits_soft_cap = check_number("logits_soft_cap", logits_soft_cap, above=0)
    return scale, logits_soft_cap


def delta_of(out: jax.Array, dout: jax.Array, dlse: jax.Array) -> jax.Array:
    """delta = rowsum(dO . O) - dLSE, float32 [B, T, N]."""
    return jnp.sum(dout.astype(dlse.dtype) * out.astype(dlse.dtype), axis=-1) - dlse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def block(spec: Spec, query, kv, start, end, carry: Partial | None) -> Partial:
    """One differentiable attention block on packed KV; float32 (out, lse)."""
    return spec.forward(query, kv, start, end, carry)


def _block_fwd(spec, query, kv, start, end, carry):
    out, lse = named(*spec.forward(query, kv, start, end, carry))
    return (out, lse), (query, kv, start, end, carry, out, lse)


def _block_bwd(spec, saved, cotangents):
    query, kv, start, end, carry, out, lse = saved
    dout, dlse = cotangents
    dcarry = None if carry is None else carry_gradient(carry, lse, delta_of(out, dout, dlse), dout)
    # Kernels multiply dO in the inputs' dtype: delta must be that of the rounded dO, or what they share does not cancel.
    dout = dout.astype(query.dtype)
    dq, dkv = spec.backward(query, kv, start, end, lse, delta_of(out, dout, dlse), dout)
    return dq.astype(query.dtype), dkv.astype(kv.dtype), None, None, dcarry


block.defvjp(_block_fwd, _block_bwd)

# Called eagerly a block would compile at every call, operation by operation.
_jitted_block = jax.jit(block, static_argnums=0)


def flash_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    key_start: Int[Array, "B T"],
    key_end: Int[Array, "B T"],
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    carry: tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]] | None = None,
    implementation: str | None = None,
    deterministic: bool | None = None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Attention of every query row over one interval of keys, resumed from a carry.

        out_t = sum_s softmax(scale q_t . k_s) v_s,   s in [key_start_t, key_end_t)  (and what the carry saw)

    Args:
        query: [B, T, N, H], bfloat16, float16, float32 or float64.
        key, value: [B, S, K, H] and [B, S, K, Hv], same dtype; N a multiple of K (query head n reads head n // (N/K)).
        key_start, key_end: int32 [B, T] (or [T], [1, T]): row t sees keys with start <= s < end. They are clipped to
            [0, S]; start >= end is an empty row. Neither may decrease along T, or kernels give wrong results (an error
            where values are known while tracing): let an empty row repeat a bound of its neighbour, not (0, 0).
        scale: multiplies the logits; default H ** -0.5.
        logits_soft_cap: cap c > 0 applied as c * tanh(logits / c).
        carry: float32 (out, lse) of the same rows over other keys, to resume from. (0, sink) adds an attention sink.
        implementation: "reference", "xla", ... or None for the best that runs here.
        deterministic: True for gradients that repeat bit by bit; False for the fastest; None for gradients that repeat
            unless that costs more than 10%: all but cuDNN's and, on Hopper, those of head sizes of which the larger is
            from 65 to 128, whose last bits differ from run to run. Results of the forward pass always repeat.

    Returns:
        (out, lse): float32 [B, T, N, Hv] and natural-log [B, T, N] (float64 for float64 inputs), a mergeable
        partial result. An empty row gives out 0 and lse -inf, with zero gradients, or its carry unchanged.

    Raises:
        TypeError: what is no array, number, flag or name. ValueError: shapes, dtypes or values that do not fit.
        NotImplementedError: a named implementation that cannot run these inputs on this device.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 4, 2, 8))
        >>> out, lse = flash_attention(x, x, x, jnp.zeros((1, 4), int), jnp.arange(1, 5)[None])
        >>> out.shape, lse.shape
        ((1, 4, 2, 8), (1, 4, 2))

    Source: Dao, FlashAttention-2, arXiv 2307.08691; the resumed form is Liu et al., Ring Attention, arXiv 2310.01889.
    """
    check_inputs(query, key, value)
    scale, logits_soft_cap = static_scalars(scale, logits_soft_cap)
    check_options(implementation, deterministic)
    B, T, N, _ = query.shape
    S = key.shape[1]
    if carry is not None:
        check_instance("carry", carry, (tuple, list), "a pair (out, lse) of arrays")
        if len(carry) != 2:
            raise ValueError(f"carry must be a pair (out, lse) of arrays, got {len(carry)}")
        sizes = {"B": B, "T": T, "N": N, "Hv": value.shape[3]}
        check_array("carry[0]", carry[0], "B T N Hv", sizes)
        check_array("carry[1]", carry[1], "B T N", sizes)
    _check_bounds(key_start, key_end, B, T, S)
    whole = _whole(key_start, key_end, T, S)
    spec = make_spec(query, pack_like(key, value), scale, logits_soft_cap, implementation, whole, deterministic)
    start, end = _clipped(key_start, key_end, B, T, S)
    kv = pack(key, value)
    acc_dtype = partial_dtype(query.dtype)
    if carry is not None:
        out_in, lse_in = carry
        carry = (out_in.astype(acc_dtype), lse_in.astype(acc_dtype))
    if S == 0 or T == 0:
        return carry or (jnp.zeros((B, T, N, value.shape[3]), acc_dtype), jnp.full((B, T, N), -jnp.inf, acc_dtype))
    query, kv, start, end, carry = align(query, kv, start, end, carry)
    return _jitted_block(spec, query, kv, start, end, carry)


def _whole(key_start, key_end, T: int, S: int) -> str | None:
    """Which whole mask the bounds are, where their values are known now."""
    start, end = concrete(key_start), concrete(key_end)
    if start is None or end is None or np.any(start > 0):
        return None
    if np.all(end >= S):
        return "full"
    return "causal" if np.all(np.minimum(end, S) == np.minimum(np.arange(1, T + 1), S)) else None


def _check_bounds(key_start, key_end, B: int, T: int, S: int) -> None:
    for name, x in (("key_start", key_start), ("key_end", key_end)):
        check_array(name, x, kind="integer")
        if x.shape not in ((T,), (1, T), (B, T)):
            raise ValueError(
                f"{name} must have shape {(B, T)} (or {(1, T)}, {(T,)}) for query [B, T, ...], got {x.shape}"
            )
    low, high = concrete(key_start), concrete(key_end)
    if low is not None and high is not None:
        low, high = np.clip(low, 0, S), np.clip(high, 0, S)
        _check_ascending("key_start", low)
        _check_ascending("key_end", np.maximum(low, high))


def _clipped(key_start, key_end, B: int, T: int, S: int):
    """Bounds as int32 [B, T], 0 <= start <= end <= S."""
    start, end = (jnp.broadcast_to(jnp.clip(jnp.asarray(x, jnp.int32), 0, S), (B, T)) for x in (key_start, key_end))
    return start, jnp.maximum(start, end)


def _check_ascending(name: str, bound: np.ndarray) -> None:
    falls = np.atleast_2d(np.diff(bound, axis=-1) < 0)
    if falls.any():
        row = int(np.argmax(falls.any(axis=0)))
        raise ValueError(
            f"{name} must not decrease along the rows, but row {row + 1} has less than row {row}: order the rows by position, and "
            "let rows that see nothing repeat a bound of their neighbour"
        )
