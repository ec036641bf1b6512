"""How far a command is: a bar over its steps in a terminal, elsewhere a line for each step."""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any


class Progress:
    """Announces each step, and says how long it took.

    In a terminal a bar counts the steps that are done and names the one that runs; other readers (a file, a pipe) get the
    name of a step when it begins, and its time on the same line when it ends.

    Args:
        steps: how many there will be.
    """

    def __init__(self, steps: int):
        self._bar: Any = None
        self._over = threading.Event()
        if sys.stdout.isatty() and sys.stderr.isatty():
            from tqdm import tqdm

            form = "{desc:<32} {percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt} steps, {elapsed}"
            columns = shutil.get_terminal_size().columns - 1  # tqdm itself hides where a terminal tells no width
            self._bar = tqdm(total=steps, bar_format=form, leave=False, ncols=columns)
            self._ticker = threading.Thread(target=self._tick, daemon=True)
            self._ticker.start()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bar away, so that others can write to the terminal."""
        self._over.set()
        if self._bar is not None:
            self._ticker.join()
            self._bar.close()
            self._bar = None

    def line(self, text: str) -> None:
        """Prints a line, above the bar."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)

    @contextlib.contextmanager
    def step(self, label: str, what: str, steps: int = 1) -> Iterator["Step"]:
        """A step, or several that the caller counts with `Step.advance`."""
        step = Step(self, steps)
        if self._bar is None:
            print(f"{label:<9} {what} ...", end="", flush=True)
        else:
            self._bar.set_description_str(f"{label} {what}")
        try:
            yield step
        except BaseException:
            if self._bar is None:
                print(flush=True)  # what follows has a line of its own
            raise
        step.advance(steps - step.done)
        if self._bar is None:
            print(f" {step.report()}", flush=True)
        else:
            self._bar.write(f"{label:<9} {what}: {step.report()}")

    def count(self, steps: int) -> None:
        """`steps` more are done."""
        if self._bar is not None:
            self._bar.update(steps)

    def _tick(self) -> None:
        bar = self._bar
        while not self._over.wait(0.5):
            bar.refresh()  # the time goes on while a step runs


class Step:
    """A step that runs; its time stands still once `seconds` is set."""

    def __init__(self, progress: Progress, steps: int):
        self._progress, self._begin, self._steps = progress, time.perf_counter(), steps
        self.done = 0
        self.seconds: float | None = None
        self.note = ""

    def advance(self, steps: int = 1) -> None:
        self._progress.count(steps)
        self.done += steps

    def stop(self) -> float:
        """The seconds since the step began, once and for all."""
        if self.seconds is None:
            self.seconds = time.perf_counter() - self._begin
        return self.seconds

    def report(self) -> str:
        return f"{self.stop():.1f} s" + (f", {self.note}" if self.note else "")
