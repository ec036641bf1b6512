"""Convolution, SiLU and the l2 norms of q and k of a GDN layer as one Hopper kernel: what it takes, and its gradient.

    q, k, v = silu(causal_convolution(mixed));   q, k <- l2norm per head

See `conv_kernel` for how, `ring_jax.gdn.conv` for the plain convolution, its tails and its documents. Unlike the plain form
nothing is rounded between the convolution and the outputs.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from ring_jax._arrays import pad_to
from ring_jax._checks import Sizes, check_array
from ring_jax._vma import align, pcast_to, varying_axes
from ring_jax.gdn import by_head
from ring_jax.gdn.checks import check_segments
from ring_jax.gdn.heads import Heads
from ring_jax.gdn.hopper import conv_kernel
from ring_jax.gdn.hopper.conv_problem import (
    AHEAD,
    FLAG_AHEAD,
    FLAG_CONTINUES,
    FLAG_FIRST,
    FLAG_PADDING,
    FLAG_STARTS,
    THREADS,
    Part,
    Problem,
)
from ring_jax.gdn.hopper.conv_tail import leaving_tail, tail_gradient
from ring_jax.gdn.segments import first_valid
from ring_jax.mosaic import compat

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_VECTORS = (8, 4)  # channels of a thread, the first choice first


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvConfig:
    """How a pass is cut.

    Attributes:
        rows: tokens of a program; those before (backward: and after) them are read by two programs.
        unroll: rows that are loaded ahead of what is computed from them.
        vector: channels of a thread, 8 or 4; fewer where a part has too few heads for them.
        prefetch: load the next rows before computing these.
    """

    rows: int
    unroll: int
    vector: int
    prefetch: bool = False

    def __post_init__(self):
        if self.rows < 1:
            raise ValueError(f"{self.rows=} must be positive")
        if not 1 <= self.unroll <= AHEAD:
            raise ValueError(f"{self.unroll=} must be between 1 and {AHEAD}")
        if self.vector not in _VECTORS:
            raise ValueError(f"{self.vector=} must be one of {_VECTORS}")


# Tuned on one H200: see docs/kernels/gdn_conv_decode.md.
FORWARD = ConvConfig(rows=64, unroll=4, vector=8, prefetch=True)
BACKWARD = ConvConfig(rows=256, unroll=2, vector=8, prefetch=True)


def unsupported_reason(
    mixed: jax.Array | Sequence[jax.Array],
    weight: jax.Array | Sequence[jax.Array],
    heads: Heads,
    *,
    compute_capability: str | None = None,
) -> str | None:
    """Why `convolve` cannot take these arguments, or None. `compute_capability` is the GPU's, such as "9.0"."""
    if compute_capability is not None and compute_capability != "9.0":
        return f"needs a Hopper GPU (compute capability 9.0), this is {compute_capability}"
    if not compat.INTERPRET_AVAILABLE:
        return f"needs jax 0.11 or later, this is {jax.__version__}"
    arrays, weights = _parts(mixed), _parts(weight)
    if any(x.dtype not in _DTYPES or x.dtype != arrays[0].dtype for x in arrays):
        return f"needs bfloat16, float16 or float32, the same for q, k and v, got {[str(x.dtype) for x in arrays]}"
    if any(w.dtype not in _DTYPES for w in weights):
        return f"needs a filter in bfloat16, float16 or float32, got {[str(w.dtype) for w in weights]}"
    if not 2 <= weights[0].shape[0] <= 8:
        return f"needs a filter of 2 to 8 taps, got {weights[0].shape[0]}"
    if 0 in arrays[0].shape:
        return f"empty arrays, got {arrays[0].shape}"
    for size in (heads.key_size, heads.value_size):
        if size not in (64, 128, 256):
            return f"head sizes must be 64, 128 or 256, got {heads.key_size} for keys and {heads.value_size} for values"
    by_heads = by_head.given(arrays)
    if by_heads and arrays[0].shape[3] % _VECTORS[0]:
        return f"columns of a key head must be a multiple of {_VECTORS[0]}, got {arrays[0].shape[3]}"
    if heads.value_size != heads.key_size and len(arrays) != len(heads.parts) and not by_heads:
        return (
            f"key and value heads of different sizes ({heads.key_size} and {heads.value_size}) must be separate arrays"
        )
    if _vector(heads, min(_VECTORS), by_heads) is None:
        least = max(THREADS * min(_VECTORS), 4 * heads.key_size, 4 * heads.value_size)
        each = "each in q, k and one value head of every key head" if by_heads else "each in q, k and v"
        return f"needs at least {least} features {each}, got {_features(heads, by_heads)}"
    return None


