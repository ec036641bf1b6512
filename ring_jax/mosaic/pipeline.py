"""Slots of a ring of buffers, and turns that warpgroups take."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.experimental.pallas as pl
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from ring_jax.mosaic import compat


def ring_slot(step: Any, slots: int) -> Any:
    """step mod slots, for step >= 0."""
    return step & (slots - 1) if slots & (slots - 1) == 0 else lax.rem(step, slots)


def feed(
    count: Any, slots: int, copies: Callable[..., Iterable[tuple[Any, Any]]], *, full: Any, free: Any, **buffers: Any
) -> None:
    """Fills a ring of buffers by TMA, `count` times, each slot as soon as it is free: `copies(step, slot, **buffers)` says from where
    to where."""

    @pl.loop(0, count)
    def _(step: jax.Array) -> None:
        slot = ring_slot(step, slots)
        plgpu.barrier_wait(free.at[slot])
        for source, target in copies(step, slot, **buffers):
            plgpu.copy_gmem_to_smem(source, target, full.at[slot])

    if compat.interpreting():  # the interpreter wants every phase of a barrier to be seen
        for slot in range(slots):
            plgpu.barrier_wait(free.at[slot])


def in_first_warp(body: Callable[[], None]) -> None:
    """Runs body() in one of a warpgroup's warps: TMA needs no more, and the others would wait for each slot and issue each step's
    instructions beside those that compute. body may hold scalars and Refs, no arrays; the Refs may not vary over a mesh
    (`in_place.opaque`). Before jax 0.11, which has neither, all four warps run it."""
    if compat.interpreting() or not compat.INTERPRET_AVAILABLE:
        body()
    else:
        plgpu.warp_map(lambda warp: pl.when(warp == 0)(body))


def take_turn(warpgroup: jax.Array) -> None:
    """Waits until another warpgroup has called `pass_turn` for this one."""
    _named_barrier("sync", warpgroup)


def pass_turn(warpgroup: jax.Array) -> None:
    _named_barrier("arrive", warpgroup)


def _named_barrier(operation: str, warpgroup: jax.Array) -> None:
    """bar.sync / bar.arrive of two warpgroups: cheaper than an mbarrier. Mosaic itself uses the low barrier numbers."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def barrier(_: Any, number: Any) -> None:
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [number.registers[()]],
            f"bar.{operation} $0, 256;",
            "r",
            has_side_effects=True,
        )

    barrier(warpgroup + 8)
