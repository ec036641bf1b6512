"""Short pieces of several texts in one program: a plan's operations in another order, in which nothing can tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from ring_jax.inference.operations import Copy, Operation, Piece, Prefill, Restore, Save

Shape = Callable[[int, int], tuple[int, ...]]
Thing = tuple[str, int]  # a page, a row or a snapshot's slot, and its number


@dataclasses.dataclass
class _Group:
    """Runs `before` (copies, restored states), then all pieces at the same time, then `after` (saved states)."""

    shape: tuple[int, ...] = ()
    before: list[Operation] = dataclasses.field(default_factory=list)
    pieces: list[Piece] = dataclasses.field(default_factory=list)
    after: list[Operation] = dataclasses.field(default_factory=list)
    reads: set[Thing] = dataclasses.field(default_factory=set)
    writes: set[Thing] = dataclasses.field(default_factory=set)

    def conflicts(self, other: _Group) -> bool:
        """Whether their order matters."""
        return not (
            self.writes.isdisjoint(other.reads)
            and self.writes.isdisjoint(other.writes)
            and self.reads.isdisjoint(other.writes)
        )

    def add(self, other: _Group) -> None:
        self.before += other.before
        self.pieces += other.pieces
        self.after += other.after
        self.reads |= other.reads
        self.writes |= other.writes

    def operations(self) -> list[Operation]:
        return [*self.before, *([Prefill(tuple(self.pieces))] if self.pieces else ()), *self.after]


def together(operations: Iterable[Operation], page_tokens: int, shape: Shape) -> list[Operation]:
    """Copies, restores, saves and prefills of one piece each, in order; pieces of one shape in one program where it takes them and
    none builds on what another, or what runs in between, reads or writes.

    Args:
        shape: of the program for positions start ... stop - 1; its first number says how many pieces it takes.
    """
    groups: list[_Group] = []
    for unit in _units(operations, page_tokens, shape):
        joined = None
        for group in reversed(groups):
            if unit.conflicts(group):
                break
            if group.shape == unit.shape and len(group.pieces) < unit.shape[0]:
                joined = group
        if joined is None:
            groups.append(unit)
        else:
            joined.add(unit)
    return [operation for group in groups for operation in group.operations()]


def _units(operations: Iterable[Operation], page_tokens: int, shape: Shape) -> list[_Group]:
    """One piece each, with what comes before it and what is saved after it."""
    units = [_Group()]
    for operation in operations:
        if isinstance(operation, Save) or not units[-1].pieces:
            unit = units[-1]
        else:
            units.append(unit := _Group())
        match operation:
            case Copy(source, target):
                unit.before.append(operation)
                unit.reads.add(("page", source))
                unit.writes.add(("page", target))
            case Restore(slot, row):
                unit.before.append(operation)
                unit.reads.add(("slot", slot))
                unit.writes.add(("row", row))
            case Save(row, slot):
                unit.after.append(operation)
                unit.reads.add(("row", row))
                unit.writes.add(("slot", slot))
            case Prefill((piece,)):
                unit.pieces.append(piece)
                unit.shape = shape(piece.start, piece.stop)
                first, last = piece.start // page_tokens, -(-piece.stop // page_tokens)
                unit.reads.update(("page", page) for page in piece.pages[: -(-piece.start // page_tokens)])
                unit.writes.update(("page", page) for page in piece.pages[first:last])
                unit.writes.add(("row", piece.row))
            case _:
                raise AssertionError(operation)
    return units
