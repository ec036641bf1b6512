"""Many texts at once on one model: they come and go, and what earlier ones have computed is used again.

The engine puts the scheduler's plans onto the devices. A decode is read one step late, so that the host plans while the
devices work. Whatever changes from text to text is an array: after `warmup` nothing is compiled again.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ring_jax._checks import check_choice, check_count, check_instance, check_number
from ring_jax.inference import prompts
from ring_jax.inference.ladders import Ladders
from ring_jax.inference.landed import Landed, depart
from ring_jax.inference.operands import Operands
from ring_jax.inference.operations import Copy, Decode, Prefill, Restore, Save, State, Text
from ring_jax.inference.pool import choose_geometry, default_memory
from ring_jax.inference.programs import Programs
from ring_jax.inference.pump import Pump
from ring_jax.inference.requests import Request, Stats, make_request, message
from ring_jax.inference.sampling import Sampling
from ring_jax.inference.scheduler import Scheduler
from ring_jax.inference.sharing import Sharing, plain, processes_of
from ring_jax.models.qwen3_5.checks import check_has_parameters
from ring_jax.models.qwen3_5.structure import Structure

GREEDY = Sampling()


class Engine:
    """Continues many texts at once, with chunked prefill, a prefix cache and continuous batching.

    Args:
        model: a `ring_jax.models.qwen3_5.Qwen3_5`, on one device or over a mesh. Data ranks all do the same.
        rows: texts that run at once; more wait.
        chunk: tokens of a prompt that are computed at a time, between two decodes of the texts that run.
        memory: bytes on each device for keys, states and snapshots. Default: most of what a GPU has left, 512 MiB in all on
            CPUs; never more than `rows` texts of the model's length take four times over.
        snapshot_fraction: the snapshots' part of it.
        pages, snapshots: instead of `memory`, how many of each.
        page: tokens of a page on one context rank.
        decode_steps: tokens of each text between two looks of the host.
        snapshot_every: tokens between snapshots that are kept even where others have to go; a multiple of `chunk`.
        entry: where texts enter if there are several processes. "all": every process makes the same calls in the same order. "first": the
            first makes them, the others call `follow`; all call `warmup`, before. Either way decisions and tokens are compared.
        timeout: seconds that a process waits for another's; for texts to come `follow` waits as long as the first process lives.

    Raises:
        TypeError, ValueError: no such model, or sizes that do not fit together.

    Example:
        >>> from ring_jax.data import passkey
        >>> from ring_jax.models.qwen3_5 import Qwen3_5
        >>> engine = Engine(Qwen3_5.from_pretrained(passkey.MODEL), rows=2, chunk=64, pages=8, snapshots=4)
        >>> first = engine.submit(list(b"Once upon a time"), max_new_tokens=2)
        >>> engine.run()
        >>> len(first.tokens), first.hit_tokens
        (2, 0)
        >>> again = engine.submit(list(b"Once upon a time"), max_new_tokens=2)
        >>> list(again) == first.tokens, again.hit_tokens
        (True, 15)
    """

    def __init__(
        self,
        model: Any,
        *,
        rows: int = 8,
        chunk: int | None = None,
        memory: int | None = None,
        snapshot_fraction: float = 0.15,
        pages: int | None = None,
        snapshots: int | None = None,
        page: int | None = None,
        decode_steps: int = 8,
        snapshot_every: int | None = None,
        entry: str = "all",
        timeout: float = 300.0,
    ):
        self.config = prompts.config_of(model)
        check_count("rows", rows, 1)
        check_count("decode_steps", decode_steps, 1)
        check_number("snapshot_fraction", snapshot_fraction, low=0, high=1)
        structure, params = model.split()
        check_has_parameters(params)
        self._model = _alone_on_data(structure)
        check_choice("entry", entry, ("all", "first"))
        processes = (0,) if structure.sharding is None else processes_of(structure.sharding.resolve_mesh())
        self._sharing: Sharing | None = None
        if len(processes) > 1:
            self._sharing = Sharing(first=entry == "first", timeout=timeout, processes=processes)
            if memory is None and pages is None:
                memory = self._sharing.least(default_memory(self._model))
        self.geometry = choose_geometry(
            self._model, rows=rows, page=page, pages=pages, slots=snapshots, memory=memory, fraction=snapshot_fraction
        )
        self._ladders = Ladders.of(self._model, self.geometry, chunk)
        self.chunk = self._ladders.chunk
        self.decode_steps = decode_steps
        every = max(8192 // self.chunk, 1) * self.chunk if snapshot_every is None else snapshot_every
        if check_count("snapshot_every", every, 1) % self.chunk:
            raise ValueError(f"snapshot_every must be a multiple of chunk={self.chunk}, got {every}")
        self.snapshot_every = every
        self._programs = Programs(self._model, params, self.geometry, decode_steps)
        self._lock = threading.RLock()
        self._warm, self._known = False, 0
        self.pump = Pump(self)
        self._number, self._closed = 0, False
        self.reset()

    # -- what users call -------------------------------------------------------------------------

    def submit(
        self,
        tokens: Sequence[int] | np.ndarray,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        checkpoints: Sequence[int] = (),
        top_log_probabilities: int = 0,
        salt: str = "",
    ) -> Request:
        """Takes a text in; the next steps continue it.

        Args:
            tokens: ids of the prompt, at least one.
            max_new_tokens: at most so many more.
            sampling, seed: how they are drawn; equal seeds give equal texts, whatever else runs.
            stop_ids: tokens that end it; default: the config's `eos_token_ids`.
            checkpoints: positions in the prompt where a later text may part from it (the end of a system prompt): it can go on
                there exactly. Positions where texts have parted before are found without.
            top_log_probabilities: give those of so many of the most likely tokens at each step, at most 20.
            salt: texts of different salts never use each other's keys.

        Raises:
            TypeError: no token ids. ValueError: ids outside of the vocabulary, or more tokens than the model has positions or
                the pool has room for. RuntimeError: the engine has died; `reset` revives it.
        """
        self._check_entry()
        self._check_alive()
        options = max_new_tokens, sampling, seed, stop_ids, checkpoints, top_log_probabilities, salt
        request = make_request(self, self._scheduler.capacity, tokens, *options)
        request.number, self._number = self._number, self._number + 1
        self._inbox.append(("submit", request))
        return request

    def cancel(self, request: Request) -> None:
        """Ends a text at the next step; what is known of it stays cached."""
        check_instance("request", request, Request, "a Request of this engine's submit")
        self._check_entry()
        self._inbox.append(("cancel", request))

    def follow(self) -> None:
        """On every process but the first, with entry="first": takes its steps until it calls `close`."""
        if self._sharing is None or self._sharing.enters_here:
            raise RuntimeError("follow() is for processes other than the first, of an engine with entry='first'")
        self._closed = False
        while not self._closed:
            self.step()

    def close(self) -> None:
        """Ends `follow` on the other processes; texts that have not ended are cancelled."""
        self._check_entry()
        if self._dead is not None:
            if self._sharing is not None:
                self._sharing.leave()
            return
        for request in [*self._requests.values(), *(request for what, request in self._inbox if what == "submit")]:
            self.cancel(request)
        self._inbox.append(("close", None))
        self.step()

    def step(self) -> list[Request]:
        """Plans and starts one step, and reads the step before. Which texts got tokens, or ended.

        Raises:
            RuntimeError: a program failed, now or before. The pool went with it: every text that was running has the cause as
                its `error`, and `reset` begins anew.
        """
        with self._lock:
            self._check_alive()
            begin = time.perf_counter()
            try:
                return self._step()
            except BaseException as error:
                self._die(error)
                if not isinstance(error, Exception):
                    raise
                raise RuntimeError(f"the engine has died: {error}; reset() revives it") from error
            finally:
                self._counts["steps"] += 1
                self._counts["seconds"] += time.perf_counter() - begin

    def run(self) -> None:
        """Steps until every text has ended."""
        while self.busy:
            self.step()

    @property
    def busy(self) -> bool:
        """Whether any text has not ended."""
        return bool(self._requests or self._inbox or self._flight)

    def reset(self) -> None:
        """An empty pool, and no texts; those that have not ended are cancelled. Programs stay compiled."""
        with self._lock:
            again = hasattr(self, "_requests")
            for request in list(getattr(self, "_requests", {}).values()):
                request.text.state, request.text.finish = State.DONE, "cancelled"
            self._requests: dict[Text, Request] = {}
            self._inbox: collections.deque[tuple[str, Any]] = collections.deque()
            if again and self._sharing is not None and self._sharing.enters_here:
                self._inbox.append(("reset", None))  # the others', before their next step
            self._flight: collections.deque[tuple[Decode, Any]] = collections.deque()
            self._dead: BaseException | None = None
            self._counts: dict[str, Any] = collections.defaultdict(int)
            self._misses: collections.Counter[str] = collections.Counter()
            self._pool: Any = None  # the old one goes first
            self._pool = self.geometry.empty(self._model)
            g = self.geometry
            self._scheduler = Scheduler(
                pages=g.pages, page_tokens=self._ladders.page, rows=g.rows, slots=g.slots, chunk=self.chunk,
                decode_steps=self.decode_steps, snapshot_every=self.snapshot_every, shape=self._ladders.shape,
            )  # fmt: skip
            self._operands = Operands(self._ladders)

    def warmup(self) -> int:
        """Compiles every program that any text can need; how many there are. Later a new one is a warning.

        Raises:
            RuntimeError: texts are running.
        """
        with self._lock:
            self._check_alive()
            if self.busy:
                raise RuntimeError("warmup() comes before the first text, or after the last: it uses the rows")
            for name, *sizes in self._ladders.every_program():
                self._pool = self._programs.rehearse(self._pool, name, *sizes)
            self._warm, self._known = True, len(self._programs.keys)
            return len(self._programs.keys)

    def stats(self) -> Stats:
        """Counts since the engine began, or `reset`."""
        return Stats._of(self._scheduler, self._counts, self._misses, len(self._programs.keys))

    def __repr__(self) -> str:
        g = self.geometry
        return (
            f"Engine(rows={g.rows}, chunk={self.chunk}, pages={g.pages} of {self._ladders.page} tokens, snapshots={g.slots}, "
            f"running={len(self._scheduler.running)}, waiting={len(self._scheduler.waiting)})"
        )

    # -- a step ----------------------------------------------------------------------------------

    def _step(self) -> list[Request]:
        self._take_in()
        operations = self._scheduler.plan()
        if operations is None:
            return self._land()
        began = False
        for operation in operations:
            self._start(operation)
            began |= isinstance(operation, Decode)
        if len(self._flight) > 1 or (self._flight and not began):
            return self._land()
        return []

    def _take_in(self) -> None:
        arrived: Iterable[tuple[str, Any]] = [self._inbox.popleft() for _ in range(len(self._inbox))]
        if self._sharing is not None:
            told = self._sharing.share([message(what, request) for what, request in arrived])
            if not self._sharing.enters_here:
                arrived = (self._told(**each) for each in told)  # one after the other: a text may be cancelled at once
        for what, request in arrived:
            if what == "submit":
                self._requests[request.text] = request
                self._counts["requests"] += 1
                self._scheduler.submit(request.text)
            elif what == "cancel" and request is not None and request.text in self._requests:
                self._scheduler.cancel(request.text)
                self._close(request)
            elif what == "close":
                self._closed = True

    def _told(self, what: str, number: int = -1, **options: Any) -> tuple[str, Request | None]:
        """What the first process has taken in."""
        if what == "reset":
            self.reset()
        if what != "submit":
            return what, next((request for request in self._requests.values() if request.number == number), None)
        sampling = Sampling(*options.pop("how"))
        request = make_request(self, self._scheduler.capacity, sampling=sampling, **options)
        request.number = number
        return what, request

    def _start(self, operation: Any) -> None:
        """Puts one operation onto the devices."""
        programs = self._programs
        if self._sharing is not None:
            self._sharing.note(plain(operation))
        match operation:
            case Copy(source, target):
                self._pool = programs.copy(self._pool, source, target)
            case Restore(slot, row):
                self._pool = programs.restore(self._pool, slot, row)
            case Save(row, slot):
                self._pool = programs.save(self._pool, row, slot)
            case Prefill(pieces):
                self._counts["prefilled"] += sum(piece.stop - piece.start for piece in pieces)
                self._counts["prefills"] += 1
                self._pool = programs.prefill(self._pool, **self._operands.prefill(pieces))
            case Decode():
                self._decode(operation)
        self._check_warm()

    def _decode(self, decode: Decode) -> None:
        operands = self._operands.decode(decode, self._requests.__getitem__)
        self._pool, written = self._programs.decode(self._pool, **operands)
        depart(written)
        self._flight.append((decode, written))

    def _land(self) -> list[Request]:
        """Reads the oldest decode in flight."""
        decode, written = self._flight.popleft()
        begin = time.perf_counter()
        landed = Landed(written, [member.row for member in decode.members])
        self._counts["waiting"] += time.perf_counter() - begin
        lengths = {member.text: member.text.length for member in decode.members}
        if self._sharing is not None:
            self._sharing.note((landed.tokens, landed.good))
        self._scheduler.commit(decode, landed.tokens, landed.good)
        grown = []
        for member, tokens in zip(decode.members, landed.tokens, strict=True):
            request = self._requests.get(member.text)
            if request is None:
                continue
            new = member.text.length - lengths[member.text]
            self._counts["new"] += new
            landed.give(request, member.row, tokens[:new])
            if member.text.state is State.DONE:
                if member.text.finish == "error":
                    request.error = FloatingPointError("its logits are not finite; what was cached of it is forgotten")
                self._close(request)
            if new or request.done:
                grown.append(request)
        return grown

    def _close(self, request: Request) -> None:
        del self._requests[request.text]
        text, counts = request.text, self._counts
        counts["finished"] += 1
        if text.hit >= 0:
            counts["prompt"] += text.prompt
            counts["hit"] += text.hit
            self._misses[text.reason or "none"] += 1

    def _die(self, error: BaseException) -> None:
        self._dead, self._pool = error, None
        for request in [*self._requests.values(), *(request for what, request in self._inbox if what == "submit")]:
            request.error = error
        self._requests.clear()
        self._inbox.clear()
        self._flight.clear()

    def _check_entry(self) -> None:
        if self._sharing is not None and not self._sharing.enters_here:
            raise RuntimeError("texts enter on the first process (entry='first'): the others call follow()")

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise RuntimeError(f"the engine has died: {self._dead}; reset() revives it") from self._dead

    def _check_warm(self) -> None:
        if self._warm and len(self._programs.keys) > self._known:
            self._known = len(self._programs.keys)
            warnings.warn("the engine compiled a program after warmup()", RuntimeWarning, stacklevel=4)


def _alone_on_data(model: Structure) -> Structure:
    """The model with rows that are the same on all data ranks."""
    sharding = model.sharding
    if sharding is None or sharding.batch is None:
        return model
    context = dataclasses.replace(sharding.context, batch_axis=None)
    return dataclasses.replace(model, sharding=dataclasses.replace(sharding, context=context))
