"""Which page of the pool belongs to whom: a free list and counts of references, plain Python without arrays.

A page holds the keys and values of `tokens` neighbouring positions of one text; ids are the same on every rank. Rows append
to pages and never change what they hold, so pages can be shared by all rows whose texts begin alike.
"""

from __future__ import annotations

TRASH = 0  # where padding and idle rows write


class Pages:
    """Pages 1 ... count - 1 of a pool; page 0 is trash.

    A page is free, held by at least one row, or idle: not held, but kept because the prefix cache knows what is in it.

    Args:
        count: pages of the pool, trash included.
        tokens: positions in a page.
    """

    def __init__(self, count: int, tokens: int):
        self.count, self.tokens = count, tokens
        self.references = [0] * count
        self._free = list(range(count - 1, TRASH, -1))

    @property
    def usable(self) -> int:
        """Pages that texts can have in all."""
        return self.count - 1

    @property
    def free(self) -> int:
        return len(self._free)

    def needed(self, positions: int) -> int:
        """Pages that so many positions take."""
        return -(-positions // self.tokens)

    def take(self) -> int:
        """A free page, held once."""
        page = self._free.pop()
        assert self.references[page] == 0
        self.references[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more row maps the page."""
        self.references[page] += 1

    def drop(self, page: int) -> bool:
        """One row fewer maps the page; whether none does now."""
        assert self.references[page] > 0
        self.references[page] -= 1
        return self.references[page] == 0

    def give(self, page: int) -> None:
        """A page that nobody holds is free again."""
        assert page != TRASH and self.references[page] == 0
        self._free.append(page)
