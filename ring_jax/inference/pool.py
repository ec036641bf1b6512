"""What lies on the devices between programs: one pytree, donated to each of them and never handed out.

    pages     [L, 2, P, C p, K, H]     keys and values of all L full-attention layers; position t of every text lies in page
                                       t // (C p) of the text's table, on context rank (t // p) mod C, in slot t mod p there
    state     [G, n, R, V, dk, dv]     float32, of running rows, the same on all context ranks
    tail      [G, n, R, W - 1, F]      the convolutions' last inputs
    saved, saved_tail                  snapshots of both, cut over the context ranks and padded where they do not divide; None
                                       where there are none: jax 0.11.2 ends the process at an empty array in a shard_map

Keys and states have pools of their own: one page size for both would make pages of a hybrid model far too large.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int

from ring_jax import _repr
from ring_jax._arrays import round_up
from ring_jax._checks import check_count
from ring_jax._mesh import axis_names, axis_size
from ring_jax.context.paged import Placement
from ring_jax.models.qwen3_5.structure import Structure


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """See above; token, position and active are those of the running rows: the next token to enter, where, and whether."""

    pages: Float[Array, "L 2 P Cp K H"]
    state: Float32[Array, "G n R V dk dv"]
    tail: Float[Array, "G n R W-1 F"]
    saved: Float32[Array, "Z G n V dk _"] | None
    saved_tail: Float[Array, "Z G n W-1 _"] | None
    token: Int[Array, " R"]
    position: Int[Array, " R"]
    active: Bool[Array, " R"]
    __repr__ = _repr.of_fields


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of a pool.

    Args:
        pages: of C p tokens each, the one for trash included. page: p. rows: R. slots: snapshots, Z.
    """

    pages: int
    page: int
    rows: int
    slots: int

    def placement(self, sharding: Any) -> Placement:
        return Placement(context_ranks(sharding), self.page)

    def shapes(self, model: Structure) -> Pool:
        """Shapes and dtypes of the whole pool."""
        config, sharding = model.config, model.sharding
        ranks = context_ranks(sharding)
        tensor = 1 if sharding is None else axis_size(sharding.resolve_mesh(), sharding.tensor)
        heads, kinds = config.linear, config.layer_types[: config.period]
        linear = sum(kind == "linear_attention" for kind in kinds)
        full = (len(kinds) - linear) * config.groups
        keys = (full, 2, self.pages, ranks * self.page, config.num_kv_heads, config.head_dim)
        states = config.groups, linear
        matrix, history = (heads.value_heads, heads.key_size), config.conv_width - 1
        wide = jnp.float64 if model.dtype == jnp.float64 else jnp.float32
        shape: Any = jax.ShapeDtypeStruct
        shares = round_up(heads.value_size, ranks), tensor * round_up(heads.features // tensor, ranks)
        return Pool(
            pages=shape(keys, model.dtype),
            state=shape((*states, self.rows, *matrix, heads.value_size), wide),
            tail=shape((*states, self.rows, history, heads.features), model.dtype),
            saved=shape((self.slots, *states, *matrix, shares[0]), wide) if self.slots else None,
            saved_tail=shape((self.slots, *states, history, shares[1]), model.dtype) if self.slots else None,
            token=shape((self.rows,), jnp.int32),
            position=shape((self.rows,), jnp.int32),
            active=shape((self.rows,), jnp.bool_),
        )

    def specs(self, sharding: Any) -> Any:
        """PartitionSpecs of a `Pool`."""
        context, tensor = sharding.sequence, sharding.tensor
        both = (*axis_names(tensor), *axis_names(context))
        spec: Any = Pool
        return spec(
            pages=P(None, None, None, context, tensor),
            state=_spec(None, None, None, tensor),
            tail=_spec(None, None, None, None, tensor),
            saved=P(None, None, None, tensor, None, context) if self.slots else None,
            saved_tail=P(None, None, None, None, both) if self.slots else None,
            token=P(),
            position=P(),
            active=P(),
        )

    def bytes_per_rank(self, model: Structure) -> int:
        """Of one device."""
        shapes, sharding = self.shapes(model), model.sharding
        if sharding is None:
            return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        mesh = sharding.resolve_mesh()
        parts = jax.tree.map(
            lambda x, spec: math.prod(NamedSharding(mesh, spec).shard_shape(x.shape)) * x.dtype.itemsize,
            shapes,
            self.specs(sharding),
        )
        return sum(jax.tree.leaves(parts))

    def empty(self, model: Structure) -> Pool:
        """A pool of zeros, made where it lies."""
        shapes, sharding = self.shapes(model), model.sharding
        places = None
        if sharding is not None:
            mesh = sharding.resolve_mesh()
            is_spec = lambda x: isinstance(x, P)  # noqa: E731
            places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), self.specs(sharding), is_leaf=is_spec)
        zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)  # noqa: E731
        return jax.jit(zeros, out_shardings=places)()


def _spec(*axes: Any) -> P:
    """As programs return it, P() where nothing is cut: else the first call of each after `empty` would miss jit's fastest path."""
    return P(*axes) if any(axes) else P()


def context_ranks(sharding: Any) -> int:
    """Over how many ranks a model's sequence lies."""
    return 1 if sharding is None else axis_size(sharding.resolve_mesh(), sharding.sequence)


def default_page(ranks: int) -> int:
    """Tokens of a page on one of so many ranks."""
    return 64 if ranks <= 8 else 32


def choose_geometry(
    model: Structure,
    *,
    rows: int,
    page: int | None,
    pages: int | None,
    slots: int | None,
    memory: int | None,
    fraction: float,
) -> Geometry:
    """A pool of `pages` pages for texts (and one for trash) and `slots` snapshots; where they are not given, of what fits into
    `memory` bytes on a device.

    Raises:
        ValueError: less memory than one page and the running rows take.
    """
    ranks = context_ranks(model.sharding)
    page = default_page(ranks) if page is None else check_count("page", page, 1)
    if pages is not None:
        check_count("pages", pages, 1)
        slots = min(pages, 8 * rows) if slots is None else check_count("snapshots", slots)
        return Geometry(pages + 1, page, rows, slots)
    budget = default_memory(model) if memory is None else check_count("memory", memory, 1)
    base, with_page, with_slot = (Geometry(p, page, rows, z).bytes_per_rank(model) for p, z in ((1, 0), (2, 0), (1, 1)))
    of_page, of_slot = with_page - base, with_slot - base
    left = budget - base
    if left < of_page:
        raise ValueError(
            f"memory={budget:,} bytes a device do not hold a page of {of_page:,} beside the states of {rows} rows, "
            f"{base:,}: give more memory or fewer rows"
        )
    useful = 4 * rows * -(-model.config.max_positions // (ranks * page))
    if slots is None:
        slots = min(int(left * fraction) // of_slot, useful)
    else:
        check_count("snapshots", slots)
    return Geometry(1 + max(1, min((left - slots * of_slot) // of_page, useful)), page, rows, slots)


def default_memory(model: Structure) -> int:
    """Bytes on each device, as this process sees its own."""
    devices = jax.devices()[:1] if model.sharding is None else list(model.sharding.resolve_mesh().devices.flat)
    here = [device.memory_stats() or {} for device in devices if device.process_index == jax.process_index()]
    if here and all("bytes_limit" in stats for stats in here):
        return min(int(0.9 * stats["bytes_limit"]) - stats["bytes_in_use"] for stats in here)
    return (1 << 29) // len(devices)  # emulated devices share the memory
