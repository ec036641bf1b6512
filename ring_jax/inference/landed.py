"""What a decode gave its rows, as the host reads it a step later."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ring_jax.inference.programs import Written
from ring_jax.inference.requests import Request


def depart(written: Written) -> None:
    """Starts the copy of what every decode is asked for."""
    for array in (written.count, written.drawn.token, written.drawn.finite, written.drawn.log_probability):
        array.copy_to_host_async()


class Landed:
    """A decode's tokens. Waits for the devices.

    Fields:
        tokens: of each of `rows`, those that it gave. good: whether the row's logits were finite.
    """

    def __init__(self, written: Written, rows: Sequence[int]):
        count, token = np.asarray(written.count), np.asarray(written.drawn.token)
        finite = np.asarray(written.drawn.finite)
        self._chosen, self._drawn = np.asarray(written.drawn.log_probability), written.drawn
        self.good = [bool(finite[: count[row], row].all()) for row in rows]
        # The last of a row whose logits were not finite is no token.
        kept = [int(count[row]) - (not fine) for row, fine in zip(rows, self.good, strict=True)]
        self.tokens = [[int(t) for t in token[:n, row]] for row, n in zip(rows, kept, strict=True)]

    def give(self, request: Request, row: int, tokens: Sequence[int]) -> None:
        """The first so many tokens of a row, with their log-probabilities."""
        new = len(tokens)
        request.tokens += tokens
        request.log_probabilities += [float(x) for x in self._chosen[:new, row]]
        if request.top_count and new:
            ids, values = np.asarray(self._drawn.top_tokens), np.asarray(self._drawn.top_log_probabilities)
            for step in range(new):
                pairs = zip(ids[step, row], values[step, row], strict=True)
                request.top.append([(int(i), float(x)) for i, x in pairs][: request.top_count])
