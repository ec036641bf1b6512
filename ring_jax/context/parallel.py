"""`ContextParallel`: one value that says how an array is spread over a mesh."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from ring_jax import _html, _repr
from ring_jax._checks import (
    check_array,
    check_axis,
    check_choice,
    check_count,
    check_instance,
    check_mesh_axes,
    static_length,
)
from ring_jax._mesh import (
    AnyMesh,
    Axis,
    HashablePartial,
    axis_names,
    axis_size,
    mesh_of_ids,
    reshard_explicit,
    run_sharded,
)
from ring_jax._segment_ids import per_row
from ring_jax.context import alone, strategies
from ring_jax.context.reshard import relayout as relayout_shard
from ring_jax.context.shard import Shard, mask_specs, resolve
from ring_jax.context.strategies import StrategyName
from ring_jax.layout import Contiguous, Layout, LayoutName, as_layout
from ring_jax.mask import Mask, ResolvedMask

if TYPE_CHECKING:
    from ring_jax.context.attention_fn import AttentionFn


@dataclasses.dataclass(frozen=True)
class ContextParallel:
    """How sequences, batch and heads are spread over mesh axes. Hashable; a static argument.

    Args:
        axis: mesh axis of the sequence, or two of them, (outer ring, inner ulysses).
        layout: "contiguous", "striped", "zigzag" or a `Layout` value; the order of every array given to
            `ring_attention`. Zigzag balances causal work.
        batch_axis, head_axis: mesh axes of the batch and of the heads, where they are sharded; a name or a tuple.
            On Auto meshes they cannot be inferred, and an unnamed one would be gathered.
        mesh: the mesh; default: the ambient one (`jax.set_mesh`), or that of the array at hand.
        strategy: "auto", "ring", "pass_q", "all_gather", "ulysses" or "ring_ulysses".

    Inside a `jax.shard_map` that is already manual over `axis`, every method works on local shards.

    Example:
        >>> import jax
        >>> mesh = jax.make_mesh((1,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> cp = ContextParallel("context", layout="zigzag", mesh=mesh)
        >>> cp.padded_length(7)
        8
    """

    axis: Axis
    _: dataclasses.KW_ONLY
    layout: Any = "contiguous"  # a name or a Layout goes in; it is a Layout afterwards
    batch_axis: Axis | None = None
    head_axis: Axis | None = None
    mesh: Mesh | None = None
    strategy: StrategyName = "auto"
    __repr__, _repr_html_ = _repr.of_fields, _html.of_context

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", as_layout(self.layout))
        for name in ("axis", "batch_axis", "head_axis"):
            value = getattr(self, name)
            if value is not None or name == "axis":
                # The sequence goes over one mesh axis, or two: (ring, ulysses).
                most = 2 if name == "axis" else None
                object.__setattr__(self, name, check_mesh_axes(f"ContextParallel({name}=...)", value, most))
        named = [a for value in (self.axis, self.batch_axis, self.head_axis) for a in axis_names(value)]
        if len(set(named)) != len(named):
            raise ValueError(f"a mesh axis can carry one of sequence, batch and heads, got {named}")
        check_choice("strategy", self.strategy, strategies.NAMES)
        check_instance("mesh", self.mesh, (Mesh, AbstractMesh), "a jax.sharding.Mesh", optional=True)
        if self.mesh is not None:
            self._check_mesh(self.mesh)

    # -- layouts ---------------------------------------------------------------------------------

    def padded_length(self, seq_len: int, like: Array | None = None) -> int:
        """Length of a sequence of `seq_len` once laid out: the next multiple that the layout divides.

        Args:
            seq_len: real length, known at trace time.
            like: an array on the mesh, where neither the context nor the ambient mesh names it.
        """
        ranks = self.ranks(like)
        length = self.layout.padded_length(check_count("seq_len", seq_len), ranks)
        if length % (2 * ranks):
            raise ValueError(
                f"layout {self.layout} pads {seq_len} positions over {ranks} ranks to {length}, which is not a multiple of 2 x {ranks}: "
                "its padded_length must give each rank an even number of positions"
            )
        return length

    def to_layout(self, x: Array, seq_axis: int = 1, *, head_dim: int | None = None, fill: int | float = 0) -> Array:
        """Natural order to this layout, padded to `padded_length`, sharded over the context axis.

        Args:
            x: any array with the sequence on `seq_axis`. Axis 0 is taken as batch (unless it is the sequence), and
                axis 2 of a 4-d array as heads, for `batch_axis` and `head_axis`.
            seq_axis: the sequence's axis.
            head_dim: the axis that `head_axis` shards, where it is not axis 2 of a 4-d array: 2 for an LSE [B, T, N].
            fill: what padding holds. Segment ids take -1: they would otherwise end in a document with the id 0.

        Returns:
            x with length padded_length(S) on `seq_axis`; bit-exact. Pass `seq_len=S` to `ring_attention` so that the
            padding is masked. Inside a shard_map: the local contiguous shard to the local shard in this layout.
        """
        seq_axis, head_dim = _check_axes(x, seq_axis, head_dim)
        if not self.is_manual:
            length = x.shape[seq_axis]
            pad = self.padded_length(length, x) - length
            widths = [(0, pad if a == seq_axis else 0) for a in range(x.ndim)]
            x = jnp.pad(x, widths, constant_values=fill) if pad else x
        return self._move(x, Contiguous(), self.layout, seq_axis, head_dim)

    def from_layout(
        self, x: Array, seq_len: int | None = None, seq_axis: int = 1, *, head_dim: int | None = None
    ) -> Array:
        """Inverse of `to_layout`: natural order, cut to `seq_len` (default: the padded length)."""
        seq_axis, head_dim = _check_axes(x, seq_axis, head_dim)
        length = x.shape[seq_axis]
        seq_len = length if seq_len is None else check_count("seq_len", seq_len, 0, length)
        if seq_len != length and self.is_manual:
            raise ValueError(
                "from_layout(seq_len=...) cannot cut local shards inside a shard_map: cut the array outside"
            )
        x = self._move(x, self.layout, Contiguous(), seq_axis, head_dim)
        if seq_len == length:
            return x
        mesh = self.resolve_mesh(x)
        if seq_len % axis_size(mesh, self.axis):  # no longer divides over the axis: Explicit meshes want that said
            x = reshard_explicit(x, mesh, self._spec(x, mesh, seq_axis, None, head_dim))
        return jax.lax.slice_in_dim(x, 0, seq_len, axis=seq_axis)

    def relayout(
        self,
        x: Array,
        other: "ContextParallel | Layout | LayoutName",
        seq_axis: int = 1,
        *,
        head_dim: int | None = None,
    ) -> Array:
        """From this layout to `other`'s, on the same mesh axis; lengths must divide in both."""
        target = other.layout if isinstance(other, ContextParallel) else as_layout(other)
        if isinstance(other, ContextParallel) and other.axis != self.axis:
            raise ValueError(f"relayout stays on one mesh axis, got {self.axis!r} and {other.axis!r}")
        seq_axis, head_dim = _check_axes(x, seq_axis, head_dim)
        return self._move(x, self.layout, target, seq_axis, head_dim)

    def positions(self, seq_len: int, like: Array | None = None) -> Int[Array, " S"]:
        """Global position of every place of the laid-out sequence, int32 [padded_length(seq_len)] ([.../C], the local
        ones, inside a shard_map); those >= seq_len are padding. For RoPE, labels and loss masks."""
        ranks = self.ranks(like)
        length = self.layout.padded_length(check_count("seq_len", seq_len), ranks)
        if self.is_manual:
            return self.shard(length).positions()
        local, index = length // ranks, jnp.arange(length, dtype=jnp.int32)
        positions = self.layout.position(index % local, index // local, length, ranks)
        return reshard_explicit(positions, self.resolve_mesh(like), P(self.axis))

    def resolve(
        self,
        mask: Mask,
        seq_len: int,
        *,
        key_value_seq_len: int | None = None,
        query_offset: "int | Array" = 0,
        like: Array | None = None,
    ) -> ResolvedMask:
        """Global key bounds of every query in layout order, computed once for all layers of a step.

        Args:
            mask: the whole mask; `is_causal` and the other shorthands of `ring_attention` cannot be added later.
            seq_len, key_value_seq_len: real lengths of queries and keys (default: the same).
            query_offset: key position of query 0, an integer or int32 [B].
            like: an array on the mesh, where neither the context nor the ambient mesh names it.
        """
        check_instance("mask", mask, Mask, "a ring_jax.Mask such as causal() & documents(...)")
        seq_len = static_length("seq_len", seq_len)
        kv_len = seq_len if key_value_seq_len is None else static_length("key_value_seq_len", key_value_seq_len)
        mask_and_offset = (mask, per_row("query_offset", query_offset))
        shard = self.shard(self.padded_length(seq_len, like), like)
        if self.is_manual:
            return resolve(mask_and_offset, shard, seq_len, kv_len)
        rows = max([1] + [x.shape[0] for x in jax.tree.leaves(mask_and_offset)])
        mesh, batch = self.resolve_mesh(like), self.free(self.batch_axis)
        specs = mask_specs(mask_and_offset, rows, batch)
        out_specs = P(batch if rows > 1 else None, self.axis)
        return run_sharded(
            HashablePartial(resolve, (shard, seq_len, kv_len)), mesh, (specs,), out_specs, (mask_and_offset,)
        )

    def describe(self, seq_len: int, like: Array | None = None) -> str:
        """Which positions of a sequence each rank holds, a line each, in the order in which they lie there.

        Example:
            >>> mesh = jax.sharding.AbstractMesh((2,), ("context",))
            >>> print(ContextParallel("context", layout="zigzag", mesh=mesh).describe(8))
            Zigzag(block=None) over 2 ranks, 8 positions
            rank 0: 0-1 6-7
            rank 1: 2-5
        """
        return _repr.draw_layout(self.layout, static_length("seq_len", seq_len), self.ranks(like))

    def check_layout(self, function: Callable[..., Any], *arrays: Any, tolerance: float = 1e-3) -> float:
        """Raises unless `function(context, *arrays)` gives over this context what it gives on one rank.

        Nothing in an array says in which order it lies, so a forgotten `to_layout` gives wrong numbers without a word. On
        one rank every layout is the natural order: what depends on a forgotten call differs. For tests and notebooks.

        Args:
            function: from a context and arrays in natural order to arrays in natural order, `to_layout` and `from_layout`
                inside; run as it is, eagerly.
            arrays: its other arguments.
            tolerance: of the largest difference, relative to the largest entry.

        Returns:
            The largest difference found.

        Raises:
            ValueError: a difference beyond the tolerance, or results of other shapes.

        Example:
            >>> import jax, jax.numpy as jnp, ring_jax
            >>> mesh = jax.make_mesh((1,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
            >>> cp = ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh)
            >>> def attend(cp, x):
            ...     out = ring_jax.ring_attention(*[cp.to_layout(x)] * 3, is_causal=True, context=cp)
            ...     return cp.from_layout(out, x.shape[1])
            >>> cp.check_layout(attend, jnp.ones((1, 8, 2, 4))) < 1e-6
            True
        """
        if self.is_manual:
            raise ValueError("check_layout calls the function itself: call it outside of shard_map and jit")
        one_rank = dataclasses.replace(self, mesh=alone.mesh_of_one(self.resolve_mesh()))
        where = f"{self.ranks()} context ranks in layout {self.layout}"
        return alone.largest_difference(function, self, one_rank, arrays, tolerance, where)

    def attention_fn(self, **defaults: Any) -> "AttentionFn":
        """An `attention_fn` for `nnx.MultiHeadAttention` or linen's, running ring attention in this context.

        Keyword arguments are defaults for `ring_attention` (is_causal, seq_len, ...). See `ring_jax.context.attention_fn`.
        """
        from ring_jax.context.attention_fn import attention_fn  # flax is imported only where it is used

        return attention_fn(self, **defaults)

    # -- mesh ------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy, which a mesh itself refuses: its axes, and the ids of its devices."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if isinstance(self.mesh, Mesh):
            ids = [[d.id for d in self.mesh.devices.flat], self.mesh.devices.shape]
            fields["mesh"] = (*ids, self.mesh.axis_names, [kind.name for kind in self.mesh.axis_types])
        return fields

    def __setstate__(self, fields: dict[str, Any]) -> None:
        if isinstance(fields["mesh"], tuple):
            fields = fields | {"mesh": mesh_of_ids(*fields["mesh"])}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def is_manual(self) -> bool:
        """Whether we are inside a shard_map that is manual over the context axis."""
        manual = jax.sharding.get_abstract_mesh().manual_axes
        inside = [a in manual for a in axis_names(self.axis)]
        if any(inside) and not all(inside):
            raise ValueError(
                f"inside a shard_map that is manual over only some of the context axes {self.axis!r}: make it manual over all"
            )
        mesh = jax.sharding.get_abstract_mesh()
        split = [a for a in (*axis_names(self.batch_axis), *axis_names(self.head_axis)) if mesh.shape.get(a, 1) > 1]
        if all(inside) and not set(split) <= set(manual):
            raise ValueError(
                f"inside a shard_map that is manual over {self.axis!r} but not over {sorted(set(split) - set(manual))}: "
                "make it manual over all axes that the context names, or batch and heads would be gathered"
            )
        return all(inside)

    def resolve_mesh(self, like: Array | None = None) -> AnyMesh:
        """The mesh: the argument, the ambient one, or that of the array's own sharding.

        Raises:
            ValueError: there is none, or it lacks a named axis.
        """
        _check_like(like)
        ambient = jax.sharding.get_abstract_mesh()
        mesh: Any = self.mesh
        # Inside a shard_map over other axes only the ambient mesh knows which of them are manual.
        if ambient.manual_axes or (mesh is None and not ambient.empty):
            mesh = ambient
        if mesh is None and like is not None:
            sharding = (
                like.sharding
                if isinstance(like, jax.Array) and not isinstance(like, jax.core.Tracer)
                else jax.typeof(like).sharding
            )
            if isinstance(sharding, NamedSharding) and not sharding.mesh.empty:
                mesh = sharding.mesh
        if mesh is None:
            raise ValueError(
                f"no mesh for context axis {self.axis!r}: pass ContextParallel(mesh=...), or run under jax.set_mesh(mesh), "
                "or give an array that is sharded over one"
            )
        self._check_mesh(mesh)
        return mesh

    def free(self, axis: Axis | None) -> Axis | None:
        """`axis` without the mesh axes over which a surrounding shard_map is manual already."""
        axis = axis if axis is None else check_mesh_axes("axis", axis)
        names = tuple(a for a in axis_names(axis) if a not in jax.sharding.get_abstract_mesh().manual_axes)
        return names if len(names) > 1 else names[0] if names else None

    def ranks(self, like: Array | None = None) -> int:
        """Number of context ranks C; `like` is an array on the mesh, where nothing else names it."""
        _check_like(like)
        if self.is_manual:
            return int(jax.lax.axis_size(self.axis))
        return axis_size(self.resolve_mesh(like), self.axis)

    def shard(self, length: int, like: Array | None = None) -> Shard:
        """This context as strategies see it, for a padded sequence of `length` positions."""
        length = check_count("length", length)
        return Shard(self.axis, self.ranks(like), self.layout, length)

    def _check_mesh(self, mesh: AnyMesh) -> None:
        for field in ("axis", "batch_axis", "head_axis"):
            for name in axis_names(getattr(self, field)):
                if name not in mesh.axis_names:
                    raise ValueError(
                        f"ContextParallel({field}={name!r}): the mesh has axes {dict(mesh.shape)}, no {name!r}"
                    )

    def _move(self, x: Array, source: Layout, target: Layout, seq_axis: int, head_dim: int | None) -> jax.Array:
        if self.is_manual:
            return relayout_shard(x, source, target, self.axis, self.ranks(), seq_axis)
        mesh = self.resolve_mesh(x)
        ranks, length = axis_size(mesh, self.axis), x.shape[seq_axis]
        for layout in (source, target):
            if layout.padded_length(length, ranks) != length:
                raise ValueError(
                    f"length {length} on axis {seq_axis} does not divide over {ranks} context ranks in layout {layout}; "
                    f"the next that does is {layout.padded_length(length, ranks)}. to_layout pads natural-order arrays."
                )
        spec = self._spec(x, mesh, seq_axis, self.axis, head_dim)
        move = HashablePartial(relayout_shard, (source, target, self.axis, ranks, seq_axis))
        return run_sharded(move, mesh, (spec,), spec, (x,))

    def _spec(self, x: Array, mesh: AnyMesh, seq_axis: int, axis: Axis | None, head_dim: int | None) -> P:
        spec: list[Axis | None] = [None] * x.ndim
        if seq_axis != 0:
            spec[0] = self.free(self.batch_axis)
        if head_dim is not None:
            spec[head_dim] = self.free(self.head_axis)
        elif x.ndim == 4 and seq_axis == 1:
            spec[2] = self.free(self.head_axis)
        spec = [
            a if a is None or size % axis_size(mesh, a) == 0 else None for a, size in zip(spec, x.shape, strict=True)
        ]
        spec[seq_axis] = axis
        return P(*spec)


def _check_like(like: Any) -> None:
    if like is not None:
        check_array("like", like, kind="any")


def _check_axes(x: Any, seq_axis: int, head_dim: int | None) -> tuple[int, int | None]:
    """(axis of the sequence, axis of the heads) of an array, from its start."""
    check_array("x", x, kind="any")
    seq_axis = check_axis("seq_axis", seq_axis, x.ndim)
    if head_dim is None:
        return seq_axis, None
    head_dim = check_axis("head_dim", head_dim, x.ndim)
    if head_dim in (0, seq_axis):
        taken = "the sequence" if head_dim == seq_axis else "the batch"
        raise ValueError(f"head_dim={head_dim} is the axis of {taken}, heads need one of their own: leave head_dim out")
    return seq_axis, head_dim
