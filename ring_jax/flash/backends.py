"""The attention backends behind `implementation=`, and the choice between them.

A backend is two functions on one block, without derivative rules of their own:

    forward(query, kv, key_start, key_end, carry, *, scale, logits_soft_cap, out_dtype) -> (out, lse)
    backward(query, kv, key_start, key_end, lse, delta, dout[, dq], *, scale, logits_soft_cap) -> (dq, dkv)

query [B, T, N, H]; kv packed (`flash.packed`); key_start, key_end int32 [B, T], 0 <= start <= end <= S,
monotone along T; carry None or float32 (out, lse) to resume from; lse the *final* LSE of all keys
(-inf rows have zero gradient); delta = rowsum(dO . O) - dLSE; dq, dkv float32. `flash.api` and the
strategies in `ring_jax.context` put the derivative rules around them.

Backends with `parts` also take keys in P parts: kv with an axis before all others, and bounds [P, B, T], an interval of
each part. For the others `flash.parts` goes from part to part.

Backends with `takes_halves` (and with `parts` and `adds`, below) also take kv of a share of the KV heads,
`heads=packed.Heads(first, total)`: `forward` computes the query heads of that share and writes them `into=(out, lse)` (None: new
arrays, whose other heads are undefined); `backward` adds to those of dq.

To add one: write the two functions, give `unsupported` a reason for what it cannot do, add it to
`BACKENDS`, and add its name to the harness in tests/flash.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ring_jax._checks import Sizes, check_array, check_choice, check_flag
from ring_jax.flash import cudnn, reference, xla
from ring_jax.flash.hopper import backend as mosaic


@dataclass(frozen=True)
class Backend:
    name: str
    forward: Callable
    backward: Callable
    # Rings of up to this many ranks are unrolled. A kernel is one small op, so unrolling is cheap and lets XLA overlap
    # freely; a block made of XLA loops is large to compile, and CPUs keep all hops' buffers when they are unrolled.
    unroll: int = 2
    # Why it cannot run these inputs here, or None. Takes (query, kv, logits_soft_cap).
    unsupported: Callable[[jax.Array, jax.Array, float | None], str | None] = lambda query, kv, logits_soft_cap: None
    # The mask that it takes the bounds to be: "full", "causal" (from the first position), or None where it reads them.
    whole: str | None = None
    # Whether gradients repeat bit by bit, if that is asked for.
    repeatable: bool = True
    # Whether `backward` takes dq, float32 [B, T, N, H], to add to.
    adds: bool = False
    # Whether both functions take keys in parts.
    parts: bool = False
    # Whether both functions take `heads`, and half of all heads keep the device busy. Takes (query, kv).
    takes_halves: Callable[[jax.Array, jax.Array], bool] = lambda query, kv: False


def _cudnn(whole: str) -> Backend:
    forward, backward = (functools.partial(f, causal=whole == "causal") for f in (cudnn.forward, cudnn.backward))
    return Backend("cudnn", forward, backward, unroll=8, unsupported=cudnn.unsupported, whole=whole, repeatable=False)


# The same kernel for each mask that it knows.
CUDNN = {whole: _cudnn(whole) for whole in ("full", "causal")}


def _mosaic(deterministic: bool | None) -> Backend:
    backward = functools.partial(mosaic.backward, deterministic=deterministic)
    return Backend(
        "mosaic",
        mosaic.forward,
        backward,
        unroll=8,
        unsupported=mosaic.unsupported,
        adds=True,
        parts=True,
        takes_halves=mosaic.halves_suffice,
    )


# The same kernels by what is asked of their gradients.
MOSAIC = {deterministic: _mosaic(deterministic) for deterministic in (None, True, False)}

BACKENDS: dict[str, Backend] = {
    "reference": Backend("reference", reference.forward, reference.backward),
    "xla": Backend("xla", xla.forward, xla.backward),
    "mosaic": MOSAIC[None],
    "cudnn": CUDNN["full"],
}

# What implementation=None tries, best first; the last runs anything.
PREFERENCE = ("mosaic", "cudnn", "xla")


def why_not(
    name: str,
    query: jax.Array,
    kv: jax.Array,
    logits_soft_cap: float | None = None,
    whole: str | None = None,
    deterministic: bool | None = None,
) -> str | None:
    """Why the backend `name` cannot run these inputs under such a mask here, or None; arguments as in `select`."""
    backend = BACKENDS[name]
    if deterministic and not backend.repeatable:
        return "its gradients need not repeat bit by bit, and deterministic=True asks for that"
    reason = backend.unsupported(query, kv, logits_soft_cap)
    if reason is None and backend.whole is not None and whole not in CUDNN:
        return (
            "cuDNN reads no key intervals: the mask must be known, while tracing, to be full or causal over a sequence without "
            "padding, and a causal one needs strategy 'ring' (contiguous or two-chunk zigzag) or 'ulysses' where ranks are several"
        )
    return reason


def select(
    implementation: str | None,
    query: jax.Array,
    kv: jax.Array,
    logits_soft_cap: float | None = None,
    whole: str | None = None,
    deterministic: bool | None = None,
) -> Backend:
    """The backend that `implementation` names, or the best that runs here for None.

    `whole` is "full" or "causal" where the mask is known to be that, for backends that cannot read bounds.
    `deterministic`: True for gradients that repeat bit by bit, False for the fastest; None for those that repeat
    unless that costs more than 10%.

    Raises:
        ValueError: unknown name.
        NotImplementedError: a named backend cannot run these inputs on this device.
    """
    check_options(implementation, deterministic)
    if implementation is None:
        inputs = query, kv, logits_soft_cap, whole, deterministic
        implementation = next(name for name in PREFERENCE if why_not(name, *inputs) is None)
    elif (reason := why_not(implementation, query, kv, logits_soft_cap, whole, deterministic)) is not None:
        raise NotImplementedError(
            f"implementation={implementation!r} cannot run here: {reason}. None lets ring_jax choose"
        )
    backend = MOSAIC[deterministic] if implementation == "mosaic" else BACKENDS[implementation]
    return backend if backend.whole is None or whole is None else CUDNN[whole]


_DTYPES = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)))


def check_inputs(query, key, value) -> None:
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
    if K == 0 or N % K:
        raise ValueError(f"{N} query heads cannot share {K} key-value heads: query's N must be a multiple of key's K")
    if query.shape[3] == 0:
        raise ValueError(f"query, key must have a head size of at least 1, got {query.shape}")


def check_options(implementation, deterministic) -> None:
    """Raises unless these name a backend and say which gradients; None leaves the choice to us."""
    check_choice("implementation", implementation, sorted(BACKENDS), optional=True)
    check_flag("deterministic", deterministic, optional=True)
