"""What one launch of the convolution kernels works on, and how documents are told to them. See `conv_kernel`."""

import dataclasses

import jax.experimental.pallas as pl

THREADS = 128
NORM_EPSILON = 1e-6
FLAG_CONTINUES, FLAG_STARTS, FLAG_FIRST, FLAG_PADDING = range(4)  # FIRST: the first document, which the tail precedes
AHEAD = 16  # tokens that a flag looks at; times FLAG_AHEAD it is set where any of them has one
FLAG_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class Part:
    """q, k or v.

    Fields:
        heads, head_size: of this part; where it has members, key heads.
        norm: whether its heads are l2-normalised.
        first_head: where it begins in an array that holds all parts.
        column: where inputs lie by key heads [B, T, K, P], its first column in each; else None.
        members: of v, where inputs lie so: value heads that share a key head. Its other arrays are [..., K, members, head_size].
    """

    heads: int
    head_size: int
    norm: bool
    first_head: int
    column: int | None = None
    members: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the last axes of its own arrays."""
        return self.heads, *(() if self.members is None else (self.members,)), self.head_size


@dataclasses.dataclass(frozen=True)
class Problem:
    """One launch.

    Fields:
        width: W, taps of the filter.
        rows, unroll, vector, prefetch: see `ConvConfig`.
        tail, flags: whether these operands are there.
        joint_inputs, joint_weights: whether one array holds all parts, of the gradients too.
    """

    batch: int
    time: int
    width: int
    parts: tuple[Part, ...]
    rows: int
    unroll: int
    vector: int
    prefetch: bool
    tail: bool
    flags: bool
    joint_inputs: bool = False
    joint_weights: bool = False

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.time, self.rows)

    def heads_per_block(self, part: Part) -> int:
        return THREADS * self.vector // part.head_size

    def blocks(self, part: Part) -> int:
        return pl.cdiv(part.heads, self.heads_per_block(part)) * (part.members or 1)

    @property
    def programs(self) -> int:
        return self.batch * self.tiles * sum(self.blocks(part) for part in self.parts)
