"""Queries and keys of attention on Hopper: each head's RMS norm and its rotary embedding in one pass.

    q = rope(rms_norm(x_q));   k = rope(rms_norm(x_k))

x is what one product projects a token to, key-value head by key-value head: the queries that share it, each with its gate, then its key
and its value. XLA needs three passes for it, since a rotation joins columns of a head and a norm all of them: it cuts out, norms, and
rotates. Here a program has some tokens of one head: a warp a row, whose lanes hold the columns in pieces, so that the two columns of a
pair are in the same lane. In a decode step it replaces six launches.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from ring_jax._arrays import Shaped
from ring_jax._vma import align, pcast_to, varying_axes
from ring_jax.mosaic import compat
from ring_jax.mosaic.device import runs_kernels
from ring_jax.nn.hopper.config import LANES, WARPS
from ring_jax.nn.norm import Normed
from ring_jax.nn.rope import rotate

_FEW = 1024  # tokens, of which each may have a program


@dataclasses.dataclass(frozen=True)
class Problem:
    """One launch.

    Fields:
        tokens, kv_heads, group: how many; `group` queries share a key.
        size: of a head. half: pairs of columns that rotate.
    """

    tokens: int
    kv_heads: int
    group: int
    size: int
    half: int
    epsilon: float

    @property
    def warps(self) -> int:
        """Of a program that have rows of their own. Tokens that four do not divide get a program each, whose warps all do the same."""
        return 1 if self.tokens % WARPS else WARPS

    @property
    def rows(self) -> int:
        """Of each warp."""
        return math.gcd(self.tokens // self.warps, 8) if self.warps > 1 else 1

    @property
    def programs(self) -> int:
        """Tokens, then key-value heads, then the members of each: its queries and its key. One axis: the others of a grid are short."""
        return self.tokens // (self.rows * self.warps) * self.kv_heads * (self.group + 1)

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """(first column, columns): the pairs' first and second, then the rest, each a power of two of columns a lane."""
        found, first = [(0, self.half), (self.half, self.half)], 2 * self.half
        while first < self.size:
            columns = LANES << ((self.size - first) // LANES).bit_length() - 1
            found.append((first, columns))
            first += columns
        return found


def worthwhile(projected: Shaped, size: int, rotary: int) -> bool:
    """Whether `queries_and_keys` runs heads of this size, of which `rotary` columns rotate, where it is being compiled for, faster
    than XLA's passes."""
    half, tokens = rotary // 2, projected.shape[0] * projected.shape[1]
    return (
        runs_kernels()
        and (tokens % WARPS == 0 or tokens <= _FEW)
        and projected.dtype in (jnp.bfloat16, jnp.float16)
        and size in (64, 128, 256)
        and half in (32, 64, 128)
    )


def queries_and_keys(
    projected: Float[Array, "B T F"],
    query_weight: Float[Array, " H"],
    key_weight: Float[Array, " H"],
    cos: Float[Array, "#B T half"],
    sin: Float[Array, "#B T half"],
    *,
    group: int,
    epsilon: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
    """The normed and rotated queries and keys in the dtype of `projected`. The gradient is XLA's.

    Args:
        projected: bfloat16 or float16, F = K (2 group + 2) H.
        query_weight, key_weight: of the norms, x / rms(x) * (1 + weight).
        cos, sin: of the angles, float32.
        group: query heads of a key-value head.
    """
    batch, time, features = projected.shape
    size, half = query_weight.shape[0], cos.shape[-1]
    problem = Problem(batch * time, features // ((2 * group + 2) * size), group, size, half, epsilon)
    cos, sin = (jnp.broadcast_to(x, (batch, time, half)).reshape(-1, half) for x in (cos, sin))
    q, k = _run(problem, *align(projected.reshape(-1, features), query_weight, key_weight, cos, sin))
    return q.reshape(batch, time, *q.shape[1:]), k.reshape(batch, time, *k.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(problem: Problem, x: jax.Array, *rest: jax.Array) -> Any:
    n, shape = problem.rows, (problem.kv_heads, problem.group + 1, 2, problem.size)
    *weights, cos, sin = rest
    angles = (a.reshape(-1, n, problem.half) for a in (cos, sin))
    return _launch(problem, x.reshape(-1, n, *shape), *weights, *angles)


def _plain(problem: Problem, x: jax.Array, *rest: jax.Array) -> Any:
    """What the kernel computes, as XLA differentiates it."""
    *weights, cos, sin = rest
    heads = x.reshape(1, -1, problem.kv_heads, problem.group + 1, 2, problem.size)[..., 0, :]
    q, k = heads[..., : problem.group, :], heads[..., problem.group, :]
    q = q.reshape(1, problem.tokens, -1, problem.size)
    cos, sin = cos[None, :, None], sin[None, :, None]
    q, k = (rotate(Normed(x, w, problem.epsilon).array(), cos, sin) for x, w in zip((q, k), weights, strict=True))
    return q[0], k[0]


def _forward(problem: Problem, *operands: Any) -> tuple[Any, Any]:
    return _run(problem, *operands), operands


def _backward(problem: Problem, operands: Any, gradients: Any) -> Any:
    return jax.vjp(functools.partial(_plain, problem), *operands)[1](gradients)


_run.defvjp(_forward, _backward)


# Layers with the same shapes are lowered and compiled once.
@functools.partial(jax.jit, static_argnums=0)
def _launch(problem: Problem, *operands: jax.Array) -> Any:
    dtype, blocks = operands[0].dtype, problem.tokens // problem.rows
    with jax.enable_x64(False):
        call = compat.kernel(
            functools.partial(_kernel, problem),
            name="attention_heads",
            out_type=tuple(
                compat.output_like((blocks, problem.rows, heads, problem.size), dtype, *operands)
                for heads in (problem.kv_heads * problem.group, problem.kv_heads)
            ),
            scratch={},
            grid=(problem.programs,),
            grid_names=("program",),
            num_threads=1,
            thread_name="warpgroup",
        )
        found = (x.reshape(problem.tokens, *x.shape[2:]) for x in call(*operands))
        return pcast_to(tuple(found), varying_axes(operands))


def _layout(warps: int, columns: int) -> Any:
    """[warps, rows, columns]: rows of a warp lie in registers, a thread has the columns / 32 next to each other."""
    own = (-9,) if warps > 1 else (fragmented_array.Replicated(WARPS),)
    tiling = (warps, 1, columns), (1, 1, columns), (1, 1, columns // LANES)
    return compat.tiled_layout(tiling, own, (-4,))


def _divided(number: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    return lax.div(number, jnp.int32(by)), lax.rem(number, jnp.int32(by))


def _kernel(problem: Problem, x_ref, *refs) -> None:
    """x [T / n, n, K, group + 1, 2, H], weights of queries and keys [H], cos and sin [T / n, n, half]; q [T / n, n, N, H],
    k [T / n, n, K, H]."""
    *weight_refs, cos_ref, sin_ref, q_ref, k_ref = refs
    rest, member = _divided(lax.axis_index("program"), problem.group + 1)
    block, kv_head = _divided(rest, problem.kv_heads)
    rows = pl.ds(block * problem.warps, problem.warps)
    which = lax.div(member, jnp.int32(problem.group))  # 1 for the key
    layouts = [_layout(problem.warps, columns) for _, columns in problem.pieces]
    loaded = [
        compat.load(x_ref.at[rows, :, kv_head, member, 0, pl.ds(*piece)], layout)
        for piece, layout in zip(problem.pieces, layouts, strict=True)
    ]
    cos, sin = (compat.load(ref.at[rows], layouts[0]) for ref in (cos_ref, sin_ref))
    wide = [x.astype(jnp.float32) for x in loaded]
    squares = functools.reduce(lax.add, [jnp.sum(x * x, axis=2) for x in wide])
    factor = lax.rsqrt(squares * (1.0 / problem.size) + problem.epsilon)
    normed = []
    for x, piece, layout in zip(wide, problem.pieces, layouts, strict=True):
        by_column = layout.reduce((0, 1))
        both = [compat.load(ref.at[pl.ds(*piece)], by_column).astype(jnp.float32) for ref in weight_refs]
        weight = jnp.where(which == 0, *both)
        scale = plgpu.layout_cast(lax.broadcast_in_dim(1.0 + weight, x.shape, (2,)), layout)
        normed.append(x * plgpu.layout_cast(lax.broadcast_in_dim(factor, x.shape, (0, 1)), layout) * scale)
    first, second, *rest = normed
    turned = [first * cos - second * sin, second * cos + first * sin, *rest]

    def write(ref, head) -> None:
        for x, piece in zip(turned, problem.pieces, strict=True):
            compat.store(ref.at[rows, :, head, pl.ds(*piece)], x.astype(ref.dtype))

    pl.when(which == 0)(lambda: write(q_ref, kv_head * problem.group + member))
    pl.when(which == 1)(lambda: write(k_ref, kv_head))
