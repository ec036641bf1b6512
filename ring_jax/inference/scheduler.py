"""Who computes what next: plain Python, without arrays on devices, the same on every process.

A step is a list of operations that the device runs in order: at most one chunk's worth of prefill, then one decode of several
tokens for all running rows. Short pieces of several prompts go together. A prompt is prefilled up to its last token; that
one enters decode, which draws all new tokens. So the states at the end of a prefill are just those that the same prompt can
resume from.

Chunks end at absolute multiples of `chunk`, where the prompt ends, where the caller asked for it (`checkpoints`), and at
junctions: where an earlier text with the same beginning went on differently, which only the second shows. What was hit and
what else runs moves no other end, so a text that resumes on the grid is computed as one that did not.

Source: Sarathi-Serve (arXiv 2403.02310) for chunks between decode steps; vLLM for preemption by recomputing.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence

from ring_jax.inference.operations import (
    Copy,
    Decode,
    Member,
    Operation,
    Piece,
    Prefill,
    Restore,
    Save,
    State,
    Text,
)
from ring_jax.inference.pages import Pages
from ring_jax.inference.prefixes import Prefixes
from ring_jax.inference.together import Shape, together

JUNCTION = 32  # tokens that a junction must save: texts often share their first few by chance


class Scheduler:
    """Plans steps over a pool of `pages` pages, `rows` rows and `slots` snapshots.

    Args:
        pages, page_tokens: of the pool, the page for trash included.
        chunk: positions of a prefill chunk. decode_steps: tokens of a decode.
        snapshot_every: multiples of it (itself one of chunk) get a snapshot for sure, other chunk ends only a free slot.
        shape: the prefill program for positions start ... stop - 1, whose first number says how many pieces it takes. It depends
            on nothing else, so what else is prefilled changes no bit of a text.
    """

    def __init__(
        self,
        *,
        pages: int,
        page_tokens: int,
        rows: int,
        slots: int,
        chunk: int,
        decode_steps: int,
        snapshot_every: int,
        shape: Shape,
    ):
        self.pages = Pages(pages, page_tokens)
        self.prefixes = Prefixes(self.pages, slots)
        self.chunk, self.decode_steps, self.snapshot_every = chunk, decode_steps, snapshot_every
        self.waiting: collections.deque[Text] = collections.deque()
        self.running: list[Text] = []  # oldest first
        self.in_flight = 0  # decodes planned whose tokens are not known yet
        self.preemptions = 0
        self._shape = shape
        self._free_rows = list(range(rows - 1, -1, -1))
        self._first: list[Operation] = []  # what the next step begins with

    @property
    def capacity(self) -> int:
        """Tokens of the longest text that fits."""
        return self.pages.usable * self.pages.tokens + 1  # the last one is never read

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def submit(self, text: Text) -> None:
        assert 0 < text.length < text.limit <= self.capacity
        self.waiting.append(text)

    def cancel(self, text: Text) -> None:
        if text.state is not State.DONE:
            self._end(text, "cancelled")

    # -- a step ----------------------------------------------------------------------------------

    def plan(self) -> list[Operation] | None:
        """The next operations; None where tokens in flight have to be known first (`commit`), to decide who has to wait."""
        while not self._reserve():
            if self.in_flight:
                return None
            self._preempt(self.running[-1])
        first, self._first = self._first, []
        operations: list[Operation] = []
        spent = 0
        while (text := self._next_prefill(operations)) is not None:
            stop = self._chunk_end(text)
            if spent and spent + stop - text.computed > self.chunk:
                break
            spent += stop - text.computed
            self._prefill(text, stop, operations)
        operations = [*first, *together(operations, self.pages.tokens, self._shape)]
        decode = self._decode()
        if decode is not None:
            self.in_flight += 1
            operations.append(decode)
        return operations

    def commit(self, decode: Decode, tokens: Sequence[Sequence[int]], finite: Iterable[bool]) -> list[tuple[Text, int]]:
        """Takes what a decode gave its members; the texts that got new tokens, and how many."""
        self.in_flight -= 1
        grown = []
        for member, new, good in zip(decode.members, tokens, finite, strict=True):
            text, before = member.text, member.text.length
            text.ahead -= decode.steps
            if text.state is State.DONE:
                continue
            for token in new:
                self._append(text, token)
                if text.finish:
                    break
            if not good and not text.finish:
                self.prefixes.forget(text.known, text.salt)
                text.node = None
                self._end(text, "error")
            elif text.finish:
                if text.finish == "length" or text.watched:
                    self._save(text, text.length - 1)
                self._end(text, text.finish)
            if text.length > before:
                grown.append((text, text.length - before))
        return grown

    def _append(self, text: Text, token: int) -> None:
        text.tokens[text.length] = token
        text.length += 1
        if token in text.stops:
            text.finish = "stop"
        elif text.length == text.limit:
            text.finish = "length"
        self._register(text, text.length - 1)

    def _decode(self) -> Decode | None:
        members, most = [], 0
        for text in self.running:
            left = text.limit - text.length - text.ahead
            if text.state is not State.DECODE or left <= 0:
                continue
            most = max(most, left)
            last = text.length - 1
            member = Member(
                text.row, text, tuple(text.pages), not text.entered, last, 0 if text.entered else int(text.tokens[last])
            )
            members.append(member)
            text.entered = True
            text.ahead += self.decode_steps
        return Decode(tuple(members), self.decode_steps, most >= self.decode_steps) if members else None

    # -- prefill ---------------------------------------------------------------------------------

    def _next_prefill(self, operations: list[Operation]) -> Text | None:
        """The text whose chunk is next; texts that need none are admitted on the way."""
        while True:
            text = self.running[-1] if self.running and self.running[-1].state is State.PREFILL else None
            text = self._admit(operations) if text is None else text
            if text is None or text.computed < text.length - 1:
                return text
            text.state = State.DECODE

    def _chunk_end(self, text: Text) -> int:
        ends = (text.length - 1, (text.computed // self.chunk + 1) * self.chunk, text.junction, *text.checkpoints)
        return min(end for end in ends if text.computed < end < text.length)

    def _prefill(self, text: Text, stop: int, operations: list[Operation]) -> None:
        piece = Piece(text.row, text, text.computed, stop, tuple(text.pages))
        operations.append(Prefill((piece,)))
        text.prefilled += stop - text.computed
        text.computed = stop
        self._register(text, stop)
        named = stop in (text.length - 1, text.junction, *text.checkpoints) or stop % self.snapshot_every == 0
        self._save(text, stop, spare=not named, operations=operations)
        if stop == text.length - 1:
            text.state = State.DECODE

    def _admit(self, operations: list[Operation]) -> Text | None:
        """The first of those that wait, on a row of its own with pages for its prompt and a decode; None where it has to wait."""
        if not self.waiting or not self._free_rows:
            return None
        text = self.waiting[0]
        hit = self.prefixes.find(text.known, text.salt)
        source = hit.snapshot.page if hit.snapshot is not None and hit.snapshot.tail else None
        shared = [*hit.pages, *([] if source is None else [source])]
        need = self._pages_ahead(text) - len(hit.pages)
        pinned = sum(self.pages.references[page] == 0 for page in shared)
        if self.prefixes.available - pinned < need + len(self.running):
            if self.running:
                return None
            if self.prefixes.available - pinned < need:  # the page to copy from is one too many
                assert hit.snapshot is not None
                self.prefixes.drop(hit.snapshot)
                return self._admit(operations)
        self.waiting.popleft()
        self.running.append(text)
        text.row, text.state, text.entered = self._free_rows.pop(), State.PREFILL, False
        for page in shared:
            self.prefixes.hold(page)
        text.pages = [*hit.pages, *(self.prefixes.take() for _ in range(need))]
        text.node, text.registered, text.computed = hit.node, len(hit.pages), hit.tokens
        text.junction = hit.keys if hit.keys - hit.tokens >= JUNCTION else 0
        if text.hit < 0:
            text.hit, text.keys, text.reason = hit.tokens, hit.keys, hit.reason
        if source is not None:
            operations.append(Copy(source, text.pages[len(hit.pages)]))
            self.prefixes.release(source)
        if hit.snapshot is not None:
            operations.append(Restore(hit.snapshot.slot, text.row))
        return text

    # -- pages -----------------------------------------------------------------------------------

    def _pages_ahead(self, text: Text) -> int:
        """Pages that a text has after the decode that is to be planned next."""
        return self.pages.needed(min(text.length - 1 + text.ahead + self.decode_steps, text.limit - 1))

    def _reserve(self) -> bool:
        """Pages for what running rows write next; whether there were enough."""
        for text in self.running:
            while len(text.pages) < self._pages_ahead(text):
                if not self.prefixes.available:
                    return False
                text.pages.append(self.prefixes.take())
        return True

    def _register(self, text: Text, known: int) -> None:
        """Makes full pages known, as far as their tokens are. Where another page has the same tokens, the text takes that and
        gives its own back: so it can keep snapshots behind it."""
        width = self.pages.tokens
        while text.node is not None and (text.registered + 1) * width <= known:
            begin, own = text.registered * width, text.pages[text.registered]
            text.node = self.prefixes.add(text.node, text.tokens[begin : begin + width], own)
            if text.node is not None and text.node.page != own:
                self.prefixes.hold(text.node.page)
                self.prefixes.release(own)
                text.pages[text.registered] = text.node.page
            text.registered += 1

    def _save(
        self, text: Text, position: int, *, spare: bool = False, operations: list[Operation] | None = None
    ) -> None:
        """A snapshot of the row's states, which stand at `position`, where the prefix cache takes it."""
        if text.node is None or not position:
            return
        begin = text.registered * self.pages.tokens
        assert 0 <= position - begin < self.pages.tokens
        page = text.pages[text.registered] if position > begin else 0
        slot = self.prefixes.keep(text.node, text.tokens[begin:position], page, spare=spare)
        if slot is not None:
            (self._first if operations is None else operations).append(Save(text.row, slot))

    def _preempt(self, text: Text) -> None:
        """Back to the head of those that wait; its pages stay known as long as nobody needs them."""
        self._save(text, text.length - 1 if text.state is State.DECODE else text.computed)
        self._leave(text)
        text.state = State.WAITING
        text.preempted += 1
        self.preemptions += 1
        self.waiting.appendleft(text)

    def _end(self, text: Text, finish: str) -> None:
        if text.state is State.WAITING:
            self.waiting.remove(text)
        else:
            self._leave(text)
        text.state, text.finish = State.DONE, finish

    def _leave(self, text: Text) -> None:
        self.running.remove(text)
        self._free_rows.append(text.row)
        for page in text.pages:
            self.prefixes.release(page)
        text.pages, text.row, text.node = [], -1, None
