"""What the pool still knows of earlier texts, and where a new text can go on.

Full pages form a tree: a child is a page whose tokens follow its parent's, found by the token ids themselves. A hybrid model
needs more than keys to go on, so a text can be resumed where keys *and* a snapshot of the recurrent states exist. Snapshots
lie at any position: at the end of a node, or `tail` tokens into the page after it. That page need not be full; because pages
are append-only its first tokens never change, and who resumes there goes on in a copy.

    root -- [page 7: tokens 0 ... 63] -- [page 9: 64 ... 127] -- ...
                                      \\_ snapshot, tail of 20 tokens in page 12: resumes at position 84

Pages that nobody holds are evicted when the pool is full: leaves only, those without a snapshot first, then the longest
unused. Snapshots are evicted when their slots are full: spare ones first (those that only filled free slots), then by least
`last use + tokens since the snapshot before / WORTH`: what it would cost to compute it again counts beside its age.

Sources: Marconi (arXiv 2411.19379) for junctions and eviction by what is saved; SGLang's radix tree with states.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import itertools
from collections import OrderedDict

import numpy as np

from ring_jax.inference.pages import TRASH, Pages

WORTH = 1024  # tokens saved that count as much as one lookup more recent
_REMEMBERED = 4096  # digests of what was evicted, to say so in a miss
_COMPARED = 256  # of the texts that follow a node, newest first, to see where one parts from them
TOKEN = np.dtype(np.int32)


@dataclasses.dataclass(eq=False)
class Snapshot:
    """States at a position: `tail` tokens after the end of `node`, whose keys are in `page` (TRASH for none)."""

    slot: int
    node: Node
    tail: bytes
    page: int
    used: int
    spare: bool

    @property
    def position(self) -> int:
        return self.node.end + len(self.tail) // TOKEN.itemsize


@dataclasses.dataclass(eq=False)
class Node:
    """A full page of a known text, after its parent's."""

    parent: Node | None
    tokens: bytes
    page: int
    end: int
    digest: bytes
    children: dict[bytes, Node] = dataclasses.field(default_factory=dict)
    snapshots: dict[bytes, Snapshot] = dataclasses.field(default_factory=dict)
    alive: bool = True

    @property
    def is_leaf(self) -> bool:
        return not self.children and not any(self.snapshots)  # the empty tail lies in the node's own page


@dataclasses.dataclass(eq=False)
class Entry:
    """What is known of a page: the node that it fills, and the snapshots whose last tokens it holds."""

    node: Node | None = None
    tails: list[Snapshot] = dataclasses.field(default_factory=list)
    used: int = 0

    @property
    def is_leaf(self) -> bool:
        return self.node is None or self.node.is_leaf

    @property
    def rank(self) -> tuple[bool, int]:
        """Least is evicted first."""
        useful = bool(self.tails) or (self.node is not None and bool(self.node.snapshots))
        return useful, self.used


@dataclasses.dataclass(frozen=True)
class Hit:
    """What a lookup found.

    Fields:
        node, snapshot: where the text resumes; the root and None where it begins anew.
        pages: full pages before, in order.
        keys: tokens whose keys were found, more than `tokens` where no snapshot lies that far.
        reason: why not more was hit: "" where all but the last token was, else "no_kv" (not seen before), "no_snapshot"
            (keys are there, states are not), "evicted" (either was there), "salt" (seen under another salt only),
            "too_short" (one token always has to be computed).
    """

    node: Node
    snapshot: Snapshot | None
    pages: tuple[int, ...]
    keys: int
    reason: str

    @property
    def tokens(self) -> int:
        return 0 if self.snapshot is None else self.snapshot.position


