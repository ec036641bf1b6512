"""From plans to what programs take: arrays of sizes that are compiled for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ring_jax.inference.control import COLUMNS, pack
from ring_jax.inference.ladders import Ladders
from ring_jax.inference.operations import Decode, Piece
from ring_jax.inference.requests import Request


class Operands:
    """Remembers what the rows that run have been given, so that a decode costs the host what is new."""

    def __init__(self, ladders: Ladders):
        self._ladders = ladders
        self._table = np.zeros((ladders.rows, ladders.widths[-1]), np.int32)
        self._filled = [0] * ladders.rows
        self._control = np.zeros((ladders.rows, COLUMNS), np.int32)
        self._easy = [True] * ladders.rows

    def prefill(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Arguments of `Programs.prefill`; places without a piece have no tokens, and a row that is not there."""
        ladders = self._ladders
        count, size, width = ladders.shape(pieces[0].start, pieces[0].stop)
        tokens, table = (
            np.zeros((count, size), np.int32),
            np.zeros((count, width or -(-size // ladders.page)), np.int32),
        )
        start, length, row = np.zeros((3, count), np.int32)
        row[:] = ladders.rows
        for i, piece in enumerate(pieces):
            new = piece.text.tokens[piece.start : piece.stop]
            pages = piece.pages[: -(-piece.stop // ladders.page)]
            tokens[i, : len(new)], table[i, : len(pages)] = new, pages
            start[i], length[i], row[i] = piece.start, len(new), piece.row
        whole = ladders.has_whole(size) and int(length[0]) == size
        return {"tokens": tokens, "start": start, "length": length, "row": row, "table": table, "whole": whole}

    def decode(self, decode: Decode, request: Callable[[Any], Request]) -> dict[str, Any]:
        """Arguments of `Programs.decode`."""
        self._control[:, 0:2] = 0
        longest, steady = 1, decode.full
        for member in decode.members:
            row, pages = member.row, member.pages
            if member.enters:
                asked = request(member.text)
                self._control[row] = pack(member, asked.sampling, asked.seed, asked.top_count)
                self._easy[row] = asked.top_count == 0 and not asked.sampling.cuts
                self._filled[row] = 0
            self._control[row, 0:2] = 1, member.enters
            self._table[row, self._filled[row] : len(pages)] = pages[self._filled[row] :]
            self._filled[row] = len(pages)
            longest = max(longest, len(pages))
            steady &= self._easy[row] and not (member.enters and member.position == 0)
        table = np.ascontiguousarray(self._table[:, : self._ladders.width(longest)])
        return {"control": self._control.copy(), "table": table, "steady": steady}
