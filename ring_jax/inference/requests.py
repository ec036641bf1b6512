"""A text in an engine, as its user sees it, and what an engine counts."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import numpy as np

from ring_jax._checks import check_count, check_instance
from ring_jax.inference import prompts
from ring_jax.inference.control import STOPS
from ring_jax.inference.operations import State, Text
from ring_jax.inference.sampling import MOST_TOP, Sampling
from ring_jax.inference.scheduler import Scheduler


@dataclasses.dataclass(eq=False)
class Request:
    """A text that the engine continues: what `Engine.submit` returns. Iterate over it, with `for` or `async for`, for its tokens
    as they come; that runs the engine, with all other texts.

    Fields:
        tokens: new ids so far. log_probabilities: of each, before temperature and cuts.
        top: for each new token the most likely ones and their log-probabilities, as many as were asked for.
        error: why it ended, where that is an error.
    """

    text: Text
    sampling: Sampling
    seed: int
    top_count: int
    engine: Any
    number: int = -1
    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probabilities: list[float] = dataclasses.field(default_factory=list)
    top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self.text.state is State.DONE or self.error is not None

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length", "cancelled" or "error"; None while it runs."""
        return "error" if self.error is not None else self.text.finish or None

    @property
    def prompt_tokens(self) -> int:
        return self.text.prompt

    @property
    def hit_tokens(self) -> int | None:
        """Tokens of the prompt that earlier texts had computed; None before it is known."""
        return None if self.text.hit < 0 else self.text.hit

    @property
    def miss_reason(self) -> str:
        """Why no more: "" where all was hit that can be, else "no_kv", "no_snapshot", "evicted", "salt" or "too_short"."""
        return self.text.reason

    @property
    def prefilled_tokens(self) -> int:
        """Tokens that were computed before the first new one, again where it was preempted."""
        return self.text.prefilled

    def cancel(self) -> None:
        self.engine.cancel(self)

    def __iter__(self) -> Iterator[int]:
        given = 0
        while True:
            while given < len(self.tokens):
                given += 1
                yield self.tokens[given - 1]
            if self.done:
                break
            self.engine.step()
        self._raise()

    async def __aiter__(self) -> AsyncIterator[int]:
        given = 0
        while True:
            while given < len(self.tokens):
                given += 1
                yield self.tokens[given - 1]
            if self.done:
                break
            await self.engine.pump.next_step()
        self._raise()

    def _raise(self) -> None:
        if self.error is not None:
            raise RuntimeError(f"this text ended with an error: {self.error}") from self.error

    def __repr__(self) -> str:
        return (
            f"Request(prompt_tokens={self.prompt_tokens}, tokens={len(self.tokens)}, hit_tokens={self.hit_tokens}, "
            f"finish_reason={self.finish_reason!r})"
        )


@dataclasses.dataclass(frozen=True)
class Stats:
    """What an engine has done since it began or was reset.

    Fields:
        requests, finished: texts. prompt_tokens, hit_tokens, prefilled_tokens: of those admitted. new_tokens.
        prefills: programs that prefilled them; short prompts share one.
        misses: texts by why they did not hit more.
        pages, pages_held, pages_cached: of the pool; held by running texts, and kept for later ones.
        snapshots, snapshots_kept, snapshots_refused, evicted_pages, evicted_snapshots, preemptions.
        programs: how many were run, each compiled at most once. steps, seconds, seconds_waiting: of `step`, and of that
            waiting for the devices: the rest is the host's.
    """

    requests: int
    finished: int
    prompt_tokens: int
    hit_tokens: int
    prefilled_tokens: int
    prefills: int
    new_tokens: int
    misses: dict[str, int]
    pages: int
    pages_held: int
    pages_cached: int
    snapshots: int
    snapshots_kept: int
    snapshots_refused: int
    evicted_pages: int
    evicted_snapshots: int
    preemptions: int
    programs: int
    steps: int
    seconds: float
    seconds_waiting: float

    @classmethod
    def _of(cls, scheduler: Scheduler, counts: Mapping[str, Any], misses: Mapping[str, int], programs: int) -> Stats:
        """From an engine's parts."""
        prefixes = scheduler.prefixes
        return cls(
            requests=counts["requests"], finished=counts["finished"], prompt_tokens=counts["prompt"],
            hit_tokens=counts["hit"], prefilled_tokens=counts["prefilled"], prefills=counts["prefills"],
            new_tokens=counts["new"], misses=dict(misses),
            pages=scheduler.pages.usable, pages_held=scheduler.pages.usable - prefixes.available, pages_cached=prefixes.idle,
            snapshots=prefixes.slots, snapshots_kept=len(prefixes.snapshots), snapshots_refused=prefixes.refused_snapshots,
            evicted_pages=prefixes.evicted_pages, evicted_snapshots=prefixes.evicted_snapshots,
            preemptions=scheduler.preemptions, programs=programs, steps=counts["steps"],
            seconds=counts["seconds"], seconds_waiting=counts["waiting"],
        )  # fmt: skip


def make_request(
    engine: Any,
    capacity: int,
    tokens: Any,
    max_new_tokens: Any,
    sampling: Any,
    seed: Any,
    stop_ids: Any,
    checkpoints: Any,
    top_log_probabilities: Any,
    salt: Any,
) -> Request:
    """A request of an engine whose pool holds texts of `capacity` tokens; raises as `Engine.submit` says."""
    row = prompts.check_prompt("tokens", tokens, engine.config)
    check_count("max_new_tokens", max_new_tokens, 1)
    check_instance("sampling", sampling, Sampling, "a ring_jax.inference.Sampling")
    check_count("seed", seed, -(2**63), 2**63 - 1)
    check_count("top_log_probabilities", top_log_probabilities, 0, MOST_TOP)
    check_instance("salt", salt, str, "a string")
    stops = prompts.check_stop_ids(stop_ids, engine.config)
    points = tuple(check_count("a checkpoint", point, 1, len(row)) for point in checkpoints)
    limit = len(row) + int(max_new_tokens)
    prompts.check_length(len(row), max_new_tokens, engine.config)
    if limit > capacity:
        raise ValueError(
            f"a prompt of {len(row):,} tokens and {max_new_tokens:,} new ones need room for {limit:,}, the pool has room for "
            f"{capacity:,}: give the engine more memory (or pages)"
        )
    buffer = np.zeros(limit, np.int32)
    buffer[: len(row)] = row
    text = Text(buffer, len(row), stops, len(stops) <= STOPS, points, salt.encode())
    return Request(text, sampling, int(seed), int(top_log_probabilities), engine)


def message(what: str, request: Request | None) -> dict[str, Any]:
    """What another process has to know to take in, or cancel, the same text; "reset" and "close" have none."""
    if request is None:
        return {"what": what}
    if what == "cancel":
        return {"what": what, "number": request.number}
    text, how = request.text, request.sampling
    return {
        "what": what,
        "number": request.number,
        "tokens": text.tokens[: text.prompt].tolist(),
        "max_new_tokens": text.limit - text.prompt,
        "how": [float(how.temperature), None if how.top_k is None else int(how.top_k), float(how.top_p)],
        "seed": request.seed,
        "stop_ids": sorted(text.stops),
        "checkpoints": list(text.checkpoints),
        "top_log_probabilities": request.top_count,
        "salt": text.salt.decode(),
    }
