"""Pictures: who holds which position, who sees which key, who computes how much, and a planned pass over time.

Every function returns a matplotlib figure that a notebook shows, and writes it where `path` says. Needs the extra ``cli``. A colour is a
rank throughout.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ring_jax._checks import check_count, check_instance
from ring_jax.layout import Layout, as_layout, work_per_rank
from ring_jax.mask import Mask, causal

try:
    from matplotlib.figure import Figure
except ImportError as error:  # the extra is not installed
    raise ImportError("ring_jax.plot needs matplotlib: pip install 'ring-jax[cli]'") from error

_CELLS = 512  # of a drawn matrix, each way
_LAYOUTS = ("contiguous", "zigzag")


class Picture(Figure):
    """A figure that a notebook shows by itself; nothing global, no window."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def layouts(seq_len: int, ranks: int, names: Sequence[Any] = _LAYOUTS, *, path: str | Path | None = None) -> Picture:
    """Which rank holds which position, a strip for each layout.

    Args:
        seq_len, ranks: of the sequence. names: layouts or their names. path: where to write it; the ending names the format.

    Example:
        >>> len(layouts(64, 4).axes)
        2
    """
    seq_len, ranks = check_count("seq_len", seq_len, 1), check_count("ranks", ranks, 1)
    figure = Picture(figsize=(10, 0.6 + 0.8 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), squeeze=False)[:, 0]
    for axis, name in zip(axes, names, strict=True):
        chosen = as_layout(name)
        axis.imshow(_colours(ranks)[_owners(chosen, seq_len, ranks)][None], aspect="auto", interpolation="nearest",
                    extent=(0, seq_len, 0, 1))  # fmt: skip
        axis.set(yticks=[], title=_title(name))
        axis.title.set_fontsize(9)
    axes[-1].set_xlabel(f"position; the colour is the rank that holds it, {_legend(ranks)}")
    return _written(figure, path)


def mask(mask: Mask, seq_len: int, *, layout: Any = None, ranks: int = 1, path: str | Path | None = None) -> Picture:
    """Which keys each query sees: a row a query, a column a key, in the colour of the rank that computes the row.

    Args:
        mask: of one sequence (of a batch, the first row). seq_len: its length.
        layout, ranks: over which it is spread; none: one colour.
    """
    check_instance("mask", mask, Mask, "a ring_jax.Mask such as causal()")
    seq_len, ranks = check_count("seq_len", seq_len, 1), check_count("ranks", ranks, 1)
    owner = _owners(as_layout("contiguous" if layout is None else layout), seq_len, ranks)
    figure = Picture(figsize=(5.2, 5), layout="constrained")
    axis = figure.subplots()
    start, end = _bounds(mask, seq_len)
    _draw_matrix(axis, _colours(ranks)[owner], start, end, seq_len)
    axis.set_title(repr(mask) if len(repr(mask)) < 60 else "mask", fontsize=9)
    return _written(figure, path)


def work(
    seq_len: int,
    ranks: int,
    *,
    mask: Mask | None = None,
    names: Sequence[Any] = _LAYOUTS,
    path: str | Path | None = None,
) -> Picture:
    """How much each rank computes, as a share of the mean, for each layout: the longest bar sets the pace.

    Args:
        seq_len, ranks: of the sequence. mask: causal by default. names: layouts or their names.
    """
    seq_len, ranks = check_count("seq_len", seq_len, 1), check_count("ranks", ranks, 1)
    figure = Picture(figsize=(6, 1.2 + 0.35 * ranks), layout="constrained")
    _draw_work(figure.subplots(), _colours(ranks), _bounds(causal() if mask is None else mask, seq_len), ranks, names)
    figure.legend(loc="outside lower center", frameon=False)
    return _written(figure, path)


def ranks(
    seq_len: int, ranks: int, *, mark: tuple[int, int, str] | None = None, path: str | Path | None = None
) -> Picture:
    """A causal sequence over ranks, contiguous and zigzag: who holds, who computes what, and how even that is.

    Args:
        seq_len, ranks: of the sequence. mark: a query, a key that it sees, and what to write there.

    Raises:
        OSError: it cannot be written there. ValueError: an unknown ending.
    """
    colours = _colours(ranks)
    figure = Picture(figsize=(13, 5.2), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 16), width_ratios=(4, 4, 3))
    figure.suptitle(f"{seq_len:,} tokens over {ranks} rank{'s' * (ranks > 1)}: who holds and who computes what")
    bounds = np.zeros(seq_len, np.int64), np.arange(1, seq_len + 1)
    for column, name in enumerate(_LAYOUTS):
        strip, matrix = figure.add_subplot(grid[0, column]), figure.add_subplot(grid[1, column])
        owner = _owners(as_layout(name), seq_len, ranks)
        strip.imshow(colours[owner][None], aspect="auto", interpolation="nearest")
        strip.set(title=f"{name}: ranks that hold the keys", xticks=[], yticks=[])
        _draw_matrix(matrix, colours[owner], *bounds, seq_len)
        _draw_mark(matrix, mark)
    work = figure.add_subplot(grid[:, 2])
    _draw_work(work, colours, bounds, ranks, _LAYOUTS)
    work.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    return _written(figure, path)


