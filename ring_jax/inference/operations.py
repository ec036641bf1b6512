"""What a plan is made of: texts, and the operations that the devices run for them, in order. Plain Python."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np

from ring_jax.inference.prefixes import Node


class State(enum.Enum):
    """Where a text is."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


@dataclasses.dataclass(eq=False)
class Text:
    """A prompt, and what is written after it.

    Fields:
        tokens: int32 [limit], of which `length` are known; the first `prompt` of them were given.
        stops: tokens that end it; `watched` where a decode knows them all and ends the row by itself.
        checkpoints: positions where a chunk has to end. salt: texts of another salt share nothing.
        finish: why it ended, "" before: "stop", "length", "cancelled" or "error".
        hit, keys, reason: what the prefix cache had when it was admitted first, see `Hit`.
        row, pages: where it lies while it runs. computed: positions whose keys the planned operations have written.
        ahead: decode steps planned for it whose tokens are not known yet.
        node, registered: the last of its pages that the prefix cache knows, and how many it knows; None where another row
            made the same page known first, after which its pages stay its own.
    """

    tokens: np.ndarray
    prompt: int
    stops: frozenset[int] = frozenset()
    watched: bool = True
    checkpoints: tuple[int, ...] = ()
    salt: bytes = b""
    state: State = State.WAITING
    length: int = 0
    finish: str = ""
    hit: int = -1
    keys: int = 0
    reason: str = ""
    prefilled: int = 0
    preempted: int = 0
    row: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    ahead: int = 0
    entered: bool = False
    junction: int = 0
    node: Node | None = None
    registered: int = 0

    def __post_init__(self) -> None:
        self.length = self.prompt

    @property
    def limit(self) -> int:
        return len(self.tokens)

    @property
    def known(self) -> np.ndarray:
        return self.tokens[: self.length]


@dataclasses.dataclass(frozen=True)
class Copy:
    """Copies page `source` to `target`, keys of all layers."""

    source: int
    target: int


@dataclasses.dataclass(frozen=True)
class Restore:
    """The states of `row` become those of snapshot `slot`."""

    slot: int
    row: int


@dataclasses.dataclass(frozen=True)
class Save:
    """Snapshot `slot` becomes the states of `row`."""

    row: int
    slot: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """Positions start ... stop - 1 of a text; its states are zero before position 0."""

    row: int
    text: Text
    start: int
    stop: int
    pages: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Prefill:
    """Pieces of different texts, none of which reads what another writes."""

    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class Member:
    """A row of a decode. One that `enters` begins with `token` at `position`; others go on where they are."""

    row: int
    text: Text
    pages: tuple[int, ...]
    enters: bool
    position: int
    token: int


@dataclasses.dataclass(frozen=True)
class Decode:
    """Up to `steps` new tokens for each member; a row ends by itself at a stop or at its limit. Other rows rest.

    `full`: some member has room for all of them."""

    members: tuple[Member, ...]
    steps: int
    full: bool


Operation = Copy | Restore | Save | Prefill | Decode
