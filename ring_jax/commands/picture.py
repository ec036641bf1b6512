"""A picture of a causal sequence over ranks: who holds what, who computes what, and how even that is."""

from pathlib import Path

import numpy as np

from ring_jax.layout import LayoutName, as_layout, work_per_rank

_CELLS = 512  # of the drawn matrix, each way
_LAYOUTS: tuple[LayoutName, ...] = ("contiguous", "zigzag")


def draw_ranks(path: str | Path, seq_len: int, ranks: int, mark: tuple[int, int, str] | None = None) -> None:
    """Draws causal attention over `ranks`, on the contiguous and the zigzag layout.

    Every row of a matrix is a query, every column a key; a colour is the rank that holds the query, and so computes what it
    sees. The strip above has the colours of the ranks that hold the keys, which travel to the queries around the ring.

    Args:
        path: of the picture; the ending names the format.
        seq_len: number of positions.
        ranks: number of ranks.
        mark: a query, a key that it sees, and what to write there.

    Raises:
        OSError: it cannot be written there. ValueError: an unknown ending.
    """
    from matplotlib.figure import Figure  # no pyplot: nothing global, no window

    colours = _colours(ranks)
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 16), width_ratios=(4, 4, 3))
    figure.suptitle(f"{seq_len:,} tokens over {ranks} rank{'s' * (ranks > 1)}: who holds and who computes what")
    for column, name in enumerate(_LAYOUTS):
        strip, matrix = figure.add_subplot(grid[0, column]), figure.add_subplot(grid[1, column])
        owner = _owners(name, seq_len, ranks)
        strip.imshow(colours[owner][None], aspect="auto", interpolation="nearest")
        strip.set(title=f"{name}: ranks that hold the keys", xticks=[], yticks=[])
        _draw_matrix(matrix, colours, owner, seq_len, mark)
    _draw_work(figure.add_subplot(grid[:, 2]), colours, seq_len, ranks)
    figure.savefig(path, dpi=120)


def _owners(layout: str, seq_len: int, ranks: int) -> np.ndarray:
    """The rank that holds the middle of each of `_CELLS` stretches."""
    positions = (np.arange(_CELLS) * 2 + 1) * seq_len // (2 * _CELLS)
    chosen = as_layout(layout)
    return np.asarray(chosen.rank_of(positions, chosen.padded_length(seq_len, ranks), ranks))


def _draw_matrix(axes, colours, owner, seq_len: int, mark: tuple[int, int, str] | None) -> None:
    index = np.arange(_CELLS)
    seen = index[:, None] >= index
    image = np.where(seen[..., None], colours[owner][:, None], 1.0)
    axes.imshow(image, extent=(0, seq_len, seq_len, 0), interpolation="nearest", aspect="auto")
    axes.set(xlabel="key", ylabel="query (its rank computes the row)")
    axes.locator_params(nbins=5)
    if mark is not None:
        query, key, text = mark
        axes.plot([key], [query], "o", color="white", markeredgecolor="black", clip_on=False, zorder=3)
        arrow = {"arrowstyle": "->", "color": "black"}
        axes.annotate(text, (key, query), (0.97, 0.93), textcoords="axes fraction", ha="right", arrowprops=arrow)


def _draw_work(axes, colours, seq_len: int, ranks: int) -> None:
    """Pairs of query and key of each rank, as shares of the mean: the longest bar sets the pace."""
    start, end = np.zeros(seq_len, np.int64), np.arange(1, seq_len + 1)
    for offset, name in enumerate(_LAYOUTS):
        work = np.asarray(work_per_rank(start, end, name, ranks), np.float64)
        at = np.arange(ranks) + 0.4 * offset - 0.2
        hatch = "//" if name == "contiguous" else None
        share = work / work.mean()
        axes.barh(at, share, 0.36, color=colours, hatch=hatch, edgecolor="white")
        label = f"{name}: slowest {share.max():.2f} times the mean"
        axes.barh([0], [0], color="grey", hatch=hatch, edgecolor="white", label=label)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(yticks=range(ranks), xlabel="work of a rank over the mean", ylabel="rank", title="who computes how much")
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)


def _colours(ranks: int) -> np.ndarray:
    """One colour a rank, float [ranks, 3]."""
    from matplotlib import colormaps

    return colormaps["turbo"](np.linspace(0.08, 0.92, ranks))[:, :3]
