"""Sizes that programs are compiled for: few, so that all can be compiled ahead."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from ring_jax._checks import check_count
from ring_jax.inference.pool import Geometry
from ring_jax.models.qwen3_5.structure import Structure

LEAST_CHUNK = 64
_LONGEST_CHUNK, _LEAST_WIDTH = 8192, 16
_TOGETHER = 512  # padded tokens of several pieces: weights are read as long as 300 tokens are multiplied with them


@dataclasses.dataclass(frozen=True)
class Ladders:
    """Padded lengths of chunks and widths of page tables, each rung four times the one before; the last is what is ever needed.

    Fields:
        sizes, widths: ascending. page: tokens of a page. rows: texts that run at once.
    """

    sizes: tuple[int, ...]
    widths: tuple[int, ...]
    page: int
    rows: int

    @classmethod
    def of(cls, model: Structure, geometry: Geometry, chunk: int | None) -> Ladders:
        """For chunks of so many tokens, 8192 by default.

        Raises:
            ValueError: a chunk that the context's layout does not divide.
        """
        most, context = model.config.max_positions, None if model.sharding is None else model.sharding.context
        least = LEAST_CHUNK if context is None else context.padded_length(LEAST_CHUNK)
        if chunk is None:
            chunk = -(-min(_LONGEST_CHUNK, most) // least) * least
        elif check_count("chunk", chunk, 1) % least:
            raise ValueError(f"chunk must be a multiple of {least} (what the context's layout divides), got {chunk}")
        page = geometry.placement(model.sharding).tokens
        pages = -(-min(most, (geometry.pages - 1) * page) // page)
        widths = _ladder(pages, max(-(-chunk // page), _LEAST_WIDTH), 1)
        return cls(_ladder(chunk, least, least), widths, page, geometry.rows)

    @property
    def chunk(self) -> int:
        return self.sizes[-1]

    def size(self, tokens: int) -> int:
        """The padded length of a chunk."""
        return next(size for size in self.sizes if size >= tokens)

    def width(self, pages: int) -> int:
        """The width of a table."""
        return next(width for width in self.widths if width >= pages)

    def pieces(self, size: int, width: int) -> int:
        """How many pieces of this padded length and width of tables (0: no past) a program takes, whether there are as many or
        not: one alone is computed as it is among others. All together read no more pages than the longest text has."""
        among = (_TOGETHER // size, self.chunk // size, self.widths[-1] // max(width, 1), self.rows)
        return max(1, min(among))

    def shape(self, start: int, stop: int) -> tuple[int, int, int]:
        """The prefill program for positions start ... stop - 1: how many pieces it takes, their padded length, and the width of
        their tables, 0 where nothing is read through them."""
        size, width = self.size(stop - start), self.width(-(-stop // self.page)) if start else 0
        return self.pieces(size, width), size, width

    def has_whole(self, size: int) -> bool:
        """Whether chunks of this padded length that need no padding have a program of their own: long ones, which are worth it."""
        return size == self.chunk > self.sizes[0]

    def every_program(self) -> Iterator[tuple[Any, ...]]:
        """What `Programs` can be asked for: its name, and the sizes."""
        yield from (("save",), ("restore",), ("copy",))
        for width in self.widths:
            yield from (("decode", width, steady) for steady in (False, True))
        for size in self.sizes:
            for width in (0, *self.widths):
                yield "prefill", self.pieces(size, width), size, width, False
                if self.has_whole(size):
                    yield "prefill", self.pieces(size, width), size, width, True


def _ladder(most: int, least: int, multiple: int) -> tuple[int, ...]:
    """most, most / 4, ... down to `least`, ascending, rounded up to multiples."""
    sizes = [most]
    while sizes[-1] > least:
        quarter = -(-sizes[-1] // (4 * multiple)) * multiple
        sizes.append(max(quarter, least))
    return tuple(sizes[::-1])