class Prefixes:
    """The prefix cache over `pages`, with `slots` snapshots."""

    def __init__(self, pages: Pages, slots: int):
        self.pages, self.slots = pages, slots
        self.entries: dict[int, Entry] = {}
        self.snapshots: dict[int, Snapshot] = {}
        self.roots: dict[bytes, Node] = {}
        self.idle = 0  # pages that are kept, and held by nobody
        self.evicted_pages = self.evicted_snapshots = self.refused_snapshots = 0
        self._free_slots = list(range(slots - 1, -1, -1))
        self._heap: list[tuple[bool, int, int, int]] = []
        self._order = itertools.count()
        self._gone: OrderedDict[bytes, None] = OrderedDict()
        self._clock = 0

    # -- looking up ------------------------------------------------------------------------------

    def root(self, salt: bytes) -> Node:
        if salt not in self.roots:
            self.roots[salt] = Node(None, b"", TRASH, 0, hashlib.blake2b(salt, digest_size=16).digest())
        return self.roots[salt]

    def find(self, tokens: np.ndarray, salt: bytes = b"") -> Hit:
        """The longest known beginning of a text, at most all but its last token."""
        self._clock += 1
        text, width = tokens[:-1].tobytes(), self.pages.tokens * TOKEN.itemsize
        path = [self.root(salt)]
        while (child := path[-1].children.get(text[(len(path) - 1) * width : len(path) * width])) is not None:
            path.append(child)
        for node in path[1:]:
            self.entries[node.page].used = self._clock
        rest = text[(len(path) - 1) * width :]
        keys = path[-1].end + _shared(rest[:width], path[-1])
        for depth in range(len(path) - 1, -1, -1):
            snapshot = self._deepest(path[depth], text[depth * width : (depth + 1) * width])
            if snapshot is not None:
                break
        reason = self._reason(tokens, salt, keys, 0 if snapshot is None else snapshot.position, path)
        if snapshot is None:
            return Hit(path[0], None, (), keys, reason)
        snapshot.used, snapshot.spare = self._clock, False
        if snapshot.tail:
            self.entries[snapshot.page].used = self._clock
        return Hit(snapshot.node, snapshot, tuple(node.page for node in path[1 : depth + 1]), keys, reason)

    @staticmethod
    def _deepest(node: Node, after: bytes) -> Snapshot | None:
        for length in sorted({len(tail) for tail in node.snapshots}, reverse=True):
            found = node.snapshots.get(after[:length])
            if found is not None and len(found.tail) == length:
                return found
        return None

    def _reason(self, tokens: np.ndarray, salt: bytes, keys: int, hit: int, path: list[Node]) -> str:
        if len(tokens) == 1:
            return "too_short"
        if hit == len(tokens) - 1:
            return ""
        if keys > hit:
            after = [node for node in path if node.end > hit]
            return "evicted" if any(_of_snapshot(node.digest, b"") in self._gone for node in after) else "no_snapshot"
        page = tokens[:-1][path[-1].end :][: self.pages.tokens].tobytes()
        if _digest(path[-1].digest, page) in self._gone:
            return "evicted"
        first = tokens[:-1][: self.pages.tokens].tobytes()
        others = (root for other, root in self.roots.items() if other != salt)
        if hit == 0 and any(first in root.children or first in root.snapshots for root in others):
            return "salt"
        return "no_kv"

    # -- pages -----------------------------------------------------------------------------------

    @property
    def available(self) -> int:
        """Pages that can be had, by eviction too."""
        return self.pages.free + self.idle

    def take(self) -> int:
        """A page of one's own; only where one is available."""
        if not self.pages.free:
            self._evict_page()
        return self.pages.take()

    def hold(self, page: int) -> None:
        if self.pages.references[page] == 0:
            assert page in self.entries
            self.idle -= 1
        self.pages.hold(page)

    def release(self, page: int) -> None:
        if not self.pages.drop(page):
            return
        if page in self.entries:
            self.idle += 1
            self._offer(page)
        else:
            self.pages.give(page)

    def add(self, node: Node, tokens: np.ndarray, page: int) -> Node | None:
        """The node of a full page, which becomes known, after `node`; that of another page where one has these tokens already. None
        where `node` is forgotten."""
        text = tokens.tobytes()
        if not node.alive:
            return None
        if (known := node.children.get(text)) is not None:
            return known
        child = Node(node, text, page, node.end + self.pages.tokens, _digest(node.digest, text))
        node.children[text] = child
        entry = self.entries.setdefault(page, Entry())
        entry.node, entry.used = child, self._clock
        self._gone.pop(child.digest, None)
        return child

    def _offer(self, page: int) -> None:
        """Queues a page for eviction where it may be evicted now."""
        entry = self.entries.get(page)
        if entry is not None and self.pages.references[page] == 0 and entry.is_leaf:
            heapq.heappush(self._heap, (*entry.rank, next(self._order), page))

    def _evict_page(self) -> None:
        while True:
            *rank, _, page = heapq.heappop(self._heap)
            entry = self.entries.get(page)
            if entry is None or self.pages.references[page] or not entry.is_leaf:
                continue  # queued before it was used again
            if tuple(rank) == entry.rank:
                break
            self._offer(page)
        self.evicted_pages += 1
        if entry.node is not None:
            self._remember(entry.node.digest)
        self._forget_page(page)

    # -- snapshots -------------------------------------------------------------------------------

    def keep(self, node: Node, tail: np.ndarray, page: int, *, spare: bool) -> int | None:
        """A slot for the states `tail` tokens after `node`, of which `page` has the keys; None where there is one already, or
        no slot for a spare one."""
        text = tail.tobytes()
        known = node.snapshots.get(text) if node.alive else None
        if known is not None:
            known.used, known.spare = self._clock, known.spare and spare
        if known is not None or not node.alive or not self.slots:
            return None
        if not self._free_slots:
            if spare:
                self.refused_snapshots += 1
                return None
            self.evicted_snapshots += 1
            worst = min(self.snapshots.values(), key=self._value)
            self._remember(_of_snapshot(worst.node.digest, worst.tail))
            self.drop(worst)
        snapshot = Snapshot(self._free_slots.pop(), node, text, page if text else TRASH, self._clock, spare)
        node.snapshots[text] = self.snapshots[snapshot.slot] = snapshot
        if text:
            entry = self.entries.setdefault(page, Entry())
            entry.tails.append(snapshot)
            entry.used = self._clock
        return snapshot.slot

    def _value(self, snapshot: Snapshot) -> tuple[bool, float]:
        """Least is evicted first."""
        node: Node | None = snapshot.node if snapshot.tail else snapshot.node.parent
        while node is not None and node.end and b"" not in node.snapshots:
            node = node.parent
        before = 0 if node is None else node.end
        return not snapshot.spare, snapshot.used + (snapshot.position - before) / WORTH

    def drop(self, snapshot: Snapshot) -> None:
        """Forgets a snapshot, and its page where nothing else is known of it."""
        node = snapshot.node
        del node.snapshots[snapshot.tail], self.snapshots[snapshot.slot]
        self._free_slots.append(snapshot.slot)
        if snapshot.tail:
            entry = self.entries[snapshot.page]
            entry.tails.remove(snapshot)
            if entry.node is None and not entry.tails:
                self._unkeep(snapshot.page)
        self._offer(snapshot.page)
        self._offer(node.page)

    # -- forgetting ------------------------------------------------------------------------------

    def forget(self, tokens: np.ndarray, salt: bytes = b"") -> None:
        """Forgets a text from its first token on, and all that follow its first page: something in it is not finite."""
        root, text = self.root(salt), tokens.tobytes()
        for snapshot in [s for tail, s in root.snapshots.items() if text.startswith(tail)]:
            self.drop(snapshot)
        first = root.children.get(text[: self.pages.tokens * TOKEN.itemsize])
        below = [] if first is None else [first]
        for node in below:
            below += node.children.values()
        for node in reversed(below):
            for snapshot in list(node.snapshots.values()):
                self.drop(snapshot)
            self._forget_page(node.page)

    def _forget_page(self, page: int) -> None:
        entry = self.entries[page]
        if (node := entry.node) is not None:
            assert not node.children
            for snapshot in list(node.snapshots.values()):
                self.drop(snapshot)
            assert node.parent is not None
            del node.parent.children[node.tokens]
            node.alive, entry.node = False, None
            self._offer(node.parent.page)
        for snapshot in list(entry.tails):
            self.drop(snapshot)
        if page in self.entries:
            self._unkeep(page)

    def _unkeep(self, page: int) -> None:
        del self.entries[page]
        if self.pages.references[page] == 0:
            self.idle -= 1
            self.pages.give(page)

    def _remember(self, digest: bytes) -> None:
        self._gone[digest] = None
        if len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)


def _digest(parent: bytes, tokens: bytes) -> bytes:
    return hashlib.blake2b(parent + tokens, digest_size=16).digest()


def _of_snapshot(node: bytes, tail: bytes) -> bytes:
    return hashlib.blake2b(node + tail, digest_size=16, person=b"snapshot").digest()


def _shared(text: bytes, node: Node) -> int:
    """Tokens that `text` shares with the longest of what is known to follow a node."""
    own, best = np.frombuffer(text, TOKEN), 0
    for known in itertools.chain(*(itertools.islice(reversed(x), _COMPARED) for x in (node.children, node.snapshots))):
        other = np.frombuffer(known, TOKEN)
        size = min(len(own), len(other))
        differs = np.flatnonzero(own[:size] != other[:size])
        best = max(best, int(differs[0]) if len(differs) else size)
    return best
