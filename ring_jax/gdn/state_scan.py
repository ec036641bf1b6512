"""Chunks of one sequence on several ranks: who comes before whom, and the state that enters each.

Ranks hold one chunk each (contiguous) or two (two-chunk zigzag: r and 2C-1-r), `folds` of them. The gated delta rule
is affine in its state, S_out = M S_in + B over any chunk, so the state that enters a chunk is a prefix of compositions

    (M2, B2) after (M1, B1) = (M2 M1, M2 B1 + B2).

Small C gathers all pairs. Beyond, each scan takes ceil(log2 C) permutes of one pair (Hillis and Steele 1986) and O(1)
memory: upwards over the ranks' first chunks, and for zigzag then downwards over their second ones, for which rank C-1
hands its first chunk's result to its own second chunk (chunks C-1 and C are neighbours).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ring_jax._mesh import Axis
from ring_jax._vma import align
from ring_jax.context.shard import Shard
from ring_jax.layout import Contiguous, Zigzag

GATHER_RANKS = 4  # up to this many ranks, one gather is cheaper than log2(C) + 1 dependent permutes
_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@dataclass(frozen=True)
class Chunks:
    """Which chunks of the sequence this rank holds; all methods run inside a shard_map over `axis`.

    "Chunked" arrays have the rank's chunks as their leading axis, [folds, ...].
    """

    axis: Axis
    ranks: int
    folds: int
    size: int  # tokens in a chunk

    @classmethod
    def of(cls, shard: Shard) -> "Chunks":
        """Raises ValueError where the layout cuts the sequence otherwise than into one chunk a rank, or two forth and back."""
        contiguous = shard.layout == Contiguous() or shard.ranks == 1
        chunk = shard.layout.block_size(shard.length, shard.ranks) if type(shard.layout) is Zigzag else 0
        if not contiguous and chunk * 2 * shard.ranks != shard.length:
            raise ValueError(
                f"strategy='state' passes one state from each chunk to the next, and layout {shard.layout} cuts {shard.length} "
                f"tokens over {shard.ranks} ranks otherwise than Contiguous() or the two-chunk Zigzag(): use one of those, or "
                "strategy='batch' or 'head'"
            )
        folds = 1 if contiguous else 2
        return cls(shard.axis, shard.ranks, folds, shard.length // (folds * shard.ranks))

    def split(self, x: jax.Array) -> jax.Array:
        """[B, folds * size, ...] to chunked [folds, B, size, ...]."""
        return jnp.moveaxis(x.reshape(x.shape[0], self.folds, self.size, *x.shape[2:]), 1, 0)

    def join(self, x: jax.Array) -> jax.Array:
        """Inverse of `split`."""
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], self.folds * self.size, *x.shape[3:])

    def starts(self) -> jax.Array:
        """Global position of the first token of each chunk here, int32 [folds]."""
        rank = lax.axis_index(self.axis).astype(jnp.int32)
        chunks = [rank] if self.folds == 1 else [rank, 2 * self.ranks - 1 - rank]
        return jnp.stack(chunks) * self.size

    def up(self, x: jax.Array, by: int = 1) -> jax.Array:
        """From rank r to rank r + by; zeros where nothing comes from."""
        return lax.ppermute(x, self.axis, [(r, r + by) for r in range(self.ranks - by)])

    def down(self, x: jax.Array, by: int = 1) -> jax.Array:
        """From rank r to rank r - by."""
        return lax.ppermute(x, self.axis, [(r + by, r) for r in range(self.ranks - by)])

    def predecessors(self, x: jax.Array) -> jax.Array:
        """For a chunked x: each chunk's predecessor's x, zeros for the first chunk of the sequence."""
        if self.folds == 1:
            return self.up(x)
        turns = lax.axis_index(self.axis) == self.ranks - 1
        return jnp.stack([self.up(x[0]), jnp.where(turns, x[0], self.down(x[1]))])

    def of_last(self, x: jax.Array) -> jax.Array:
        """For a chunked x: that of the last chunk of the sequence, on all ranks."""
        owner = self.ranks - 1 if self.folds == 1 else 0
        mine = lax.axis_index(self.axis) == owner
        return lax.psum(jnp.where(mine, x[-1], jnp.zeros_like(x[-1])), self.axis)

    def entering(
        self,
        transition: jax.Array,
        update: jax.Array,
        initial: jax.Array | None,
        gather: bool | None = None,
        joins: jax.Array | None = None,
    ) -> jax.Array:
        """The state that enters each chunk.

        Args:
            transition: M, chunked [folds, B, N, dk, dk], float32.
            update: B, chunked [folds, B, N, dk, dv]: what the chunk makes of a state of zero.
            initial: the state before the sequence, [B, N, dk, dv], the same on all ranks; None for zeros.
            gather: gather all pairs instead of scanning; default: for up to GATHER_RANKS ranks.
            joins: bool [folds, B], whether the state that enters a chunk goes on in it; by default it does.

        Returns:
            Chunked [folds, B, N, dk, dv].
        """
        if gather is None:
            gather = self.ranks <= GATHER_RANKS
        if joins is not None:
            joins = joins[..., None, None, None]
            transition = jnp.where(joins, transition, jnp.zeros_like(transition))
        transition, update, initial = align(transition, update, initial)
        passed = self._by_gather(transition, update, initial) if gather else self._by_scan(transition, update, initial)
        return passed if joins is None else jnp.where(joins, passed, jnp.zeros_like(passed))

    def leaving(self, transition: jax.Array, update: jax.Array, entering: jax.Array) -> jax.Array:
        """The state after the last chunk of the sequence, on all ranks, from that which enters each chunk."""
        return self.of_last(_apply(transition, entering) + update)

    def _by_scan(self, transition: jax.Array, update: jax.Array, initial: jax.Array | None) -> jax.Array:
        initial = jnp.zeros_like(update[0]) if initial is None else initial
        first, total = self._scan(transition[0], update[0], initial, self.up, 0)
        if self.folds == 1:
            return first[None]
        # `total` is the state after this rank's first chunk: on rank C-1, the one that enters its second chunk.
        second, _ = self._scan(transition[1], update[1], total, self.down, self.ranks - 1)
        return jnp.stack([first, second])

    def _scan(
        self, transition: jax.Array, update: jax.Array, initial: jax.Array, shift: Any, begin: int
    ) -> tuple[jax.Array, jax.Array]:
        """(state before, state after) this rank's chunk, for a walk that begins on rank `begin` from its `initial`.

        Folding `initial` into the first chunk makes that a constant map. What a permute brings from beyond the first
        rank is (0, 0), and composing with it leaves B as it is: no masks are needed.
        """
        begins = lax.axis_index(self.axis) == begin
        dv = update.shape[-1]
        update = update + jnp.where(begins, _apply(transition, initial), jnp.zeros_like(update))
        by = 1
        while by < self.ranks:
            if 2 * by < self.ranks:
                pair = shift(jnp.concatenate([update, transition], axis=-1), by)
                pair = _apply(transition, pair)
                update, transition = update + pair[..., :dv], pair[..., dv:]
            else:
                update = update + _apply(transition, shift(update, by))
            by *= 2
        return jnp.where(begins, initial, shift(update)), update

    def _by_gather(self, transition: jax.Array, update: jax.Array, initial: jax.Array | None) -> jax.Array:
        dv = update.shape[-1]
        # [C, folds, ...]; tiled, see `Shard.gather`.
        pairs = lax.all_gather(jnp.concatenate([update, transition], axis=-1)[None], self.axis, axis=0, tiled=True)
        in_order = pairs[:, 0] if self.folds == 1 else jnp.concatenate([pairs[:, 0], pairs[::-1, 1]])
        states = [jnp.zeros_like(update[0]) if initial is None else initial]
        for pair in in_order[:-1]:
            made, through = pair[..., :dv], pair[..., dv:]
            begins = initial is None and len(states) == 1  # what a state of zero becomes
            states.append(made if begins else _apply(through, states[-1]) + made)
        return jnp.take(jnp.stack(states), self.starts() // max(self.size, 1), axis=0, mode="clip")


def _apply(transition: jax.Array, x: jax.Array) -> jax.Array:
    return _einsum("...ij,...jv->...iv", transition, x)
