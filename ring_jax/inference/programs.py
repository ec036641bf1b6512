"""What the engine runs on the devices. Each program takes the pool, which it is given for good, and returns it.

    prefill    a chunk of one text, or short pieces of several: new keys to their pages, states to their rows
    decode     up to `steps` tokens of every row, sampled and fed back on the device
    save, restore, copy     a row's states to a snapshot and back; a page to another

Which texts, where and how many tokens are arrays: a program is compiled for a padded chunk length (which says how many pieces it
takes), a width of page tables, whether there is a past, and whether a decode is `steady`, nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from ring_jax import gdn
from ring_jax._mesh import HashablePartial, axis_names, reshard_explicit
from ring_jax.context.paged import Placement, to_owners, write_pages
from ring_jax.inference.control import COLUMNS, Control
from ring_jax.inference.past import PagedPast
from ring_jax.inference.pool import Geometry, Pool
from ring_jax.inference.sampling import Drawn, draw
from ring_jax.models.qwen3_5 import COMPILER_OPTIONS
from ring_jax.models.qwen3_5.forward import Wanted, loop_layers, next_logits, scan_layers
from ring_jax.models.qwen3_5.pass_ import embed, lay_out, same_tokens
from ring_jax.models.qwen3_5.structure import Structure


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Written:
    """What a decode wrote: of each row the first `count` of the steps; `finite` is False where its logits were not."""

    drawn: Drawn
    count: Int[Array, " R"]


class Programs:
    """The programs of one model and geometry; `steps` of a decode.

    jit finds what another engine of the same sizes has compiled. `keys` names what this one has run: a program is compiled for
    its key, and for nothing else.
    """

    def __init__(self, model: Structure, params: Any, geometry: Geometry, steps: int):
        self.keys: set[tuple[Any, ...]] = set()
        self._params = params
        self._sharding: Any = model.sharding
        self._local = _Local(model, geometry.placement(model.sharding), steps)
        self._specs: Any = None
        if model.sharding is not None:
            mesh = model.sharding.resolve_mesh()
            self._specs = mesh, geometry.specs(model.sharding), model.param_specs(params, mesh)

    def prefill(self, pool: Pool, tokens: Any, start: Any, length: Any, row: Any, table: Any, *, whole: bool) -> Pool:
        """tokens int32 [N, T], padded from `length` on; start, length, row int32 [N]: all start at 0, or none does. table int32
        [N, n]. A row that is not there is dropped. `whole`: nothing is padded."""
        past = bool(start[0])
        local = HashablePartial(_Local.prefill, (self._local, past, whole))
        self.keys.add(("prefill", *tokens.shape, table.shape[1] if past else 0, whole))
        return self._run(local, pool, (tokens, start, length, row, table), params=True, sequences=1)

    def decode(self, pool: Pool, control: Any, table: Any, *, steady: bool) -> tuple[Pool, Written]:
        """control int32 [R, COLUMNS], table int32 [R, n].

        `steady`: all steps are taken, no vocabulary is sorted and no text begins. Then nothing of the program depends on data, and a GPU
        takes it in whole, where it asks the host before each step or branch."""
        local = HashablePartial(_Local.decode, (self._local, steady))
        self.keys.add(("decode", table.shape[1], steady))
        return self._run(local, pool, (control, table), params=True, written=True)

    def save(self, pool: Pool, row: int, slot: int) -> Pool:
        self.keys.add(("save",))
        return self._run(HashablePartial(_Local.save, (self._local,)), pool, (jnp.int32(row), jnp.int32(slot)))

    def restore(self, pool: Pool, slot: int, row: int) -> Pool:
        self.keys.add(("restore",))
        return self._run(HashablePartial(_Local.restore, (self._local,)), pool, (jnp.int32(slot), jnp.int32(row)))

    def copy(self, pool: Pool, source: int, target: int) -> Pool:
        self.keys.add(("copy",))
        return self._run(HashablePartial(_Local.copy, (self._local,)), pool, (jnp.int32(source), jnp.int32(target)))

    def rehearse(self, pool: Pool, name: str, *sizes: Any) -> Pool:
        """Runs a program of `Ladders.every_program` where it does no harm: in a row that no text has, page 0, no snapshot."""
        page, rows = self._local.placement.tokens, pool.token.shape[0]
        slots = 0 if pool.saved is None else pool.saved.shape[0]
        match name, *sizes:
            case "save" | "restore", *_ if not slots:
                return pool
            case "save", *_:
                return self.save(pool, 0, slots)
            case "restore", *_:
                return self.restore(pool, 0, 0)
            case "copy", *_:
                return self.copy(pool, 0, 0)
            case "decode", width, steady:
                control, table = np.zeros((rows, COLUMNS), np.int32), np.zeros((rows, width), np.int32)
                return self.decode(pool, control, table, steady=steady)[0]
            case _, pieces, size, width, whole:
                table = np.zeros((pieces, width or self._local.placement.pages(size)), np.int32)
                start, length, row = (
                    np.full(pieces, n, np.int32) for n in (page if width else 0, size if whole else 0, rows)
                )
                return self.prefill(pool, np.zeros((pieces, size), np.int32), start, length, row, table, whole=whole)
        raise AssertionError(name)

    def _run(
        self,
        local: HashablePartial,
        pool: Pool,
        operands: tuple[Any, ...],
        *,
        params: bool = False,
        written: bool = False,
        sequences: int = 0,
    ) -> Any:
        """`sequences`: how many of the operands, from the first on, lie over the context axis."""
        given = self._params if params else {}
        if self._specs is None:
            return _run(local, None, None, None, None, pool, given, operands)
        mesh, pool_specs, param_specs = self._specs
        sequence = P(None, self._sharding.sequence)
        each = (sequence,) * sequences + (P(),) * (len(operands) - sequences)
        in_specs = pool_specs, param_specs if params else {}, each
        leaves, tree = jax.tree.flatten(in_specs, is_leaf=lambda x: isinstance(x, P))
        out_specs = (pool_specs, P()) if written else pool_specs
        return _run(local, mesh, tuple(leaves), tree, out_specs, pool, given, operands)


# Inside of a loop over steps XLA's Triton products would have every slice of a stacked weight copied, in every step.
@functools.partial(jax.jit, static_argnums=range(5), donate_argnums=5, compiler_options=COMPILER_OPTIONS)
def _run(local: Any, mesh: Any, leaves: Any, tree: Any, out_specs: Any, pool: Any, params: Any, operands: Any) -> Any:
    if mesh is None:
        return local(pool, params, operands)
    in_specs = jax.tree.unflatten(tree, leaves)
    given = reshard_explicit((pool, params, operands), mesh, in_specs)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(*given)


@dataclasses.dataclass(frozen=True)
class _Local:
    """The programs as one rank runs them. Static arguments come last, as `HashablePartial` appends them, the first of them
    this value."""

    structure: Structure
    placement: Placement
    steps: int

    @property
    def sharding(self) -> Any:
        return self.structure.sharding

    def rank(self) -> Any:
        return 0 if self.sharding is None else lax.axis_index(self.sharding.sequence)

    @staticmethod
    def prefill(pool: Pool, params: Any, operands: Any, self: _Local, past: bool, whole: bool) -> Pool:
        tokens, start, length, row, table = operands
        model = self.structure
        before = None
        if past:
            before = PagedPast(
                pool.pages, table, start, _cache(_rows(pool.state, row), _rows(pool.tail, row)), self.placement
            )
        ranks = self.placement.ranks
        here_lengths = None if whole else length
        own_tokens, here = lay_out(model, tokens, here_lengths, None, before, tokens.shape[1] * ranks)
        x = embed(model, params, here, own_tokens)
        _, left = scan_layers(model, params, x, here, Wanted())
        new, pages = lax.optimization_barrier((_by_layer(left.keys), pool.pages))
        layout: Any = None if self.sharding is None else self.sharding.context.layout
        axis = None if self.sharding is None else self.sharding.sequence
        new, positions = to_owners(new, start, length, self.placement, layout, axis)
        return dataclasses.replace(
            pool,
            pages=write_pages(pages, new, table, positions, self.placement, self.rank()),
            state=_with_rows(pool.state, row, left.states.state),
            tail=_with_rows(pool.tail, row, left.states.tail),
        )

    @staticmethod
    def decode(pool: Pool, params: Any, operands: Any, self: _Local, steady: bool) -> tuple[Pool, Written]:
        packed, table = operands
        control = Control.of(packed)
        rows = packed.shape[0]
        pool = dataclasses.replace(
            pool,
            token=jnp.where(control.enters, control.token, pool.token),
            position=jnp.where(control.enters, control.position, pool.position),
            active=jnp.where(control.enters, True, pool.active) & control.member,
        )
        pool = pool if steady else self._begun(pool, control)
        shapes = jax.eval_shape(
            lambda: draw(
                jnp.zeros((rows, self.structure.config.vocab_size), jnp.float32), pool.position, control.sampling
            )
        )
        drawn = jax.tree.map(lambda x: jnp.zeros((self.steps, *x.shape), x.dtype), shapes)
        start = jnp.int32(0), pool, jnp.zeros(rows, jnp.int32), drawn

        def going(state: Any) -> jax.Array:
            more = state[0] < self.steps
            return more if steady else more & jnp.any(state[1].active)

        def body(state: Any) -> Any:
            i, pool, count, drawn = state
            pool, active, new = self._one(params, pool, control, table, steady)
            drawn = jax.tree.map(lambda all_, x: lax.dynamic_update_index_in_dim(all_, x, i, 0), drawn, new)
            return i + 1, pool, count + active.astype(jnp.int32), drawn

        _, pool, count, drawn = lax.while_loop(going, body, start)
        return pool, Written(drawn, count)

    def _begun(self, pool: Pool, control: Control) -> Pool:
        """The pool with states of zeros for texts of one token, which no prefill has begun."""
        fresh = control.enters & (control.position == 0)
        state, tail = lax.cond(jnp.any(fresh), _cleared, lambda states, _: states, (pool.state, pool.tail), fresh)
        return dataclasses.replace(pool, state=state, tail=tail)

    def _one(self, params: Any, pool: Pool, control: Control, table: Any, steady: bool) -> tuple[Pool, Array, Drawn]:
        """One token of every active row."""
        active, position, model = pool.active, pool.position, self.structure
        states = _cache(pool.state, pool.tail)
        past = PagedPast(pool.pages, table, jnp.where(active, position, 0), states, self.placement)
        tokens = pool.token[:, None]
        here = same_tokens(model, tokens, active.astype(jnp.int32), past)
        x, left = loop_layers(model, params, embed(model, params, here, tokens), here)
        logits = here.whole_vocabulary(next_logits(model, params, here, x[:, 0]))
        drawn = draw(logits, position, control.sampling, easy=steady)
        # Non-finite logits are reported, once: the row rests from then on.
        drawn = dataclasses.replace(drawn, finite=drawn.finite | ~active)
        ends = jnp.any(drawn.token[:, None] == control.stops, axis=1) | (position + 2 >= control.limit)
        new, pages = lax.optimization_barrier((_by_layer(left.keys), pool.pages))
        at = jnp.where(active, position, -1)[:, None]
        pool = dataclasses.replace(
            pool,
            pages=write_pages(pages, new, table, at, self.placement, self.rank()),
            state=left.states.state,
            tail=left.states.tail,
            token=jnp.where(active, drawn.token, pool.token),
            position=jnp.where(active, position + 1, position),
            active=active & drawn.finite & ~ends,
        )
        return pool, active, drawn

    @staticmethod
    def save(pool: Pool, params: Any, operands: Any, self: _Local) -> Pool:
        row, slot = operands

        def keep(saved: Any, states: Any) -> jax.Array:
            own = lax.dynamic_index_in_dim(states, row, axis=2, keepdims=False)
            share, sharding = saved.shape[-1], self.sharding
            if sharding is not None:
                own = jnp.pad(own, [(0, 0)] * (own.ndim - 1) + [(0, share * self.placement.ranks - own.shape[-1])])
                own = lax.dynamic_slice_in_dim(own, lax.axis_index(sharding.sequence) * share, share, own.ndim - 1)
            return saved.at[slot].set(own, mode="drop")

        return dataclasses.replace(
            pool, saved=keep(pool.saved, pool.state), saved_tail=keep(pool.saved_tail, pool.tail)
        )

    @staticmethod
    def restore(pool: Pool, params: Any, operands: Any, self: _Local) -> Pool:
        slot, row = operands

        def back(saved: Any, states: Any) -> jax.Array:
            own = lax.dynamic_index_in_dim(saved, slot, keepdims=False)
            if self.sharding is not None:
                for axis in reversed(axis_names(self.sharding.sequence)):
                    own = lax.all_gather(own, axis, axis=own.ndim - 1, tiled=True, to="invarying")
            own = own[..., : states.shape[-1]]
            return lax.dynamic_update_index_in_dim(states, own, row, axis=2)

        return dataclasses.replace(pool, state=back(pool.saved, pool.state), tail=back(pool.saved_tail, pool.tail))

    @staticmethod
    def copy(pool: Pool, params: Any, operands: Any, self: _Local) -> Pool:
        source, target = operands
        page = lax.dynamic_slice_in_dim(pool.pages, source, 1, axis=2)
        return dataclasses.replace(pool, pages=lax.dynamic_update_slice_in_dim(pool.pages, page, target, axis=2))


def _cleared(states: Any, rows: Any) -> Any:
    """States and tails with some rows of zeros."""

    def clear(x: Any) -> jax.Array:
        return jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 3)), jnp.zeros((), x.dtype), x)

    return jax.tree.map(clear, states)


def _rows(x: Any, row: Any) -> jax.Array:
    """Rows of states [G, n, R, ...]; zeros for those that are not there."""
    if len(row) == 1:
        return lax.dynamic_slice_in_dim(x, row[0], 1, axis=2)
    return jnp.take(x, row, axis=2, mode="fill", fill_value=0)


def _with_rows(x: Any, row: Any, new: Any) -> jax.Array:
    """The states with some rows new, but for those that are not there."""
    if len(row) == 1:
        return lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), row[0], axis=2)
    return x.at[:, :, row].set(new.astype(x.dtype), mode="drop")


def _by_layer(keys: Any) -> jax.Array:
    """[M, B, T, K, H], of which keys and values take turns, as [L, 2, B, T, K, H]."""
    return keys.reshape(-1, 2, *keys.shape[1:])


def _cache(state: Any, tail: Any) -> gdn.GDNCache:
    """States of one text each, which nothing but its own tokens follow."""
    return gdn.GDNCache(state, tail, jnp.zeros(state.shape[:3], jnp.int32))
