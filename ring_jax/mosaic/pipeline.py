"""Slots of a ring of buffers, and turns that warpgroups take."""

from typing import Any

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm


def ring_slot(step: Any, slots: int) -> Any:
    """step mod slots, for step >= 0."""
    return step & (slots - 1) if slots & (slots - 1) == 0 else lax.rem(step, slots)


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
