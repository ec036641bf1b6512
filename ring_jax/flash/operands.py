"""What a block of attention is handed beside its arrays: one static value, and two bundles of per-row arrays.

They keep their shape from the public call to the kernel: nothing on the way takes them apart.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax

from ring_jax._checks import check_flag, check_number

# (out, lse): attention to some of the keys, which a block resumes or a merge joins.
Partial = tuple[jax.Array, jax.Array]
# (dq, dkv), float32.
Gradients = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class BlockOptions:
    """The static part of an attention call, whatever runs it.

    Attributes:
        scale: factor of the logits.
        logits_soft_cap: cap c > 0, for c * tanh(logits / c).
        deterministic: True for gradients that repeat bit by bit, False for the fastest; None for those that repeat
            unless that costs more than 10%.
    """

    scale: float
    logits_soft_cap: float | None = None
    deterministic: bool | None = None

    @classmethod
    def of_call(
        cls, head_size: int, scale: float | None, logits_soft_cap: float | None, deterministic: bool | None
    ) -> "BlockOptions":
        """From the arguments of a public call, checked; `scale` is head_size ** -0.5 by default."""
        in_query = "multiply a traced scale into the query instead"
        scale = head_size**-0.5 if scale is None else check_number("scale", scale, advice=in_query)
        if logits_soft_cap is not None:
            logits_soft_cap = check_number("logits_soft_cap", logits_soft_cap, above=0)
        return cls(scale, logits_soft_cap, check_flag("deterministic", deterministic, optional=True))


class Bounds(NamedTuple):
    """Which keys each query row sees: start <= s < end, int32 [B, T] each, neither decreasing along T. Of keys in P
    segments: [P, B, T], an interval of each segment."""

    start: jax.Array
    end: jax.Array


class RowGradients(NamedTuple):
    """What the gradients of a block need of its query rows.

    lse: the final one of all keys, not of this block's; -inf rows have zero gradient.
    delta: rowsum(dO . O) - dLSE. dout: dO, in the query's dtype.
    """

    lse: jax.Array
    delta: jax.Array
    dout: jax.Array
