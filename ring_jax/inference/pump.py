"""Steps of an engine for those that await them, in a thread, one at a time whoever asks."""

from __future__ import annotations

import asyncio
from typing import Any


class Pump:
    """Runs `engine.step` while somebody waits for it. Of one event loop at a time."""

    def __init__(self, engine: Any):
        self._engine = engine
        self._task: asyncio.Task[Any] | None = None
        self._waiters: list[asyncio.Future[Any]] = []

    async def next_step(self) -> None:
        """Returns after one more step, which all that wait share."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiters.append(future)
        if self._task is None or self._task.done() or self._task.get_loop() is not loop:
            self._task = loop.create_task(self._run())
        await future

    async def _run(self) -> None:
        while self._waiters:
            try:
                if self._engine.busy:
                    await asyncio.to_thread(self._engine.step)
            except RuntimeError:
                pass  # the engine has died, and every request knows why
            finally:
                waiters, self._waiters = self._waiters, []
                for future in waiters:
                    if not future.done():
                        future.set_result(None)
            await asyncio.sleep(0)  # those who waited take their tokens, and ask for more
