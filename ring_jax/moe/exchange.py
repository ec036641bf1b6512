"""How tokens reach experts that are spread over ranks of a mesh axis, and how the results come back.

Each way is linear in the tokens, exact for any routing, and drops nothing:

    Here      the same tokens are on all ranks (decode): each runs its experts, one psum adds up; or all experts are here
    Gathered  tokens differ: all_gather, then a sum that is scattered (psum_scatter)
    Ragged    tokens differ: each goes once to every rank that holds one of its experts (ragged_all_to_all), see `moe.ragged`

Bytes, for T tokens a rank, C ranks and k experts a token: `Gathered` receives (C - 1) T rows. An all-to-all of
assignments would receive k T (C - 1) / C of them with even routing and needs room for k C T where all go to one rank;
`Ragged` sends a token once to a rank however many of its experts lie there, so it receives
T (C - 1) (1 - (1 - 1/C)^k) rows, never more than `Gathered`, into the same C T rows of memory. Its rate is lower (`_hardware`), so it pays
where C > k (0.63 of the rows and falling); with fewer ranks nearly every token goes everywhere. XLA runs ragged_all_to_all on
GPUs, not on CPUs. The room for C T rows is bounded by sending long sequences slice by slice (`slices`).
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
from jax import lax

from ring_jax._checks import check_choice
from ring_jax._hardware import HOPPER, Hardware
from ring_jax._mesh import Axis, axis_names
from ring_jax._vma import pcast_to

STRATEGIES = ("gather", "ragged")

# Rows that a rank makes room for at a time. With 2^17 rows of width 2048, x takes 0.5 GB in bfloat16, y 1 GB.
_ROWS = 2**17


@runtime_checkable
class Exchange(Protocol):
    """Tokens to the experts' ranks and sums back. With `tensor`, features of each expert are spread over that axis."""

    def send(self, x: jax.Array) -> jax.Array:
        """[T, ...] of the tokens here to [rows, ...] of those that the experts here may have to see."""
        ...

    def combine(self, y: jax.Array) -> jax.Array:
        """[rows, D], this rank's part of the rows' results, to [T, D], the results of the tokens here."""
        ...


def choose_strategy(strategy: str, ranks: int, per_token: int, platform: str) -> str:
    """The strategy that is asked for, or the faster one by `seconds_per_byte`.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: "ragged" where XLA cannot run it.
    """
    if strategy == "auto":
        cost = seconds_per_byte(ranks, per_token)
        return "ragged" if platform == "gpu" and cost["ragged"] < _GAIN * cost["gather"] else "gather"
    check_choice("strategy", strategy, ("auto", *STRATEGIES))
    if strategy == "ragged" and platform == "cpu":
        raise NotImplementedError(
            "strategy='ragged' cannot run here: XLA has no ragged_all_to_all on CPUs; use 'gather'"
        )
    return strategy


# The ragged exchange sorts rows and sends their numbers ahead: it must save so much.
_GAIN = 0.95


def seconds_per_byte(ranks: int, per_token: int, gpu: Hardware = HOPPER) -> dict[str, float]:
    """What each way takes for one byte of every token of a rank, one direction, routing even.

    Example:
        >>> {way: round(1e12 * x, 1) for way, x in seconds_per_byte(16, 8).items()}  # picoseconds
        {'gather': 100.0, 'ragged': 60.5}
    """
    met = 1 - (1 - 1 / ranks) ** per_token
    return {"gather": (ranks - 1) / gpu.gather_bytes_per_s, "ragged": (ranks - 1) * met / gpu.ragged_bytes_per_s}


def slices(tokens: int, ranks: int) -> int:
    """Parts to send one after the other, so that the room for their rows does not grow with the number of ranks."""
    return min(max(-(-tokens * ranks // _ROWS), 1), max(tokens, 1)) if ranks > 1 else 1


@dataclasses.dataclass(frozen=True)
class Here:
    """All experts are on this rank, or, with an axis, the same tokens are on all of its ranks."""

    axis: Axis | None = None
    tensor: Axis | None = None

    def send(self, x: jax.Array) -> jax.Array:
        return pcast_to(x, self._axes)

    def combine(self, y: jax.Array) -> jax.Array:
        return lax.psum(pcast_to(y, self._axes), self._axes) if self._axes else y

    @property
    def _axes(self) -> tuple[str, ...]:
        return (*axis_names(self.axis), *axis_names(self.tensor))


@dataclasses.dataclass(frozen=True)
class Gathered:
    """Every rank sees all tokens and adds up what its experts make of them."""

    axis: Axis
    tensor: Axis | None = None

    def send(self, x: jax.Array) -> jax.Array:
        # Cast first: the gradient's sum over the tensor axis then comes after its scatter, on fewer rows.
        x = pcast_to(x, (*axis_names(self.axis), *axis_names(self.tensor)))
        return lax.all_gather(x, self.axis, axis=0, tiled=True)

    def combine(self, y: jax.Array) -> jax.Array:
        y = lax.psum_scatter(pcast_to(y, axis_names(self.axis)), self.axis, scatter_dimension=0, tiled=True)
        return Here(tensor=self.tensor).combine(y)
