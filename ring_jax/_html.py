"""What a notebook shows of a value, in colour: HTML with inline SVG, no script, no import of a plotting library.

Arrays appear by dtype and shape only, as in `_repr`: to read one would wait for its device.
"""

import colorsys
import dataclasses
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ring_jax._repr import short

_WIDTH, _HEIGHT = 480, 14  # pixels of a strip
_CELLS = 96  # along a strip
_SIDE = 48  # cells of a matrix, each way


def of_layout(self: Any) -> str:
    """The `_repr_html_` of a layout: over four ranks."""
    return table(repr(self), {}, layout(self, 64 * (getattr(self, "block", None) or 1), 4))


def of_context(self: Any) -> str:
    """That of a `ContextParallel`: its fields, and which rank holds what where the mesh is known."""
    rows = fields(self, ("axis", "layout", "batch_axis", "head_axis", "strategy", "mesh"))
    if self.mesh is None:
        return table("ContextParallel", rows)
    ranks = self.ranks()
    seq_len = 16 * ranks * (getattr(self.layout, "block", None) or 1)
    return table("ContextParallel", rows, layout(self.layout, seq_len, ranks))


def of_mask(self: Any) -> str:
    """That of a mask: of 64 queries, or of as many as its documents have; no picture of values that are traced."""
    arrays = jax.tree.leaves(self)
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        return table(repr(self), {})
    found = [int(np.max(part.cu_q)) for part in self.terms if hasattr(part, "cu_q")]
    found += [part.ids.shape[1] for part in self.terms if hasattr(part, "ids")]
    length = max(min(found, default=64), 1)
    start, end = (np.asarray(x)[0] for x in self.interval(q_len=length, kv_len=length))
    return table(repr(self), {}, mask(start, end, length))


def of_config(self: Any) -> str:
    """That of a model's config: its fields, and how many layers there are of each kind."""
    rows = fields(self, [field.name for field in dataclasses.fields(self) if field.name != "layer_types"])
    kinds = ", ".join(f"{self.layer_types.count(kind)} {kind}" for kind in dict.fromkeys(self.layer_types))
    return table("Config", rows | {"layer_types": f"{kinds}, in {self.groups} groups of {self.period}"})


def of_arrays(self: Any) -> str:
    """That of a dataclass of arrays, such as a cache: shapes and sizes."""
    rows = {}
    for field in dataclasses.fields(self):
        value = getattr(self, field.name)
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(value))
        rows[field.name] = f"{short(value)}, {size_of(held)}"
    return table(type(self).__name__, rows)


def table(title: str, rows: "Mapping[str, Any] | Iterable[tuple[str, Any]]", after: str = "") -> str:
    """Two columns, names and values, below a title; `after` is HTML."""
    items = rows.items() if isinstance(rows, Mapping) else rows
    body = "".join(
        f"<tr><td style='text-align:left;font-weight:600'>{_text(name)}</td><td style='text-align:left'>{_text(value)}</td></tr>"
        for name, value in items
    )
    return f"<div><b>{_text(title)}</b><table>{body}</table>{after}</div>"


def layout(value: Any, seq_len: int, ranks: int) -> str:
    """A strip of positions, each in the colour of the rank that holds it."""
    cells = min(_CELLS, seq_len)
    positions = (np.arange(cells) * 2 + 1) * seq_len // (2 * cells)
    owner = np.asarray(value.rank_of(positions, value.padded_length(seq_len, ranks), ranks))
    colours = [_colour(rank, ranks) for rank in range(ranks)]
    step = _WIDTH / cells
    bars = "".join(
        f"<rect x='{i * step:.2f}' y='0' width='{step + 0.3:.2f}' height='{_HEIGHT}' fill='{colours[rank]}'/>"
        for i, rank in enumerate(owner)
    )
    shown = min(ranks, 16)
    key = "".join(f"<span style='color:{colours[rank]}'>&#9632;</span>{rank} " for rank in range(shown)) + (
        "..." if shown < ranks else ""
    )
    strip = f"<svg width='{_WIDTH}' height='{_HEIGHT}' role='img'>{bars}</svg>"
    return f"<div>positions 0 to {seq_len - 1}, held by rank {key}</div>{strip}"


def mask(start: np.ndarray, end: np.ndarray, kv_len: int) -> str:
    """A matrix: a row a query, a column a key; as dark as the share of pairs that are seen."""
    rows, columns = min(len(start), _SIDE), min(kv_len, _SIDE)
    at = np.linspace(0, len(start), rows + 1).astype(int)
    low, high = (np.linspace(0, kv_len, columns + 1).astype(int)[i : columns + i] for i in (0, 1))
    size, marks = 5, []
    for y, (first, last) in enumerate(zip(at[:-1], at[1:], strict=True)):
        seen = np.clip(np.minimum(end[first:last, None], high) - np.maximum(start[first:last, None], low), 0, None)
        share = seen.sum(axis=0) / np.maximum((last - first) * (high - low), 1)
        marks += [
            f"<rect x='{x * size}' y='{y * size}' width='{size}' height='{size}' fill='#2563eb' fill-opacity='{part:.2f}'/>"
            for x, part in enumerate(share)
            if part
        ]
    frame = (
        f"<rect width='{columns * size}' height='{rows * size}' fill='none' stroke='currentColor' stroke-opacity='.4'/>"
    )
    svg = f"<svg width='{columns * size + 1}' height='{rows * size + 1}' role='img'>{frame}{''.join(marks)}</svg>"
    return f"<div>{len(start)} queries (down) and the keys that each sees</div>{svg}"


def bars(parts: "Mapping[str, float]", label: Any) -> str:
    """Horizontal bars, the longest fills the width; `label(value)` stands beside each."""
    largest = max(parts.values(), default=0.0) or 1.0
    rows = "".join(
        f"<tr><td style='text-align:left'>{_text(name)}</td><td style='text-align:left'>"
        f"<span style='display:inline-block;height:10px;background:#2563eb;width:{max(1, round(200 * value / largest))}px'></span> "
        f"{_text(label(value))}</td></tr>"
        for name, value in parts.items()
    )
    return f"<table>{rows}</table>"


def size_of(count: float) -> str:
    """Bytes in a unit that a reader takes in."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def fields(value: Any, names: Sequence[str]) -> dict[str, str]:
    """Some attributes by their short reprs, without those that are None or empty."""
    found = {name: getattr(value, name) for name in names}
    return {name: x if isinstance(x, str) else short(x) for name, x in found.items() if x is not None and x != ()}


def _text(value: Any) -> str:
    return html.escape(str(value))


def _colour(rank: int, ranks: int) -> str:
    red, green, blue = colorsys.hsv_to_rgb(0.66 * (1 - rank / max(ranks - 1, 1)), 0.75, 0.9)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