def timeline(planned: Any, *, path: str | Path | None = None) -> Picture:
    """A group of layers of a planned pass over time: a row of kernels, and one for each link.

    Args:
        planned: a `Pass` of `ring_jax.plan.predict`, such as `plan.prefill`.
    """
    spans, now = [], 0.0
    for piece in planned.group:
        spans.append(("kernels", piece.term, now, piece.compute))
        if piece.link is not None and piece.transfer:
            hidden = piece.transfer - piece.exposed
            begin = now + (
                piece.compute - hidden if piece.exposed else 0.0
            )  # what waits in the open ends with the piece
            spans.append((piece.link, piece.term, begin, piece.transfer))
        now += piece.seconds
    rows = list(dict.fromkeys(row for row, *_ in spans))
    terms = list(dict.fromkeys(term for _, term, *_ in spans))
    colours = dict(zip(terms, _colours(len(terms)), strict=True))
    figure = Picture(figsize=(12, 1.6 + 0.6 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for row, term, begin, length in spans:
        axis.broken_barh([(1e3 * begin, 1e3 * length)], (rows.index(row), 0.8), facecolors=colours[term])
    for term in terms:
        axis.broken_barh([], (0, 0), facecolors=colours[term], label=term)
    axis.set_yticks([i + 0.4 for i in range(len(rows))], rows)
    axis.invert_yaxis()
    count = f"one of {planned.groups} groups" if planned.groups > 1 else "the one group"
    axis.set(
        xlim=(0, 1e3 * now), xlabel="ms", title=f"{planned.name}, {count} of layers: {1e3 * now:,.4g} ms on one rank"
    )
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=min(len(terms), 5), frameon=False)
    return _written(figure, path)


def _bounds(mask: Mask, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    start, end = (np.asarray(x) for x in mask.interval(q_len=seq_len, kv_len=seq_len))
    return np.broadcast_to(start, (start.shape[0], seq_len))[0], np.broadcast_to(end, (end.shape[0], seq_len))[0]


def _owners(layout: Layout, seq_len: int, ranks: int) -> np.ndarray:
    """The rank that holds the middle of each of at most `_CELLS` stretches."""
    cells = min(_CELLS, seq_len)
    positions = (np.arange(cells) * 2 + 1) * seq_len // (2 * cells)
    return np.asarray(layout.rank_of(positions, layout.padded_length(seq_len, ranks), ranks))


def _draw_matrix(axes: Any, colours: np.ndarray, start: np.ndarray, end: np.ndarray, seq_len: int) -> None:
    """One row of cells for each of `colours`, white where a query does not see a key."""
    at = (np.arange(len(colours)) * 2 + 1) * seq_len // (2 * len(colours))
    seen = (at[None] >= start[at][:, None]) & (at[None] < end[at][:, None])
    image = np.where(seen[..., None], colours[:, None], 1.0)
    axes.imshow(image, extent=(0, seq_len, seq_len, 0), interpolation="nearest", aspect="auto")
    axes.set(xlabel="key", ylabel="query (its rank computes the row)")
    axes.locator_params(nbins=5)


def _draw_mark(axes: Any, mark: tuple[int, int, str] | None) -> None:
    if mark is not None:
        query, key, text = mark
        axes.plot([key], [query], "o", color="white", markeredgecolor="black", clip_on=False, zorder=3)
        arrow = {"arrowstyle": "->", "color": "black"}
        axes.annotate(text, (key, query), (0.97, 0.93), textcoords="axes fraction", ha="right", arrowprops=arrow)


def _draw_work(axes: Any, colours: Any, bounds: Any, ranks: int, names: Sequence[Any]) -> None:
    """Pairs of query and key of each rank, as shares of the mean."""
    height = 0.8 / len(names)
    for offset, name in enumerate(names):
        work = np.asarray(work_per_rank(bounds[0], bounds[1], name, ranks), np.float64)
        share = work / max(work.mean(), 1e-30)
        at = np.arange(ranks) + height * (offset + 0.5) - 0.4
        hatch = ("//", None, "..", "xx")[offset % 4]
        axes.barh(at, share, 0.9 * height, color=colours, hatch=hatch, edgecolor="white")
        label = f"{_title(name)}: slowest {share.max():.2f} times the mean"
        axes.barh([0], [0], color="grey", hatch=hatch, edgecolor="white", label=label)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(yticks=range(ranks), xlabel="work of a rank over the mean", ylabel="rank", title="who computes how much")
    axes.invert_yaxis()


def _title(layout: Any) -> str:
    return layout if isinstance(layout, str) else repr(layout)


def _legend(ranks: int) -> str:
    return f"0 (dark blue) to {ranks - 1} (dark red)" if ranks > 1 else "the only one"


def _colours(ranks: int) -> np.ndarray:
    """One colour a rank, float [ranks, 3]."""
    from matplotlib import colormaps

    return colormaps["turbo"](np.linspace(0.08, 0.92, ranks))[:, :3]


def _written(figure: Picture, path: str | Path | None) -> Picture:
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
