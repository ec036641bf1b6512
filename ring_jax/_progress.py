"""How far long loops of the library are: silent until somebody shows them.

A loop of the library says `for item in track(items, "load", unit="B", size=...)`. Under `shown()`, which the commands enter,
what takes longer than two seconds gets a bar with its rate in a terminal (tqdm, extra ``cli``), and elsewhere a plain line now
and then; without it, and with ``quiet=True``, nothing is printed.
"""

import contextlib
import contextvars
import importlib.util
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE, EVERY = 2.0, 10.0  # seconds before anything is shown; between plain lines

_shown: contextvars.ContextVar[bool] = contextvars.ContextVar("ring_jax_progress", default=False)


@contextlib.contextmanager
def shown(quiet: bool = False) -> Iterator[None]:
    """Within, loops of the library say how far they are, unless `quiet`."""
    token = _shown.set(not quiet)
    try:
        yield
    finally:
        _shown.reset(token)


def track(
    items: Iterable[T], what: str, *, unit: str, size: Callable[[T], float] = lambda _: 1, total: float | None = None
) -> Iterator[T]:
    """The items, one after the other.

    Args:
        items: what the loop goes over. what: in a word or two.
        unit: of `size`, the amount of an item: "B", "tokens". total: of all items; default: the sum, where their number is known.

    Example:
        >>> with shown(quiet=True):
        ...     sum(track([1, 2, 3], "add", unit="numbers"))
        6
    """
    if not _shown.get():
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = sum(map(size, items))
    terminal = sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None
    display = _bar(what, unit, total) if terminal else _Lines(what, unit, total)
    with contextlib.closing(display):
        for item in items:
            yield item
            display.update(size(item))


def _bar(what: str, unit: str, total: float | None) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=total, desc=what, unit=unit if unit == "B" else f" {unit}", unit_scale=True, delay=PATIENCE, leave=False
    )


class _Lines:
    """Plain lines for files and pipes: the first after two seconds, then every ten, and one at the end."""

    def __init__(self, what: str, unit: str, total: float | None):
        self.what, self.unit, self.total = what, unit, total
        self.begin, self.last, self.done = time.perf_counter(), 0.0, 0.0

    def update(self, amount: float) -> None:
        self.done += amount
        seconds = time.perf_counter() - self.begin
        if seconds >= (self.last + EVERY if self.last else PATIENCE):
            self.last = seconds
            self._print(seconds)

    def close(self) -> None:
        if self.last:
            self._print(time.perf_counter() - self.begin)

    def _print(self, seconds: float) -> None:
        of = "" if self.total is None else f" of {_amount(self.total)}"
        rate = _amount(self.done / max(seconds, 1e-9))
        print(
            f"{self.what}: {_amount(self.done)}{of} {self.unit} in {seconds:.0f} s, {rate} {self.unit}/s",
            file=sys.stderr,
            flush=True,
        )


def _amount(number: float) -> str:
    """With a thousands' prefix."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g}"
