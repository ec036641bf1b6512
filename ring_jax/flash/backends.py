"""The attention backends behind `implementation=`, and the choice between them.

A backend is two functions on one block, without derivative rules of their own:

    forward(query, kv, bounds, carry, options, *, out_dtype=None, heads=None, into=None) -> (out, lse)
    backward(query, kv, bounds, rows, options, *, dq=None, heads=None) -> (dq, dkv)

query [B, T, N, H]; kv packed (`flash.kv`); `Bounds`, `BlockOptions` and `RowGradients` as in `flash.operands`, bounds between 0
and S; carry None or float32 (out, lse) to resume from; out and lse float32 unless `out_dtype` says otherwise; dq and dkv
float32. `flash.block` puts the derivative rule around them.

- Keys in P segments: kv with an axis before all others and bounds [P, B, T], an interval of each segment.
- `heads`: kv holds a slice of the KV heads. `forward` computes the query heads that share them and writes those `into` (out, lse)
  (None: new arrays, whose other heads are undefined); `backward` adds to those of dq.
- `dq`: what to add to.

A backend that only computes one plain block gets the rest from `flash.fallbacks` where it is registered (`_plain`). To add one:
write the two functions, give `unsupported_reason` a reason for what it cannot do, add it to `BACKENDS` and its name to `Implementation`;
CONTRIBUTING.md has the rest.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ring_jax._arrays import Shaped
from ring_jax._checks import Sizes, check_array, check_choice, check_flag
from ring_jax.flash import cudnn, reference, xla
from ring_jax.flash.fallbacks import complete_backward, complete_forward
from ring_jax.flash.hopper import backward_launch, forward_launch, support
from ring_jax.flash.operands import BlockOptions, Gradients, Partial

FixedMask = Literal["full", "causal"]
Implementation = Literal["reference", "xla", "mosaic", "cudnn"]


@dataclass(frozen=True)
class Backend:
    name: str
    forward: Callable[..., Partial]
    backward: Callable[..., Gradients]
    # Rings of up to this many ranks are unrolled. A kernel is one small op, so unrolling is cheap and lets XLA overlap
    # freely; a block made of XLA loops is large to compile, and CPUs keep all hops' buffers when they are unrolled.
    unroll: int = 2
    # Why it cannot run these inputs here, or None. Takes (query, kv, options).
    unsupported_reason: Callable[[Shaped, Shaped, BlockOptions], str | None] = lambda query, kv, options: None
    # The mask that it takes the bounds to be ("causal": from the first position), or None where it reads them.
    fixed_mask: FixedMask | None = None
    # Whether gradients repeat bit by bit, if that is asked for.
    deterministic: bool = True
    # Whether half of the KV heads at a time keep the device busy. Takes (query, kv).
    can_split_heads: Callable[[jax.Array, jax.Array], bool] = lambda query, kv: False


def _plain(
    name: str, forward: Callable[..., Partial], backward: Callable[..., Gradients], **properties: Any
) -> Backend:
    """A backend of functions that compute one plain block."""
    return Backend(name, complete_forward(forward), complete_backward(backward), **properties)


def _cudnn(fixed_mask: FixedMask) -> Backend:
    forward, backward = (functools.partial(f, causal=fixed_mask == "causal") for f in (cudnn.forward, cudnn.backward))
    reason = cudnn.unsupported_reason
    return _plain(
        "cudnn", forward, backward, unroll=8, unsupported_reason=reason, fixed_mask=fixed_mask, deterministic=False
    )


# The same kernel for each mask that it knows.
CUDNN: dict[str, Backend] = {"full": _cudnn("full"), "causal": _cudnn("causal")}

BACKENDS: dict[Implementation, Backend] = {
    "reference": _plain("reference", reference.forward, reference.backward),
    "xla": _plain("xla", xla.forward, xla.backward),
    "mosaic": Backend(
        "mosaic",
        forward_launch.forward,
        backward_launch.backward,
        unroll=8,
        unsupported_reason=support.unsupported_reason,
        can_split_heads=support.can_split_heads,
    ),
    "cudnn": CUDNN["full"],
}

# What implementation=None tries, best first; the last runs anything.
PREFERENCE: tuple[Implementation, ...] = ("mosaic", "cudnn", "xla")


def unsupported_reason(
    name: Implementation, query: Shaped, kv: Shaped, options: BlockOptions, fixed_mask: FixedMask | None = None
) -> str | None:
    """Why the backend `name` cannot run these inputs under such a mask here, or None; arguments as in `select`."""
    backend = BACKENDS[name]
    if options.deterministic and not backend.deterministic:
        return "its gradients need not repeat bit by bit, and deterministic=True asks for that"
    reason = backend.unsupported_reason(query, kv, options)
    if reason is None and backend.fixed_mask is not None and fixed_mask not in CUDNN:
        return (
            "cuDNN reads no key intervals: the mask must be known, while tracing, to be full or causal over a sequence without "
            "padding, and a causal one needs strategy 'ring' (contiguous or two-chunk zigzag) or 'ulysses' where ranks are several"
        )
    return reason


def select(
    implementation: Implementation | None,
    query: Shaped,
    kv: Shaped,
    options: BlockOptions,
    fixed_mask: FixedMask | None = None,
) -> Backend:
    """The backend that `implementation` names, or the best that runs here for None.

    Args:
        implementation: a name of `BACKENDS`, or None.
        query, kv: arrays, or their shapes and dtypes, as the block will see them.
        options: of the call.
        fixed_mask: "full" or "causal" where the mask is known to be that, for backends that cannot read bounds.

    Raises:
        ValueError: unknown name.
        NotImplementedError: a named backend cannot run these inputs on this device.
    """
    check_choice("implementation", implementation, BACKENDS, optional=True)
    if implementation is None:
        inputs = query, kv, options, fixed_mask
        implementation = next(name for name in PREFERENCE if unsupported_reason(name, *inputs) is None)
    elif (reason := unsupported_reason(implementation, query, kv, options, fixed_mask)) is not None:
        raise NotImplementedError(
            f"implementation={implementation!r} cannot run here: {reason}. None lets ring_jax choose"
        )
    assert implementation is not None
    backend = BACKENDS[implementation]
    return backend if backend.fixed_mask is None or fixed_mask is None else CUDNN[fixed_mask]


def with_batch(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array, bool]:
    """(query, key, value, whether they lacked it) with a batch axis, which all three or none may lack, as in jax.nn."""
    if all(getattr(x, "ndim", None) == 3 for x in (query, key, value)):
        return query[None], key[None], value[None], True
    return query, key, value, False


_DTYPES = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)))


def check_inputs(query: Array, key: Array, value: Array) -> None:
    """Shapes and dtypes that every attention call shares.

    Raises:
        TypeError, ValueError: with what came and what was expected.
    """
    sizes = Sizes()
    for name, x, axes in (("query", query, "B T N H"), ("key", key, "B S K H"), ("value", value, "B S K Hv")):
        check_array(name, x, axes, sizes)
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name} must be floating point (bfloat16, float16, float32 or float64), got {x.dtype}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value must share one dtype, got {query.dtype}, {key.dtype} and {value.dtype}: cast them first"
        )
    N, K = sizes["N"], sizes["K"]
    if N % K if K else N:
        raise ValueError(f"{N} query heads cannot share {K} key-value heads: query's N must be a multiple of key's K")
    if query.shape[3] == 0:
        raise ValueError(f"query, key must have a head size of at least 1, got {query.shape}")


def check_options(implementation: Any, deterministic: Any) -> None:
    """Raises unless these name a backend and say which gradients; None leaves the choice to us."""
    check_choice("implementation", implementation, sorted(BACKENDS), optional=True)
    check_flag("deterministic", deterministic, optional=True)
