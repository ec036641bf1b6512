"""Engines of several processes that decide alike: texts enter on the first and reach all, and digests are compared.

Plans are functions of what came in and of the tokens that the devices gave, so it is enough that all processes take in the
same texts before the same step. Messages go through the key-value store of jax's coordination service: nothing waits for the devices.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax

EVERY = 64  # steps between two comparisons where nothing comes in
_POLL = 5000  # milliseconds between two looks at Ctrl-C
_ENGINES: Counter[tuple[int, ...]] = Counter()  # processes make their engines in the same order


class Sharing:
    """What one engine says to those of the other processes.

    Args:
        first: whether texts enter on the first process only; all processes make the same calls otherwise, and only digests are
            compared.
        timeout: seconds to wait for another process's digest. For the first one's next step the others wait as long as it lives:
            it may have nothing to do.
        processes: whose engines these are, this one's among them.
    """

    def __init__(self, *, first: bool, timeout: float, processes: Sequence[int]):
        from jax._src import distributed

        self._client: Any = distributed.global_state.client
        if self._client is None:
            raise RuntimeError(
                "several processes without a coordination service: call ring_jax.distributed.initialize()"
            )
        self._first, self._timeout, self._processes = first, int(1000 * timeout), tuple(processes)
        self._here = jax.process_index()
        number = _ENGINES[self._processes]
        _ENGINES[self._processes] += 1
        self._name, self._step = f"ring_jax/engine/{'.'.join(map(str, self._processes))}/{number}", 0
        self._digest = hashlib.blake2b(digest_size=16)
        self._old: list[str] = []  # keys that others have read when all have come further
        self._left = False
        if first and self.leads:
            atexit.register(self.leave)

    @property
    def leads(self) -> bool:
        return self._here == self._processes[0]

    @property
    def enters_here(self) -> bool:
        """Whether texts may be submitted on this process."""
        return self.leads or not self._first

    def share(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages of the first process, on all; what all have taken in and decided so far is the same then.

        Raises:
            RuntimeError: another process has decided otherwise, or said nothing in time.
        """
        self._step += 1
        if self._first:
            messages = self._told(messages)
        whats = [message["what"] for message in messages]
        if "reset" in whats:
            self._digest = hashlib.blake2b(digest_size=16)
        self._left = "close" in whats
        if messages:
            self.note(messages)
        if self._step % EVERY == 0 or (messages and not self._first):
            self._compare()
        return messages

    def note(self, decision: Any) -> None:
        """Adds to the digest what every process has to agree on."""
        self._digest.update(repr(decision).encode())

    def least(self, value: int) -> int:
        """The least of the processes' values."""
        self._step += 1
        base = f"{self._name}/least/{self._step}"
        self._set(f"{base}/{self._here}", str(value))
        return min(int(self._wait(f"{base}/{process}", process)) for process in self._processes)

    def leave(self) -> None:
        """From the first process, whose engine has died or which ends: there are no more steps."""
        if not self._left:
            self._left = True
            self._step += 1
            with contextlib.suppress(RuntimeError):  # the service has ended before, and so have all that asked it
                self._say([{"what": "close"}])

    def _told(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages of this step, which travel with the digest of all before."""
        if self.leads:
            self._say(messages)
            return messages
        digest, messages = json.loads(self._wait(f"{self._name}/step/{self._step}", None))
        if digest != self._digest.hexdigest() and all(each["what"] not in ("reset", "close") for each in messages):
            self._differ(self._processes[0])
        return messages

    def _say(self, messages: list[dict[str, Any]]) -> None:
        self._set(f"{self._name}/step/{self._step}", json.dumps([self._digest.hexdigest(), messages]))

    def _set(self, key: str, value: str) -> None:
        self._client.key_value_set_bytes(key, value.encode())
        self._old.append(key)

    def _compare(self) -> None:
        """Raises where another process has decided otherwise. All have come this far then, so older messages can go."""
        base, own = f"{self._name}/digest/{self._step}", self._digest.hexdigest()
        old, self._old = self._old, []
        self._set(f"{base}/{self._here}", own)
        for process in self._processes:
            if self._wait(f"{base}/{process}", process).decode() != own:
                self._differ(process)
        for key in old:
            self._client.key_value_delete(key)

    def _differ(self, process: int) -> None:
        raise RuntimeError(
            f"process {process} and process {self._here} have taken different decisions before step {self._step}: "
            "do all processes make the same calls, or does entry='first' serve you?"
        )

    def _wait(self, key: str, process: int | None) -> bytes:
        """What another process says there, in time where it is named."""
        for waited in itertools.count(0, _POLL):
            left = _POLL if process is None else min(_POLL, self._timeout - waited)
            if left <= 0:
                raise RuntimeError(
                    f"process {process} has not come to step {self._step} within {self._timeout / 1000:g} s (timeout): is it "
                    "alive, and does it make the same calls?"
                )
            try:
                return self._client.blocking_key_value_get_bytes(key, left)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        raise AssertionError


def processes_of(mesh: Any) -> tuple[int, ...]:
    """Those whose devices are in a mesh."""
    return tuple(sorted({device.process_index for device in mesh.devices.flat}))


def plain(operation: Any) -> Sequence[Any]:
    """An operation as numbers, without the texts."""
    kind = type(operation).__name__
    if hasattr(operation, "pieces"):
        return kind, [(p.row, p.start, p.stop, p.pages) for p in operation.pieces]
    if hasattr(operation, "members"):
        return kind, operation.steps, [(m.row, m.enters, m.position, m.token, m.pages) for m in operation.members]
    return kind, [value for value in vars(operation).values() if isinstance(value, (int, tuple))]
