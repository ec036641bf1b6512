"""What partitions share under which tokens and caches lie inside as they lie outside."""

from typing import Any


class Stay:
    """Nothing moves between entering and leaving."""

    def enter(self, x: Any) -> Any:
        """x: the tokens that lie here outside are those that are here inside."""
        return x

    def leave(self, y: Any) -> Any:
        """Inverse of `enter`."""
        return y

    def enter_rows(self, cache: Any) -> Any:
        """The cache: all rows are here."""
        return cache

    def leave_rows(self, cache: Any) -> Any:
        """Inverse of `enter_rows`."""
        return cache