def convolve(
    mixed: Float[Array, "B T ..."] | Sequence[Float[Array, "B T ..."]],
    weight: Float[Array, "W F"] | Sequence[Float[Array, "W _"]],
    heads: Heads,
    *,
    tail: Float[Array, "B W-1 F"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    out_dtype: Any = None,
    config: ConvConfig | None = None,
    backward_config: ConvConfig | None = None,
) -> tuple[Float[Array, "B T K dk"], Float[Array, "B T K dk"], Float[Array, "B T N dv"], Float[Array, "B W-1 F"]]:
    """Projections to the operands of the gated delta rule.

    Args:
        mixed: q, k and v, each [B, T, its features], or one array [B, T, q | k | v], or one by key heads [B, T, K, P], which
            may have more columns behind q, k and v of each (`ring_jax.gdn.by_head`).
        weight: their filters, as one array or three; `weight[j]` multiplies the input W - 1 - j tokens back.
        heads: numbers and sizes of heads.
        tail: the last W - 1 inputs q | k | v before these, zeros by default; continues the first document of each row.
        segment_ids: ids of packed documents, negative for padding, each one contiguous run.
        out_dtype: of q, k and v; that of the inputs by default.
        config, backward_config: sizes; None takes the tuned ones.

    Returns:
        q and k of unit length, v (zeros on padding), and the tail after the last valid token.

    Raises:
        NotImplementedError: if `unsupported_reason` gives one.
        ValueError: shapes that do not fit.
    """
    arrays, weights = _parts(mixed), _parts(weight)
    _check(arrays, weights, heads, tail, segment_ids)
    reason = unsupported_reason(mixed, weight, heads)
    if reason is not None:
        raise NotImplementedError(f"the Hopper convolution kernel {reason}")
    if by_head.given(arrays) and len(weights) == 1:
        weights = tuple(jnp.split(weights[0], np.cumsum(heads.parts)[:-1], axis=1))
    flags = None if segment_ids is None else document_flags(segment_ids)
    leaving = leaving_tail(arrays, heads, tail, segment_ids, weights[0].shape[0] - 1)
    out_dtype = jnp.dtype(out_dtype or arrays[0].dtype)
    static = _Static(heads, out_dtype, config or FORWARD, backward_config or BACKWARD)
    out = _convolve(static, *align(tuple(arrays), tuple(weights), tail, flags))
    return (*out, leaving)


def document_flags(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """What each token is to the window of inputs before it; see `conv_kernel`."""
    valid = segment_ids >= 0
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    index = lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
    first = index == first_valid(segment_ids)[:, None]
    flags = jnp.where(segment_ids != before, FLAG_STARTS, FLAG_CONTINUES)
    flags = jnp.where(valid, jnp.where(first, FLAG_FIRST, flags), FLAG_PADDING).astype(jnp.int32)
    before = jnp.pad(jnp.cumsum(flags != FLAG_CONTINUES, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    before = jnp.pad(before, ((0, 0), (0, AHEAD)), mode="edge")
    return jnp.where(before[:, AHEAD:-1] > before[:, : -AHEAD - 1], flags + FLAG_AHEAD, flags)


def one_document(x: Float[Array, "B T ..."]) -> Int[Array, "B T"]:
    """`document_flags` where every token belongs to the first document."""
    index = lax.broadcasted_iota(jnp.int32, x.shape[:2], 1)
    return jnp.where(index == 0, FLAG_FIRST + FLAG_AHEAD, FLAG_CONTINUES)


@dataclasses.dataclass(frozen=True)
class _Static:
    """Everything about a call that is no array."""

    heads: Heads
    out_dtype: Any
    forward: ConvConfig
    backward: ConvConfig

    def problem(self, arrays, weights, tail, flags, config: ConvConfig) -> Problem:
        batch, time = arrays[0].shape[:2]
        by_heads = by_head.given(arrays)
        vector = _vector(self.heads, config.vector, by_heads)
        assert vector is not None
        return Problem(
            batch=batch,
            time=time,
            width=weights[0].shape[0],
            parts=_parts_by_heads(self.heads) if by_heads else _parts_apart(self.heads),
            rows=min(config.rows, time),
            unroll=config.unroll,
            vector=vector,
            prefetch=config.prefetch,
            tail=tail is not None,
            flags=flags is not None,
            joint_inputs=len(arrays) == 1 and not by_heads,
            joint_weights=len(weights) == 1,
        )


def _parts_apart(heads: Heads) -> tuple[Part, ...]:
    """q, k and v whose arrays have their heads side by side."""
    counts = (heads.key_heads, heads.key_heads, heads.value_heads)
    sizes = (heads.key_size, heads.key_size, heads.value_size)
    # In an array of all parts, where sizes are equal. The kernels skip this in arrays of one part.
    firsts = (0, heads.key_heads, 2 * heads.key_heads)
    return tuple(
        Part(count, size, norm=i < 2, first_head=first)
        for i, (count, size, first) in enumerate(zip(counts, sizes, firsts, strict=True))
    )


def _parts_by_heads(heads: Heads) -> tuple[Part, ...]:
    """q, k and v whose inputs lie by key heads."""
    count, size = heads.key_heads, heads.key_size
    keys = (Part(count, size, norm=True, first_head=0, column=i * size) for i in range(2))
    return *keys, Part(count, heads.value_size, norm=False, first_head=0, column=2 * size, members=heads.shared)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(static: _Static, arrays, weights, tail, flags):
    return _forward(static, arrays, weights, tail, flags)


def _forward(static: _Static, arrays, weights, tail, flags):
    problem = static.problem(arrays, weights, tail, flags, static.forward)
    operands = _operands(problem, static.heads, arrays, weights, (), tail, flags)
    rows = arrays[0].shape[:2]
    out_type = tuple(compat.output_like((*rows, *part.shape), static.out_dtype, *operands) for part in problem.parts)
    found = _launch(conv_kernel.forward_kernel, "gdn_convolution", problem, out_type, operands)
    return tuple(x.reshape(*rows, -1, x.shape[-1]) for x in found)


def _saved(static: _Static, arrays, weights, tail, flags):
    return _forward(static, arrays, weights, tail, flags), (arrays, weights, tail, flags)


def _backward(static: _Static, saved, cotangents):
    arrays, weights, tail, flags = saved
    # The branch between groups with and without flags keeps the loads of the next group ahead of the arithmetic of this one:
    # 528 us against 595 for the kernel that knows of no documents. So there always is one.
    known = one_document(arrays[0]) if flags is None else flags
    problem = static.problem(arrays, weights, tail, known, static.backward)
    operands = _operands(problem, static.heads, arrays, weights, cotangents, tail, known)
    partials = (problem.batch * problem.tiles, problem.width)
    shapes = [part.shape for part in problem.parts]
    total = (sum(part.heads for part in problem.parts), problem.parts[0].head_size)
    out_type = [
        *(((*arrays[0].shape[:2], *shape), arrays[0].dtype) for shape in ([total] if problem.joint_inputs else shapes)),
        *(((*partials, *shape), jnp.float32) for shape in ([total] if problem.joint_weights else shapes)),
    ]
    out_type = tuple(compat.output_like(*each, *operands) for each in out_type)
    results = _launch(conv_kernel.backward_kernel, "gdn_convolution_backward", problem, out_type, operands)
    dx, dw = results[: -len(weights)], results[-len(weights) :]
    dx = (_by_head_again(dx, arrays[0]),) if by_head.given(arrays) else dx
    dx = tuple(r.reshape(x.shape) for r, x in zip(dx, arrays, strict=True))
    dw = tuple(r.sum(axis=0).reshape(w.shape).astype(w.dtype) for r, w in zip(dw, weights, strict=True))
    dtail = None if tail is None else tail_gradient(static.heads, arrays, weights, tail, flags, cotangents)
    return dx, dw, dtail, None if flags is None else np.zeros(flags.shape, jax.dtypes.float0)


_convolve.defvjp(_saved, _backward)


def _by_head_again(parts: Sequence[jax.Array], like: jax.Array) -> jax.Array:
    """Gradients of q, k and v as that of `like` [B, T, K, P], whose other columns have none."""
    found = jnp.concatenate([x.reshape(*like.shape[:3], -1) for x in parts], axis=3)
    return pad_to(found, 3, like.shape[3])


def _launch(body, name: str, problem: Problem, out_type, operands):
    call = compat.kernel(
        functools.partial(_body, body, problem),
        name=name,
        out_type=out_type,
        scratch={},
        grid=(problem.programs,),
        grid_names=("program",),
        num_threads=1,
        thread_name="warpgroup",
    )
    # In a scan that also stacks a result as residual, XLA would clone the kernel into the fusion that writes the stack.
    return pcast_to(tuple(lax.optimization_barrier(call(*operands))), varying_axes(operands))


def _body(body, problem, *refs):
    body(problem, *refs)


def _operands(problem: Problem, heads: Heads, arrays, weights, cotangents, tail, flags):
    """As the kernels take them: one for each part, by heads; an array that holds all parts comes three times."""
    parts = problem.parts

    def by_heads(xs):
        if len(xs) == 1:
            return [xs[0].reshape(*xs[0].shape[:-1], -1, part.head_size) for part in parts]
        return [x.reshape(*x.shape[:-1], *part.shape) for x, part in zip(xs, parts, strict=True)]

    operands = list(arrays) * len(parts) if by_head.given(arrays) else by_heads(arrays)
    operands += by_heads(weights)
    operands += [x.reshape(*x.shape[:2], *part.shape) for x, part in zip(cotangents, parts, strict=False)]
    if tail is not None:
        ends = np.cumsum(heads.parts)[:-1]
        operands += by_heads(jnp.split(tail, ends, axis=2))
    return [*operands, *([] if flags is None else [flags])]


def _parts(x: jax.Array | Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def _features(heads: Heads, by_heads: bool) -> tuple[int, ...]:
    """Of q, k and v that lie side by side; of v one head of each key head where inputs lie by these."""
    if not by_heads:
        return heads.parts
    return tuple(heads.key_heads * size for size in (heads.key_size, heads.key_size, heads.value_size))


def _vector(heads: Heads, wanted: int, by_heads: bool) -> int | None:
    """Channels of a thread, `wanted` if every part has heads for a whole block and no head is wider than a warp."""
    largest, least = max(heads.key_size, heads.value_size), min(_features(heads, by_heads))
    for vector in (wanted, *_VECTORS):
        if vector * 32 >= largest and THREADS * vector <= least:
            return vector
    return None


def _check(arrays, weights, heads: Heads, tail, segment_ids) -> None:
    sizes, given = Sizes(), [("mixed", arrays, "B T"), ("weight", weights, "W")]
    if by_head.given(arrays):
        check_array("mixed", arrays[0], f"B T {heads.key_heads} P", sizes)
        least = sum(heads.of_key_head[:3])
        if sizes["P"] < least:
            raise ValueError(
                f"mixed must have columns of q, k and v for each key head, at least {least}, got {sizes['P']}"
            )
        del given[0]
    for name, xs, axes in given:
        if len(xs) not in (1, len(heads.parts)):
            raise ValueError(f"{name} must be one array, or one each for q, k and v, got {len(xs)}")
        for x, features in zip(xs, heads.parts if len(xs) > 1 else (heads.features,), strict=True):
            check_array(name, x, f"{axes} {features}", sizes)
    if tail is not None:
        sizes["W-1"] = sizes["W"] - 1
        check_array("tail", tail, f"B W-1 {heads.features}", sizes, advice="the last W - 1 inputs")
        if tail.dtype != arrays[0].dtype:
            raise ValueError(f"tail must be {arrays[0].dtype} like the inputs, got {tail.dtype}: it holds inputs")
    check_segments(segment_ids, sizes["B"], sizes["T"])
