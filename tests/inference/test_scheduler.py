"""The host side against a device that remembers which token lies where: every read and write of a plan is checked."""

import collections
import hashlib
import random

import numpy as np
import pytest

from ring_jax.inference.operations import Copy, Decode, Piece, Prefill, Restore, Save, State, Text
from ring_jax.inference.pages import TRASH
from ring_jax.inference.scheduler import Scheduler
from ring_jax.inference.together import together

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
                case Prefill(pieces):
                    self.prefill(pieces)
                case Decode():
                    results = operation, *self.decode(operation)
        return results

    def prefill(self, pieces):
        """All read before any writes: at the same time."""
        assert len({piece.row for piece in pieces}) == len(pieces)
        width = self.scheduler.pages.tokens
        before = [self.read(p.row, p.text.tokens, p.start, p.pages) if p.start else b"" for p in pieces]
        self.fresh = {page: p.text for p in pieces for page in p.pages[p.start // width :]}
        for piece, state in zip(pieces, before, strict=True):
            new = piece.text.tokens[piece.start : piece.stop]
            for token in new:
                state = follow(state, int(token))
            self.write(piece.text, piece.start, new, piece.pages)
            self.states[piece.row] = BROKEN if piece.text in self.poison else state

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


def check(scheduler: Scheduler, *, forgets: bool = False):
    """Everything adds up. `forgets`: where a text was not finite, others may share pages that are known no more."""
    pages, prefixes = scheduler.pages, scheduler.prefixes
    mapped = collections.Counter(page for text in scheduler.running for page in text.pages)
    assert [mapped[page] for page in range(pages.count)] == pages.references
    free, known = set(pages._free), set(prefixes.entries)
    assert len(free) == pages.free and not free & (set(mapped) | known)
    assert set(mapped) | known | free == set(range(1, pages.count))
    assert prefixes.idle == len(known - set(mapped))
    for page, count in mapped.items():
        if count > 1:  # shared: full, and known
            entry = prefixes.entries.get(page)
            assert forgets if entry is None else entry.node is not None
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


def make_text(rng: random.Random, beginnings, longest: int, ended: list[Text]) -> Text:
    """A prompt that begins like others, or goes on where an earlier text ended."""
    limit = rng.randint(2, longest)
    prompt = rng.randint(1, limit - 1)
    begin = rng.choice(beginnings)[: rng.choice([0, 10, 40, 80])]
    if ended and rng.random() < 0.4:
        begin = [int(t) for t in rng.choice(ended).known]
        limit = min(longest, len(begin) + 20)
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
            "shape": lambda start, stop: (1,),
        }
        | options
    )
    return scheduler, Device(scheduler)


def test_where_texts_resume():
    scheduler, device = make()
    first = run(scheduler, device, range(50))
    assert (first.hit, first.reason, first.prefilled) == (0, "no_kv", 49)
    pieces = [piece for op in device.operations if isinstance(op, Prefill) for piece in op.pieces]
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 32), (32, 49)]
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
    many = [7, *begin, *begin, *begin, *begin]  # three pages, of which the second text computes its own
    hits = [run(scheduler, device, [*many, *(number + 1,) * 60]).hit for number in range(4)]
    assert hits == [0, 0, len(many), len(many)]
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


HAPPENED: dict[int, collections.Counter] = {}  # by seed
SEEDS = range(60)


@pytest.fixture
def short_junctions(monkeypatch):
    monkeypatch.setattr("ring_jax.inference.scheduler.JUNCTION", 4)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_arrivals(seed, short_junctions):
    HAPPENED[seed] = random_arrivals(seed)


