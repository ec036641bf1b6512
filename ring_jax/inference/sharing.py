"""Engines of several processes that decide alike: texts enter on the first and reach all, and digests are compared.

Plans are functions of what came in and of the tokens that the devices gave, so it is enough that all processes take in the
same texts before the same step. Messages go through the key-value store of jax's coordination service: nothing waits for the devices.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Any

import jax

EVERY = 64  # steps between two comparisons
_ENGINES = itertools.count()  # processes make their engines in the same order


class Sharing:
    """What one engine says to those of the other processes.

    Args:
        first: whether texts enter on the first process only; all processes make the same calls otherwise, and only digests are
            compared.
        timeout: seconds to wait for another process.
    """

    def __init__(self, *, first: bool, timeout: float):
        from jax._src import distributed

        self._client: Any = distributed.global_state.client
        if self._client is None:
            raise RuntimeError(
                "several processes without a coordination service: call ring_jax.distributed.initialize()"
            )
        self._first, self._timeout = first, int(1000 * timeout)
        self._name, self._step = f"ring_jax/engine/{next(_ENGINES)}", 0
        self._digest = hashlib.blake2b(digest_size=16)

    @property
    def leads(self) -> bool:
        return jax.process_index() == 0

    @property
    def enters_here(self) -> bool:
        """Whether texts may be submitted on this process."""
        return self.leads or not self._first

    def share(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages of the first process, on all."""
        self._step += 1
        if self._step % EVERY == 0:
            self._compare()
        if not self._first:
            return messages
        key = f"{self._name}/step/{self._step}"
        if self.leads:
            self._client.key_value_set_bytes(key, json.dumps(messages).encode())
            return messages
        return json.loads(self._client.blocking_key_value_get_bytes(key, self._timeout))

    def note(self, decision: Any) -> None:
        """Adds to the digest what every process has to agree on."""
        self._digest.update(repr(decision).encode())

    def _compare(self) -> None:
        """Raises RuntimeError where another process has decided otherwise. All have come this far then, so older messages can go."""
        base, own = f"{self._name}/digest/{self._step}", self._digest.hexdigest()
        self._client.key_value_set(f"{base}/{jax.process_index()}", own)
        for process in range(jax.process_count()):
            other = self._client.blocking_key_value_get(f"{base}/{process}", self._timeout)
            if other != own:
                raise RuntimeError(
                    f"process {process} and process {jax.process_index()} have taken different decisions within the last {EVERY} "
                    f"steps before step {self._step}: do all processes make the same calls, or does entry='first' serve you?"
                )
        if self.leads and self._step > EVERY:
            for step in range(self._step - 2 * EVERY + 1, self._step - EVERY + 1):
                self._client.key_value_delete(f"{self._name}/step/{step}")
            self._client.key_value_delete(f"{self._name}/digest/{self._step - EVERY}")


def plain(operation: Any) -> Sequence[Any]:
    """An operation as numbers, without the texts."""
    kind = type(operation).__name__
    if hasattr(operation, "members"):
        return kind, operation.steps, [(m.row, m.enters, m.position, m.token, m.pages) for m in operation.members]
    return kind, [value for value in vars(operation).values() if isinstance(value, (int, tuple))]
