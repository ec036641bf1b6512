"""Reads a profiler trace: when each GPU computes, when data travels between GPUs, and how much of that is hidden.

A transfer is *hidden* while the same GPU computes. What one GPU waits for another inside a collective counts as
transfer, too: a profiler cannot tell the two apart.
"""

import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

Span = tuple[float, float]  # begin and end, milliseconds

# NCCL's kernels, peer copies of the copy engine. Copies inside one GPU are compute: they keep it from the next kernel.
_TRANSFER = re.compile(r"nccl|memcpy ?p(2|to)p|memcpypeer|peer", re.IGNORECASE)

# What a kernel does, by its name; the first that fits. XLA names its fusions after what is in them.
_KINDS = {
    "transfers": _TRANSFER,
    "attention": re.compile(r"attention|fmha|flash", re.IGNORECASE),
    "gated delta rule": re.compile(r"delta|gdn", re.IGNORECASE),
    "experts": re.compile(r"expert|moe|grouped", re.IGNORECASE),
    "matrix products": re.compile(
        r"dense_|few_rows|gemm|nvjet|cutlass|cublas|splitk|matmul|dot|triton_nested", re.IGNORECASE
    ),
    "copies": re.compile(r"memcpy|memset|copy|slice|concatenate|transpose|pad_fusion", re.IGNORECASE),
    "reductions": re.compile(r"reduce|softmax", re.IGNORECASE),
    "other fusions": re.compile(r"fusion|wrapped", re.IGNORECASE),
}


@dataclasses.dataclass(frozen=True)
class Activity:
    """What one GPU did, in milliseconds from the first event: kernels as (begin, end, name), merged spans of both kinds."""

    device: str
    events: tuple[tuple[float, float, str], ...]
    compute: tuple[Span, ...]
    transfer: tuple[Span, ...]

    @property
    def length(self) -> float:
        return max(end for _, end, _ in self.events)

    @property
    def hidden_share(self) -> float:
        """Of the time in which data travels, the part during which this GPU computes; 1 without any transfer."""
        total = _total(self.transfer)
        return _total(_overlap(self.compute, self.transfer)) / total if total else 1.0

    @property
    def transfer_share(self) -> float:
        """Part of the whole in which data travels."""
        return _total(self.transfer) / self.length

    @property
    def idle_share(self) -> float:
        """Part of the whole in which this GPU neither computes nor transfers."""
        return 1 - _total(merge([*self.compute, *self.transfer])) / self.length

    def by_kind(self) -> dict[str, dict[str, float]]:
        """For each kind of kernel, the longest first: milliseconds, how many of them while nothing of another kind runs,
        and the number of kernels."""
        spans: dict[str, list[Span]] = {}
        for begin, end, name in self.events:
            kind = next((kind for kind, pattern in _KINDS.items() if pattern.search(name)), "other kernels")
            spans.setdefault(kind, []).append((begin, end))
        found = {}
        for kind, own in spans.items():
            others = tuple(merge(span for other, found in spans.items() if other != kind for span in found))
            alone = _total(merge(own)) - _total(_overlap(tuple(merge(own)), others))
            found[kind] = {"ms": _total(own), "alone_ms": alone, "calls": len(own)}
        return dict(sorted(found.items(), key=lambda item: -item[1]["ms"]))

    def summary(self) -> dict[str, Any]:
        """Milliseconds and shares, and the kernels that took longest."""
        names: dict[str, list[float]] = {}
        for begin, end, name in self.events:
            names.setdefault(name, []).append(end - begin)
        longest = sorted(names.items(), key=lambda item: -sum(item[1]))[:12]
        return {
            "device": self.device,
            "total_ms": self.length,
            "compute_ms": _total(self.compute),
            "transfer_ms": _total(self.transfer),
            "hidden_share": self.hidden_share,
            "idle_share": self.idle_share,
            "kernels": [{"name": name[:80], "calls": len(t), "ms": sum(t)} for name, t in longest],
        }


def record(call: Callable[[], Any]) -> list[Activity]:
    """Runs `call` once under the profiler (warm it up first) and reads what every GPU did."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        return [activity for path in Path(folder).rglob("*.xplane.pb") for activity in read(path)]


def device_times(call: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Milliseconds of one of `repeats` calls queued behind each other: its kernels together, from the first one's begin to
    the last one's end, and kernel by kernel, the longest first."""
    jax.block_until_ready(call())
    activity = record(lambda: [call() for _ in range(repeats)])[0]
    kernels: dict[str, float] = {}
    for begin, end, name in activity.events:
        kernels[name] = kernels.get(name, 0.0) + (end - begin) / repeats
    return {
        "kernels_ms": sum(kernels.values()),
        "span_ms": activity.length / repeats,
        "each_ms": dict(sorted(kernels.items(), key=lambda item: -item[1])[:16]),
    }


def read(path: str | Path) -> list[Activity]:
    """The activity of every GPU in an `.xplane.pb` file."""
    found = []
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        events = [
            (event.start_ns / 1e6, event.end_ns / 1e6, event.name)
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
        if events:
            found.append((plane.name.removeprefix("/device:"), events))
    if not found:
        return []
    origin = min(begin for _, events in found for begin, _, _ in events)
    return [
        activity_of(device, [(begin - origin, end - origin, name) for begin, end, name in events])
        for device, events in sorted(found)
    ]


def activity_of(device: str, events: Iterable[tuple[float, float, str]]) -> Activity:
    """Sorts events (begin, end, name) into compute and transfer."""
    events = tuple(sorted(events))
    spans: dict[bool, list[Span]] = {False: [], True: []}
    for begin, end, name in events:
        spans[_TRANSFER.search(name) is not None].append((begin, end))
    return Activity(device, events, tuple(merge(spans[False])), tuple(merge(spans[True])))


def merge(spans: Iterable[Span]) -> list[Span]:
    """The union of spans, as disjoint spans in order."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _overlap(a: tuple[Span, ...], b: tuple[Span, ...]) -> list[Span]:
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        begin, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if begin < end:
            found.append((begin, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def _total(spans: Iterable[Span]) -> float:
    return sum(end - begin for begin, end in spans)


def draw(activities: list[Activity], path: str | Path, title: str, window: Span | None = None) -> None:
    """A timeline: for every GPU one row of compute and one of transfer; `window` in milliseconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(12, 0.7 + 0.7 * len(activities)), layout="constrained")
    labels = []
    for i, activity in enumerate(activities):
        for row, (kind, spans, color) in enumerate(
            (("compute", activity.compute, "tab:blue"), ("transfer", activity.transfer, "tab:orange"))
        ):
            axes.broken_barh([(begin, end - begin) for begin, end in spans], (2 * i + row, 0.8), facecolors=color)
            labels.append(f"{activity.device} {kind}")
    axes.set_yticks([i + 0.4 for i in range(len(labels))], labels)
    axes.invert_yaxis()
    axes.set_xlim(*(window or (0, max(activity.length for activity in activities))))
    axes.set_xlabel("ms")
    axes.set_title(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