def random_arrivals(seed: int) -> collections.Counter:
    """What happened."""
    happened: collections.Counter = collections.Counter()
    rng = random.Random(seed)
    crowded = seed >= 40  # many short texts, which share programs
    width, chunk = rng.choice([4, 8]), 64 if crowded else rng.choice([8, 16])
    most, often, longest = (4, 0.8, 16) if crowded else (rng.choice([1, 2]), 0.4, 60)
    scheduler = Scheduler(
        pages=rng.choice([9, 20, 60]) if crowded else rng.choice([5, 9, 20, 60]),
        page_tokens=width,
        rows=6 if crowded else rng.choice([1, 3, 6]),
        slots=rng.choice([0, 2, 6, 20]),
        chunk=chunk,
        decode_steps=rng.choice([1, 3]),
        snapshot_every=chunk * rng.choice([1, 2]),
        shape=lambda start, stop: (most, stop - start > 8, start > 0),
    )
    device, flight, texts = Device(scheduler), collections.deque(), []
    beginnings = [[rng.randrange(VOCABULARY) for _ in range(80)] for _ in range(3)]
    arrivals, lag = 60, rng.choice([0, 1, 2])

    def land():
        decode, new, good = flight.popleft()
        scheduler.commit(decode, new, good)

    for _ in range(5000):
        while arrivals and rng.random() < often:
            arrivals -= 1
            text = make_text(rng, beginnings, min(scheduler.capacity, longest), [t for t in texts if t.finish])
            scheduler.submit(text)
            texts.append(text)
            if rng.random() < 0.05:
                device.poison.add(text)
        if texts and rng.random() < 0.02:
            scheduler.cancel(rng.choice(texts))
        if (operations := scheduler.plan()) is None:
            land()
            continue
        prefills = [op.pieces for op in operations if isinstance(op, Prefill)]
        assert sum(piece.stop - piece.start for pieces in prefills for piece in pieces) <= chunk
        for pieces in prefills:
            kinds = {(piece.stop - piece.start > 8, piece.start > 0) for piece in pieces}
            assert len(pieces) <= most and len(kinds) == 1
        happened.update(type(op).__name__ for op in operations)
        happened["pieces together"] += sum(len(pieces) > 1 for pieces in prefills)
        happened["programs in turn"] += len(prefills) > 1
        arrived = [texts.index(piece.text) for pieces in prefills for piece in pieces]
        happened["one that came later goes first"] += arrived != sorted(arrived)
        result = device.run(operations)
        if result is not None:
            flight.append(result)
        while len(flight) > lag or (flight and result is None):
            land()
        check(scheduler, forgets=bool(device.poison))
        if not arrivals and scheduler.idle:
            break
    assert scheduler.idle, "texts are stuck"
    while flight:
        land()
    device.run(scheduler.plan())  # snapshots that are still to be saved
    check(scheduler, forgets=bool(device.poison))
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
    happened.update(text.reason for text in texts)
    happened.update(text.finish for text in texts)
    happened["junctions"] += sum(text.junction > 0 for text in texts)
    happened["preemptions"] += scheduler.preemptions
    happened["evicted pages"] += scheduler.prefixes.evicted_pages
    happened["evicted snapshots"] += scheduler.prefixes.evicted_snapshots
    return happened


def test_everything_happened(short_junctions):
    """The random arrivals above reach every branch that matters, many times. Seeds that another process took run again."""
    every = sum((HAPPENED.get(seed) or random_arrivals(seed) for seed in SEEDS), collections.Counter())
    for what in (
        "Copy",
        "Restore",
        "Save",
        "Prefill",
        "pieces together",
        "programs in turn",
        "one that came later goes first",
        "junctions",
        "preemptions",
        "evicted pages",
        "evicted snapshots",
    ):
        assert every[what] > 20, (what, every)
    for what in ("", "no_kv", "no_snapshot", "evicted", "salt", "too_short", "stop", "length", "cancelled", "error"):
        assert every[what] > 5, (what, every)


def test_pieces_of_one_program_do_not_build_on_each_other():
    """A text that hits what another of them writes waits for the next program; the others go together, later ones too."""
    scheduler, device = make(rows=4, chunk=64, shape=lambda start, stop: (4, start > 0))
    prompts = [list(range(20)), [30, *range(12)], [*range(20), 7, 7], [31, *range(5)]]
    texts = []
    for prompt in prompts:
        tokens = np.zeros(len(prompt) + 2, np.int32)
        tokens[: len(prompt)] = prompt
        texts.append(Text(tokens, len(prompt)))
        scheduler.submit(texts[-1])
    operations = scheduler.plan()
    device.run(operations)
    programs = [[texts.index(piece.text) for piece in op.pieces] for op in operations if isinstance(op, Prefill)]
    assert programs == [[0, 1, 3], [2]] and texts[2].hit == 19
    check(scheduler)


@pytest.mark.parametrize(
    ("before", "pages", "slot", "joins"),
    [
        ([], (7,), 8, True),
        ([Restore(1, 2), Copy(8, 7)], (7,), 8, True),
        ([], (7,), 5, False),  # saves over a snapshot that is still to be restored
        ([], (3,), 8, False),  # writes a page that is still to be copied from
        ([], (4,), 8, False),  # or to
        ([Copy(4, 7)], (7,), 8, False),  # copies what is still to be copied
        ([Restore(6, 2)], (7,), 8, False),  # restores what is still to be saved
    ],
)
def test_what_waits_for_what(before, pages, slot, joins):
    """The third text's piece may run with the first's only where the second's, in between, cannot tell."""
    text = Text(np.zeros(9, np.int32), 8)
    first = Prefill((Piece(0, text, 0, 4, (1,)),))
    second = [Copy(3, 4), Restore(5, 1), Prefill((Piece(1, text, 2, 4, (4,)),)), Save(1, 6)]
    third = Piece(2, text, 0, 4, pages)
    found = together([first, *second, *before, Prefill((third,)), Save(2, slot)], 4, lambda start, _: (2, start))
    pair = Prefill((*first.pieces, third))
    assert found == (
        [*before, pair, Save(2, slot), *second]
        if joins
        else [first, *second, *before, Prefill((third,)), Save(2, slot)]
    )
