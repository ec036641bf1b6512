"""What a plan says: passes made of pieces, memory by kind, choices with their reasons."""

import dataclasses
from collections.abc import Iterator

from ring_jax import _html
from ring_jax.plan.machine import NETWORK, NVLINK, Machine


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a pass on one rank, seconds and bytes.

    Fields:
        term: what it is. compute: in kernels. transfer: while data travels over `link`. exposed: of that, while nothing is computed.
        bytes: received.
    """

    term: str
    compute: float = 0.0
    transfer: float = 0.0
    exposed: float = 0.0
    bytes: float = 0.0
    link: str | None = None

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed

    def times(self, factor: float, moved: float | None = None) -> "Piece":
        """So many of them; `moved` where transfers are repeated another number of times."""
        moved = factor if moved is None else moved
        return Piece(
            self.term, factor * self.compute, moved * self.transfer, moved * self.exposed, moved * self.bytes, self.link
        )


@dataclasses.dataclass(frozen=True)
class Pass:
    """A prefill, a training step or a decode step, on the slowest rank.

    Fields:
        name: which. before, after: pieces around the layers. group: those of one group of layers, in order. groups: how often.
        tokens: of the whole batch. flops: of the model, on one rank, without what is computed again.
        peak: FLOP/s of a GPU.
    """

    name: str
    before: tuple[Piece, ...]
    group: tuple[Piece, ...]
    groups: int
    after: tuple[Piece, ...]
    tokens: int
    flops: float
    peak: float

    def pieces(self) -> Iterator[Piece]:
        """All pieces, those of the group once, as long as all groups take."""
        yield from self.before
        yield from (piece.times(self.groups) for piece in self.group)
        yield from self.after

    @property
    def seconds(self) -> float:
        return sum(piece.seconds for piece in self.pieces())

    @property
    def terms(self) -> dict[str, float]:
        """Seconds by what they go to, the longest first; transfers that are not hidden apart."""
        found: dict[str, float] = {}
        for piece in self.pieces():
            found[piece.term] = found.get(piece.term, 0.0) + piece.compute
            if piece.exposed:
                name = f"waiting for {piece.link}"
                found[name] = found.get(name, 0.0) + piece.exposed
        return dict(sorted(((k, v) for k, v in found.items() if v), key=lambda item: -item[1]))

    @property
    def traffic(self) -> dict[str, float]:
        """Bytes that one rank receives, by kind of link."""
        found = {NVLINK: 0.0, NETWORK: 0.0}
        for piece in self.pieces():
            if piece.link is not None:
                found[piece.link] += piece.bytes
        return found

    @property
    def hidden_share(self) -> float:
        """Of the time in which data travels, the part behind compute; 1 without any."""
        transfer = sum(piece.transfer for piece in self.pieces())
        return 1.0 - sum(piece.exposed for piece in self.pieces()) / transfer if transfer else 1.0

    @property
    def share_of_peak(self) -> float:
        return self.flops / self.seconds / self.peak

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.tokens / self.seconds


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank by kind, and what a GPU has."""

    kinds: dict[str, float]
    limit: float

    @property
    def total(self) -> float:
        return sum(self.kinds.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.limit

    def __str__(self) -> str:
        kinds = sorted(self.kinds.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in kinds if size >= 0.05 * 2**30)
        return f"{self.total / 2**30:.1f} of {self.limit / 2**30:.0f} GiB ({parts})"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `predict` found; `print` shows all of it.

    Fields:
        model, tokens, batch: name, length of a row, rows in all.
        machine: GPU and mesh.
        prefill, train, decode: passes, times on the slowest rank.
        memory: of each pass by name, on the fullest rank.
        choices: what was chosen, with the reason: strategy, gdn_strategy, expert_strategy, weights.
        assumed: rates that no measurement of this package stands behind.
    """

    model: str
    tokens: int
    batch: int
    machine: Machine
    prefill: Pass
    train: Pass
    decode: Pass
    memory: dict[str, Memory]
    choices: dict[str, tuple[str, str]]
    assumed: tuple[str, ...] = ()

    @property
    def passes(self) -> tuple[Pass, Pass, Pass]:
        return self.prefill, self.train, self.decode

    @property
    def fits(self) -> dict[str, bool]:
        """Whether each pass fits into the memory of every GPU."""
        return {name: memory.fits for name, memory in self.memory.items()}

    def __repr__(self) -> str:
        mesh = ", ".join(f"{name}={size}" for name, size in self.machine.mesh.items())
        times = ", ".join(f"{one.name} {duration(one.seconds)}" for one in self.passes)
        return f"Plan({self.model}, {self.batch} x {self.tokens:,} tokens, {self.machine.gpu.name} {mesh}: {times})"

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        """For notebooks: times as bars, memory and choices."""
        parts = []
        for one in self.passes:
            memory = self.memory[one.name]
            title = f"{one.name}: {duration(one.seconds)}, {one.tokens_per_second:,.0f} tokens/s"
            fits = "" if memory.fits else ": does not fit"
            parts.append(_html.table(title, {"memory": f"{memory}{fits}"}, _html.bars(one.terms, duration)))
        about = {what: f"{name} ({reason})" for what, (name, reason) in self.choices.items()}
        return _html.table(next(self.lines()), about, "".join(parts))

    def lines(self) -> Iterator[str]:
        machine = self.machine
        mesh = ", ".join(f"{name} {size}" for name, size in machine.mesh.items())
        hosts = f" on {machine.hosts} hosts" if machine.hosts > 1 else ""
        yield f"{self.model}, {self.batch} x {self.tokens:,} tokens, {machine.gpus} {machine.gpu.name}{hosts} ({mesh})"
        for one in self.passes:
            yield ""
            rate = f"{one.tokens_per_second:,.0f} tokens/s, {one.share_of_peak:.0%} of peak"
            yield f"{one.name:9s} {duration(one.seconds):>10s}  {rate}"
            for term, seconds in one.terms.items():
                yield f"          {duration(seconds):>10s}  {seconds / one.seconds:4.0%}  {term}"
            moved = {link: size for link, size in one.traffic.items() if size}
            if moved:
                sizes = ", ".join(f"{size / 2**20:,.0f} MiB over {link}" for link, size in moved.items())
                yield f"          a rank receives {sizes}; {one.hidden_share:.0%} of the transfer is hidden"
            if one.name in self.memory:
                memory = self.memory[one.name]
                yield f"          memory {memory}{'' if memory.fits else ': DOES NOT FIT'}"
        yield ""
        for what, (name, reason) in self.choices.items():
            yield f"{what}: {name} ({reason})"
        if self.assumed:
            yield f"assumed: {'; '.join(self.assumed)}"


def duration(seconds: float) -> str:
    """In a unit that leaves three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:,.{max(0, 2 - len(str(int(seconds / size))) + 1)}f} {unit}"
    return "0 s" if seconds == 0 else f"{seconds * 1e9:.3g} ns"
