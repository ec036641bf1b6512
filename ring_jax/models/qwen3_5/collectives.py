"""What the model's layers ask of the mesh, from inside the one shard_map around the model. Without a mesh: nothing.

A parameter whose reduced dimension lies over the `weights` axis is used in one of two ways. Ranks with tokens of their
own gather it (its gradient is then scattered back); ranks that share their tokens (those of the context, in decode)
multiply the part of x that fits their part of the weight and sum, which moves activations instead of weights.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax._device import target
from ring_jax._mesh import axis_names
from ring_jax._vma import pcast_to, varying_axes
from ring_jax.models.qwen3_5.sharding import Sharding
from ring_jax.moe.hopper import dense
from ring_jax.nn.hopper import few_rows
from ring_jax.nn.norm import Normed, made

_FEW = 8  # rows of a product


@dataclasses.dataclass(frozen=True, eq=False)
class Collectives:
    """The mesh as one rank sees it."""

    sharding: Sharding | None

    def weight(self, w: jax.Array, dim: int, size: int, like: jax.Array, *, expert: bool = False) -> jax.Array:
        """`w` with all `size` entries of the reduced dimension `dim` that this tensor rank works on, to multiply
        `like` with: it varies over the mesh axes that `like` varies over, no more."""
        if w.shape[dim] == size:
            return w
        varying = varying_axes(like)
        for axis in reversed(self._weights_axes(expert)):  # the last name is the minor one
            w = lax.all_gather(w, axis, axis=dim, tiled=True, to="varying" if axis in varying else "invarying")
        return w

    def product(self, x: jax.Array | Normed, w: jax.Array, dtype: Any = None) -> jax.Array:
        """x [..., D] times w [D, F], wherever the rows of w lie; in `dtype` (default: x's)."""
        if dtype is None and _of_few_rows(x, w):
            return _few_rows(x, w)
        x = made(x)
        dtype = x.dtype if dtype is None else dtype
        axes = self._summed_axes(x, w)
        if not axes:
            return _matmul(x, self.weight(w, 0, x.shape[-1], x), dtype)
        start = lax.axis_index(axes) * w.shape[0]
        part = lax.dynamic_slice_in_dim(x, start, w.shape[0], x.ndim - 1)
        return lax.psum(_matmul(part, w, jnp.float32), axes).astype(dtype)

    def add_product(self, total: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
        """total + x [..., D] times w [D, F], summed over the tensor axis, whose ranks have heads or features of their own."""
        if self.tensor is None and _of_few_rows(x, w):
            return _few_rows(x, w, added=total.reshape(-1, total.shape[-1]))
        return total + self.sum_tensor(self.product(x, w))

    def swiglu(self, x: jax.Array | Normed, gate_up: jax.Array) -> jax.Array:
        """silu(gate) * up of x [..., D] times gate_up [D, 2 F], gate first."""
        if _of_few_rows(x, gate_up, swiglu=True):
            return _few_rows(x, gate_up, swiglu=True)
        x = made(x)
        if dense.worthwhile(x, gate_up.shape[1]) and not self._summed_axes(x, gate_up):
            return dense.swiglu(x, self.weight(gate_up.astype(x.dtype), 0, x.shape[-1], x))
        return dense.combine(self.product(x, gate_up))

    def _summed_axes(self, x: jax.Array, w: jax.Array) -> tuple[str, ...]:
        """Those of the weights axis over which w's rows lie and x is the same: parts of the product are summed over them."""
        axes = self._weights_axes() if w.shape[0] != x.shape[-1] else ()
        return () if varying_axes(x) & set(axes) else axes

    def sum_tensor(self, y: jax.Array) -> jax.Array:
        """The sum over the tensor axis of what its ranks have computed from their heads or features."""
        return lax.psum(y, axis_names(self.tensor)) if self.tensor is not None else y

    def rows(self, table: jax.Array, index: jax.Array, width: int) -> jax.Array:
        """table[index] [..., width], where rows may lie over the tensor axis and columns over the weights axis."""
        axes = self._weights_axes() if table.shape[1] != width else ()
        # Where ranks have indices of their own, those come here and parts of the rows go back.
        exchanged = [axis for axis in axes if axis in varying_axes(index)]
        for axis in reversed(exchanged):
            index = lax.all_gather(index, axis, axis=0)
        found = self._own_rows(table, index)
        for axis in reversed(axes):  # the last name is the minor one
            last = found.ndim - 1
            if axis in exchanged:
                found = lax.all_to_all(found, axis, exchanged.index(axis), last, tiled=True)
            else:
                found = lax.all_gather(found, axis, axis=last, tiled=True, to="invarying")
        return found.reshape(*found.shape[len(exchanged) :])

    def _own_rows(self, table: jax.Array, index: jax.Array) -> Any:
        axes = self._vocabulary_axes(table)
        if not axes:
            return table[index]
        local, inside = self._own_part(index, table.shape[0], axes)
        found = table[local]
        return lax.psum(jnp.where(inside[..., None], found, jnp.zeros_like(found)), axes)

    def _vocabulary_axes(self, x: jax.Array) -> tuple[str, ...]:
        """The mesh axes over which the vocabulary of a table or of logits lies; () where it is whole."""
        axes = axis_names(self.tensor)
        return axes if varying_axes(x) & set(axes) else ()

    @staticmethod
    def _own_part(token: jax.Array, size: int, axes: tuple[str, ...]) -> Any:
        """Tokens as indices into this rank's `size` entries of the vocabulary, and whether they lie in them."""
        local = token - (lax.axis_index(axes) * size if axes else 0)
        return jnp.clip(local, 0, size - 1), (local >= 0) & (local < size)

    def whole_vocabulary(self, logits: jax.Array) -> jax.Array:
        """Logits [B, V] on every tensor rank."""
        axes = self._vocabulary_axes(logits)
        if not axes:
            return logits
        return lax.all_gather(logits, axes, axis=logits.ndim - 1, tiled=True, to="invarying")

    def same_for_head(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """x, the same on all tensor ranks, with a type that says so where the head is whole on each: its logits are taken for
        parts of a vocabulary otherwise. One that is spread makes parts of them in any case."""
        axes = tuple(axis for axis in axis_names(self.tensor) if axis in varying_axes(x))
        if not axes or self._vocabulary_axes(kernel):
            return x
        return lax.psum(jnp.where(lax.axis_index(axes) == 0, x, jnp.zeros_like(x)), axes)

    def cross_entropy(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """-log softmax(logits)[target] of each token, [T]; the vocabulary may lie over the tensor axis."""
        axes = self._vocabulary_axes(logits)
        top = lax.stop_gradient(logits).max(axis=-1)
        top = lax.pmax(top, axes) if axes else top
        local, inside = self._own_part(targets, logits.shape[-1], axes)
        # Neither a gather, whose gradient is a scatter, nor a select: both take zeros of the size of the logits.
        place = jnp.arange(logits.shape[-1], dtype=local.dtype)
        own = (place[None] == local[:, None]) & inside[:, None]
        target = (logits * own.astype(logits.dtype)).sum(axis=-1)
        total = jnp.exp(logits - top[:, None]).sum(axis=-1)
        if axes:
            total, target = lax.psum((total, target), axes)
        return jnp.log(total) + top - target

    @property
    def tensor(self) -> Any:
        return None if self.sharding is None else self.sharding.tensor

    @property
    def tensor_ranks(self) -> int:
        return lax.axis_size(axis_names(self.tensor)) if self.tensor is not None else 1

    @property
    def expert(self) -> Any:
        return None if self.sharding is None else self.sharding.expert

    def token_axes(self, *, rows_only: bool = False) -> tuple[str, ...]:
        """Mesh axes over which tokens differ."""
        if self.sharding is None:
            return ()
        return (*axis_names(self.sharding.batch), *(() if rows_only else axis_names(self.sharding.sequence)))

    def spread_over(self, axis: Any) -> bool:
        """Whether ranks along `axis` have tokens of their own."""
        return axis is not None and set(axis_names(axis)) <= set(self.token_axes())

    def sum_context(self, tree: Any) -> Any:
        """The sum over the context ranks of what each has counted in its tokens."""
        return self._sum(tree, () if self.sharding is None else axis_names(self.sharding.sequence))

    def sum_rows(self, tree: Any) -> Any:
        """The sum over the data ranks."""
        return self._sum(tree, () if self.sharding is None else axis_names(self.sharding.batch))

    def _sum(self, tree: Any, axes: Any) -> Any:
        return jax.tree.map(lambda x: lax.psum(pcast_to(x, axes), axes), tree) if axes else tree

    def _weights_axes(self, expert: bool = False) -> tuple[str, ...]:
        if self.sharding is None:
            return ()
        used = axis_names(self.sharding.expert) if expert else ()
        return tuple(name for name in axis_names(self.sharding.weights) if name not in used and lax.axis_size(name) > 1)


def _of_few_rows(x: jax.Array | Normed, w: jax.Array, *, swiglu: bool = False) -> bool:
    """Whether one kernel multiplies x with w, whole here, with norm, SwiGLU and sum if there are."""
    x = x.x if isinstance(x, Normed) else x
    return w.shape[0] == x.shape[-1] and few_rows.worthwhile(x, w, swiglu=swiglu)


def _few_rows(x: jax.Array | Normed, w: jax.Array, **options: Any) -> jax.Array:
    shape = x.shape
    flat = lambda x: x.reshape(-1, shape[-1])  # noqa: E731
    x = dataclasses.replace(x, x=flat(x.x)) if isinstance(x, Normed) else flat(x)
    return few_rows.product(x, w, **options).reshape(*shape[:-1], -1)


def _matmul(x: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
    """x [..., D] times w [D, F] in x's dtype, summed and returned in `dtype`.

    For GPUs, fewer than eight rows are made eight. XLA turns the product of one row with a weight of less than ten million
    elements into sums over multiplied arrays: with bfloat16 those are rounded before they are summed, and where they are
    fused into what reads the result, or written out first, the weight is read far slower than a product reads it. A matrix
    unit multiplies eight rows or more at a time anyway.
    """
    w, rows = w.astype(x.dtype), math.prod(x.shape[:-1])
    if rows >= _FEW or target().platform != "gpu":
        return jnp.matmul(x, w, preferred_element_type=dtype)
    few = jnp.pad(x.reshape(rows, -1), ((0, _FEW - rows), (0, 0)))
    few = lax.optimization_barrier(few)  # or XLA takes the padding away
    return jnp.matmul(few, w, preferred_element_type=dtype)[:rows].reshape(*x.shape[:-1], -1)
