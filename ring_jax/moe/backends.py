"""What computes the experts' products, behind `implementation=`: a table with reasons, and the choice.

A backend is one differentiable function on the tokens that are here:

    run(x, gate_up, down, weights, experts, total) -> y [T, D] in the weights' dtype

x [T, D]; gate_up [E, D, 2, F] and down [E, F, D] of the experts here; weights and int32 experts [T, k], 0 ... E - 1 are here and
others are not; `total` counts the experts of all ranks. To add one: write the function, give `unsupported_reason` a reason for what
it cannot run, and add it to `BACKENDS` and to `PREFERENCE`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax

from ring_jax._arrays import Shaped
from ring_jax._checks import check_choice
from ring_jax._device import target
from ring_jax.moe.blocks import Blocks, block_size
from ring_jax.moe.experts import blocks_per_step, run_experts
from ring_jax.moe.hopper import backend as hopper
from ring_jax.mosaic import compat

Implementation = Literal["mosaic", "xla"]


@dataclass(frozen=True)
class Backend:
    name: str
    run: Callable[..., jax.Array]
    # Why it cannot run these arrays here, or None. Takes (x, gate_up, down).
    unsupported_reason: Callable[[Shaped, Shaped, Shaped], str | None] = lambda x, gate_up, down: None


def _xla(
    x: jax.Array, gate_up: jax.Array, down: jax.Array, weights: jax.Array, experts: jax.Array, total: int
) -> jax.Array:
    step = blocks_per_step(gate_up, target().platform)
    blocks = Blocks.of(experts, gate_up.shape[0], block_size(x.shape[0], experts.shape[1], total), step)
    return run_experts(x, gate_up, down, weights, blocks, step)


def _mosaic(
    x: jax.Array, gate_up: jax.Array, down: jax.Array, weights: jax.Array, experts: jax.Array, total: int
) -> jax.Array:
    return hopper.run_experts(x, gate_up, down, weights, experts, total=total)


def _mosaic_reason(x: Shaped, gate_up: Shaped, down: Shaped) -> str | None:
    if not compat.INTERPRET_AVAILABLE:
        return f"needs jax 0.11 or later, this is {jax.__version__}"
    return hopper.unsupported_reason(x, gate_up, down)


BACKENDS: dict[Implementation, Backend] = {
    "mosaic": Backend("mosaic", _mosaic, _mosaic_reason),
    "xla": Backend("xla", _xla),
}

# What implementation=None tries, best first; the last runs anything.
PREFERENCE: tuple[Implementation, ...] = ("mosaic", "xla")


def select(implementation: Implementation | None, x: Shaped, gate_up: Shaped, down: Shaped) -> Backend:
    """The backend that `implementation` names, or the best that runs here for None.

    Raises:
        TypeError, ValueError: no name of a backend.
        NotImplementedError: a named backend cannot run these arrays on this device.
    """
    check_choice("implementation", implementation, BACKENDS, optional=True)
    if implementation is None:
        name = next(n for n in PREFERENCE if BACKENDS[n].unsupported_reason(x, gate_up, down) is None)
        return BACKENDS[name]
    if (reason := BACKENDS[implementation].unsupported_reason(x, gate_up, down)) is not None:
        raise NotImplementedError(
            f"implementation={implementation!r} cannot run here: {reason}. None lets ring_jax choose"
        )
    return BACKENDS[implementation]
