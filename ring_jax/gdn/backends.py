"""What computes the gated delta rule on one device, behind `implementation=`: a table with reasons, and the choice.

A backend is one differentiable function

    run(query, key, value, log_decay, beta, *, scale, initial_state, segment_ids) -> (out, final_state)

with arrays as `ring_jax.gated_delta_rule` describes them; what padding holds is zeroed before. To add one: write the function, give
`unsupported_reason` a reason for what it cannot run, and add it to `BACKENDS` and, where it is the best for some inputs, to `select`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from ring_jax._checks import check_choice
from ring_jax.gdn.chunked import chunked
from ring_jax.gdn.hopper import backend as hopper
from ring_jax.gdn.hopper import split
from ring_jax.gdn.recurrent import UNROLLED, recurrent
from ring_jax.gdn.reference import reference


@dataclass(frozen=True)
class Backend:
    name: str
    run: Callable[..., tuple[jax.Array, jax.Array]]
    # Why it cannot run these arrays here, or None. Takes (query, key, value).
    unsupported_reason: Callable[[Any, Any, Any], str | None] = lambda query, key, value: None
    # Whether an initial_state of None stands for zeros; the others are given them.
    begins: bool = False


BACKENDS = {
    "mosaic": Backend("mosaic", hopper.hopper, hopper.unsupported, begins=True),
    "mosaic_split": Backend("mosaic_split", split.split, hopper.unsupported, begins=True),
    "chunked": Backend("chunked", chunked),
    "recurrent": Backend("recurrent", recurrent),
    "reference": Backend("reference", reference),
}


def select(implementation: str | None, query: Any, key: Any, value: Any) -> Backend:
    """The backend that `implementation` names, or the best that runs here for None.

    None takes "recurrent" for a few tokens, beyond them "mosaic" where it runs (Hopper GPUs, 16-bit inputs), else "chunked".

    Raises:
        TypeError, ValueError: no name of a backend.
        NotImplementedError: a named backend cannot run these arrays on this device.
    """
    check_choice("implementation", implementation, sorted(BACKENDS), optional=True)
    if implementation is None:
        if key.shape[1] <= UNROLLED:
            return BACKENDS["recurrent"]
        return BACKENDS["chunked" if hopper.unsupported(query, key, value) else "mosaic"]
    if (reason := BACKENDS[implementation].unsupported_reason(query, key, value)) is not None:
        raise NotImplementedError(
            f"implementation={implementation!r} cannot run here: {reason}. None lets ring_jax choose"
        )
    return BACKENDS[implementation]


def exact(implementation: str | None, query: Any, key: Any, value: Any) -> str:
    """The backend for float32 arithmetic throughout: of "mosaic" the form with split operands, as of None where it runs."""
    if implementation is None:
        implementation = select(None, query, key, value).name
    return "mosaic_split" if implementation == "mosaic" else implementation
