"""The host side against a device that remembers which token lies where: every read and write of a plan is checked."""

import collections
import hashlib
import random

import numpy as np
import pytest

from ring_jax.inference.pages import TRASH
from ring_jax.inference.scheduler import Copy, Decode, Prefill, Restore, Save, Scheduler, State, Text

VOCABULARY, STOPS = 50, frozenset(range(0, 50, 7))
BROKEN = b"not finite"


def follow(state: bytes, token: int) -> bytes:
    if state == BROKEN:
        return BROKEN
    return hashlib.blake2b(state + bytes([token]), digest_size=8).digest()


def states(tokens) -> bytes:
    state = b""
    for token in tokens:
        state = follow(state, int(token))
    return state


def draw(state: bytes) -> int:
    return state[0] % VOCABULARY


class Device:
    """Pages hold token ids, states are digests of all tokens that went in."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        width = scheduler.pages.tokens
        self.pages = [[-1] * width for _ in range(scheduler.pages.count)]
        self.states: dict[int, bytes] = {}
        self.snapshots: dict[int, bytes] = {}
        self.rows: dict[int, list] = {}  # token, position, running
        self.writer: dict[int, Text | None] = {}
        self.fresh: dict[int, Text] = {}
        self.poison: set[Text] = set()
        self.operations: list = []

    def run(self, operations):
        results, self.fresh = None, {}
        for operation in operations:
            match operation:
                case Copy(source, target):
                    assert target != source
                    self.pages[target], self.writer[target] = list(self.pages[source]), None
                case Restore(slot, row):
                    self.states[row] = self.snapshots[slot]
                case Save(row, slot):
                    self.snapshots[slot] = self.states[row]
                case Prefill(row, text, start, stop, pages):
                    state = self.read(row, text.tokens, start, pages) if start else b""
                    self.fresh = dict.fromkeys(pages[start // self.scheduler.pages.tokens :], text)
                    for position in range(start, stop):
                        state = follow(state, int(text.tokens[position]))
                    self.write(text, start, text.tokens[start:stop], pages)
                    self.states[row] = BROKEN if text in self.poison else state
                case Decode():
                    results = operation, *self.decode(operation)
        return results

    def decode(self, operation: Decode):
        new, good = [], []
        self.rows = {m.row: self.rows.get(m.row) for m in operation.members}
        for member in operation.members:
            text, out, ok = member.text, [], True
            if member.enters:
                self.rows[member.row] = [member.token, member.position, True]
                if member.position == 0:
                    self.states[member.row] = b""
            row = self.rows[member.row]
            assert row is not None
            for _ in range(operation.steps):
                token, position, running = row
                if not running:
                    break
                state = self.states[member.row]
                self.write(text, position, [token], member.pages)
                state = self.states[member.row] = follow(state, token)
                if text in self.poison or state == BROKEN:
                    ok, row[2] = False, False
                    break
                drawn = draw(state)
                out.append(drawn)
                ended = (text.watched and drawn in text.stops) or position + 2 == text.limit
                row[:] = [drawn, position + 1, not ended]
            new.append(out)
            good.append(ok)
        return new, good

    def read(self, row, tokens, length, pages):
        width = self.scheduler.pages.tokens
        for position in range(length):
            assert self.pages[pages[position // width]][position % width] == tokens[position]
        assert self.states[row] in (states(tokens[:length]), BROKEN)
        return self.states[row]

    def write(self, text, start, tokens, pages):
        width, prefixes = self.scheduler.pages.tokens, self.scheduler.prefixes
        for position, token in enumerate(tokens, start):
            page, slot = pages[position // width], position % width
            assert page != TRASH
            if slot == 0 or self.writer.get(page) is None:
                self.writer[page] = text
            assert self.writer[page] is text
            if text.state is not State.DONE and page in text.pages:
                # What came after it in the same plan may share the page already, as soon as it is written.
                assert prefixes.pages.references[page] == 1 or self.fresh.get(page) is text
                entry = prefixes.entries.get(page)
                known = [s.tail for s in entry.tails] + ([entry.node.tokens] if entry.node else []) if entry else []
                for held in known:  # what is known of a page is what is written there, when it was planned
                    assert slot >= len(held) // 4 or np.frombuffer(held, np.int32)[slot] == token
            self.pages[page][slot] = int(token)


def check(scheduler: Scheduler):
    """Everything adds up."""
    pages, prefixes = scheduler.pages, scheduler.prefixes
    mapped = collections.Counter(page for text in scheduler.running for page in text.pages)
    assert [mapped[page] for page in range(pages.count)] == pages.references
    free, known = set(pages._free), set(prefixes.entries)
    assert len(free) == pages.free and not free & (set(mapped) | known)
    assert set(mapped) | known | free == set(range(1, pages.count))
    assert prefixes.idle == len(known - set(mapped))
    for page, count in mapped.items():
        if count > 1:  # shared: full, and known
            assert prefixes.entries[page].node is not None
    slots = {s.slot for s in prefixes.snapshots.values()}
    assert slots | set(prefixes._free_slots) == set(range(prefixes.slots))
    assert len(slots) + len(prefixes._free_slots) == prefixes.slots
    found = 0
    for root in prefixes.roots.values():
        todo = [root]
        for node in todo:
            todo += node.children.values()
            for tokens, child in node.children.items():
                assert child.alive and child.tokens == tokens and child.parent is node
                assert prefixes.entries[child.page].node is child
                assert node is root or pages.references[node.page] or not pages.references[child.page]
            for tail, snapshot in node.snapshots.items():
                found += 1
                assert prefixes.snapshots[snapshot.slot] is snapshot and snapshot.node is node and snapshot.tail == tail
                assert not tail or snapshot in prefixes.entries[snapshot.page].tails
    assert found == len(prefixes.snapshots)
    rows = [text.row for text in scheduler.running]
    assert sorted(rows + scheduler._free_rows) == list(range(len(rows) + len(scheduler._free_rows)))


def expected(text: Text) -> list[int]:
    tokens = [int(t) for t in text.tokens[: text.prompt]]
    state = states(tokens)
    out: list[int] = []
    while len(tokens) + len(out) < text.limit:
        out.append(draw(state))
        if out[-1] in text.stops:
            break
        state = follow(state, out[-1])
    return out


def make_text(rng: random.Random, beginnings, capacity: int, ended: list[Text]) -> Text:
    """A prompt that begins like others, or goes on where an earlier text ended."""
    limit = rng.randint(2, min(capacity, 60))
    prompt = rng.randint(1, limit - 1)
    begin = rng.choice(beginnings)[: rng.choice([0, 10, 40, 80])]
    if ended and rng.random() < 0.4:
        begin = [int(t) for t in rng.choice(ended).known]
        limit = min(capacity, len(begin) + 20)
        prompt = min(len(begin) + 3, limit - 1)
    tokens = np.zeros(limit, np.int32)
    tokens[:prompt] = [*begin, *(rng.randrange(3) for _ in range(limit))][:prompt]
    stops = STOPS if rng.random() < 0.5 else frozenset()
    points = tuple(rng.sample(range(1, limit), min(limit - 1, rng.choice([0, 0, 2]))))
    return Text(
        tokens,
        prompt,
        stops=stops,
        watched=rng.random() < 0.8,
        checkpoints=points,
        salt=rng.choice([b"", b"", b"other"]),
    )


def run(scheduler: Scheduler, device: Device, tokens, new: int = 2, **options) -> Text:
    """One text, from arrival to end."""
    buffer = np.zeros(len(tokens) + new, np.int32)
    buffer[: len(tokens)] = tokens
    text = Text(buffer, len(tokens), **options)
    scheduler.submit(text)
    while text.state is not State.DONE:
        operations = scheduler.plan()
        assert operations
        device.operations += operations
        result = device.run(operations)
        if result is not None:
            scheduler.commit(*result)
        check(scheduler)
    assert list(text.tokens[text.prompt : text.length]) == expected(text)
    return text


def make(**options):
    scheduler = Scheduler(
        **{
            "pages": 100,
            "page_tokens": 16,
            "rows": 2,
            "slots": 50,
            "chunk": 32,
            "decode_steps": 2,
            "snapshot_every": 64,
        }
        | options
    )
    return scheduler, Device(scheduler)


def test_where_texts_resume():
    scheduler, device = make()
    first = run(scheduler, device, range(50))
    assert (first.hit, first.reason, first.prefilled) == (0, "no_kv", 49)
    assert [(op.start, op.stop) for op in device.operations if isinstance(op, Prefill)] == [(0, 32), (32, 49)]
    again = run(scheduler, device, range(50))
    assert (again.hit, again.reason, again.prefilled) == (49, "", 0)
    on_grid = run(scheduler, device, [*range(35), *range(35, 0, -1)])
    assert (on_grid.hit, on_grid.keys, on_grid.reason) == (32, 36, "no_snapshot")
    turn = run(scheduler, device, [*(int(t) for t in first.known), 3, 4])
    assert turn.hit == first.length - 1 and turn.keys == turn.hit and turn.reason == "no_kv"
    assert run(scheduler, device, range(50), salt=b"mine").reason == "salt"
    assert run(scheduler, device, [5]).reason == "too_short"
    short = run(scheduler, device, [40, 41, 42], new=5)  # all within one page
    assert run(scheduler, device, [*(int(t) for t in short.known), 9]).hit == short.length - 1


def test_a_junction_is_kept_at_the_second_sighting():
    """The third text with a beginning in common resumes exactly where the texts part, within a page too."""
    scheduler, device = make(page_tokens=64, chunk=512, snapshot_every=512)
    begin = list(range(45)) + list(range(5))
    hits = [run(scheduler, device, [*begin, *(number + 1,) * 60]).hit for number in range(4)]
    assert hits == [0, 0, 50, 50]
    checkpoint = [run(scheduler, device, [9, *begin, *(n + 1,) * 60], checkpoints=(51,)).hit for n in range(3)]
    assert checkpoint == [0, 51, 51]
    few = [run(scheduler, device, [11, *(n,) * 60]).hit for n in range(3)]
    assert few == [0, 0, 0], "a token or two in common are chance"


def test_evicted_is_said():
    scheduler, device = make(pages=8)
    run(scheduler, device, range(40))
    for first in (41, 42, 43, 44):
        run(scheduler, device, [first, *range(40)])
    assert run(scheduler, device, range(40)).reason == "evicted"


def test_snapshots_by_what_they_save():
    """Spare ones go first; then one that saves much outlives newer ones that save little."""
    scheduler, device = make(pages=500, slots=4, snapshot_every=10_000)
    long = list(range(40)) * 120
    first = run(scheduler, device, long)
    assert first.hit == 0 and scheduler.prefixes.evicted_snapshots == 2 and scheduler.prefixes.refused_snapshots > 100
    for n in range(3):
        run(scheduler, device, [49, n, 3])
    assert run(scheduler, device, [*long, 1]).hit >= len(long) - 1


HAPPENED: collections.Counter = collections.Counter()


@pytest.mark.parametrize("seed", range(40))
def test_random_arrivals(seed, monkeypatch):
    monkeypatch.setattr("ring_jax.inference.scheduler.JUNCTION", 4)
    rng = random.Random(seed)
    width, chunk = rng.choice([4, 8]), rng.choice([8, 16])
    scheduler = Scheduler(
        pages=rng.choice([5, 9, 20, 60]),
        page_tokens=width,
        rows=rng.choice([1, 3, 6]),
        slots=rng.choice([0, 2, 6, 20]),
        chunk=chunk,
        decode_steps=rng.choice([1, 3]),
        snapshot_every=chunk * rng.choice([1, 2]),
    )
    device, flight, texts = Device(scheduler), collections.deque(), []
    beginnings = [[rng.randrange(VOCABULARY) for _ in range(80)] for _ in range(3)]
    arrivals, lag = 60, rng.choice([0, 1, 2])

    def land():
        decode, new, good = flight.popleft()
        scheduler.commit(decode, new, good)

    for _ in range(5000):
        while arrivals and rng.random() < 0.4:
            arrivals -= 1
            text = make_text(rng, beginnings, scheduler.capacity, [t for t in texts if t.finish])
            scheduler.submit(text)
            texts.append(text)
            if rng.random() < 0.05:
                device.poison.add(text)
        if texts and rng.random() < 0.02:
            scheduler.cancel(rng.choice(texts))
        if (operations := scheduler.plan()) is None:
            land()
            continue
        assert sum(op.stop - op.start for op in operations if isinstance(op, Prefill)) <= chunk
        HAPPENED.update(type(op).__name__ for op in operations)
        result = device.run(operations)
        if result is not None:
            flight.append(result)
        while len(flight) > lag or (flight and result is None):
            land()
        check(scheduler)
        if not arrivals and scheduler.idle:
            break
    assert scheduler.idle, "texts are stuck"
    while flight:
        land()
    check(scheduler)
    assert scheduler.in_flight == 0 and len(texts) == 60
    assert BROKEN not in [device.snapshots[slot] for slot in scheduler.prefixes.snapshots]
    for text in texts:
        assert text.state is State.DONE
        out = expected(text)
        got = [int(t) for t in text.tokens[text.prompt : text.length]]
        if text.finish in ("stop", "length"):
            assert got == out and text not in device.poison
        elif text.finish == "error":
            assert device.poison and got == []  # itself, or it went on from another before that was noticed
        else:
            assert text.finish == "cancelled" and got == out[: len(got)]
    HAPPENED.update(text.reason for text in texts)
    HAPPENED.update(text.finish for text in texts)
    HAPPENED["junctions"] += sum(text.junction > 0 for text in texts)
    HAPPENED["preemptions"] += scheduler.preemptions
    HAPPENED["evicted pages"] += scheduler.prefixes.evicted_pages
    HAPPENED["evicted snapshots"] += scheduler.prefixes.evicted_snapshots


def test_everything_happened():
    """The random arrivals above reach every branch that matters, many times."""
    if HAPPENED["Decode"] < 1000:
        pytest.skip("runs after all seeds only")
    for what in (
        "Copy",
        "Restore",
        "Save",
        "Prefill",
        "junctions",
        "preemptions",
        "evicted pages",
        "evicted snapshots",
    ):
        assert HAPPENED[what] > 20, (what, HAPPENED)
    for what in ("", "no_kv", "no_snapshot", "evicted", "salt", "too_short", "stop", "length", "cancelled", "error"):
        assert HAPPENED[what] > 5, (what, HAPPENED)
