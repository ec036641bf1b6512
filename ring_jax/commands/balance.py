"""How evenly a layout spreads causal attention over the ranks, and the picture of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ring_jax.layout import Layout


@dataclass(frozen=True)
class Balance:
    """Causal work of one layout. `pairs[r, i]` counts the visible (query, key) pairs of rank r in hop i of the ring."""

    name: str
    pairs: np.ndarray

    @property
    def share(self) -> np.ndarray:
        """Work of each rank over the mean, [C]."""
        per_rank = self.pairs.sum(axis=1)
        return per_rank / per_rank.mean()

    @property
    def slowdown(self) -> float:
        """Time of the ring over that of a perfectly balanced one, where every hop waits for its slowest rank."""
        return float(self.pairs.max(axis=0).sum() * self.pairs.shape[0] / self.pairs.sum())


def causal_balance(name: str, layout: Layout, seq_len: int, ranks: int) -> Balance:
    """Counts the causal pairs of `seq_len` tokens over `ranks` ranks; padding sees nothing and is not seen."""
    length = layout.padded_length(seq_len, ranks)
    pairs = np.zeros((ranks, ranks), np.int64)
    for rank in range(ranks):
        queries = np.asarray(layout.positions(rank, length, ranks))
        queries = queries[queries < seq_len].astype(np.int64)
        for hop in range(ranks):
            source = (rank - hop) % ranks
            pairs[rank, hop] = np.sum(layout.count_below(queries + 1, source, length, ranks))
    return Balance(name, pairs)


def plot(balances: Sequence[Balance], title: str, path: Path) -> None:
    """Writes a PNG: for each layout, the work of every rank (stacked hop by hop up to 16 ranks) against the ideal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(balances), figsize=(3.4 * len(balances), 3.6), sharey=True, layout="constrained", squeeze=False
    )
    for axis, balance in zip(axes[0], balances, strict=True):
        ranks = balance.pairs.shape[0]
        hops = balance.pairs.T if ranks <= 16 else balance.pairs.sum(axis=1)[None]
        work = hops / (balance.pairs.sum() / ranks)
        colors = plt.get_cmap("viridis")(np.linspace(0.1, 0.9, len(work)))
        for hop, color in enumerate(colors):
            axis.bar(np.arange(ranks), work[hop], bottom=work[:hop].sum(axis=0), color=color, label=f"hop {hop}")
        axis.axhline(1.0, color="black", linewidth=1, linestyle="--")
        axis.set(xlabel="rank", xticks=np.arange(0, ranks, -(-ranks // 8)))
        heading = f"{balance.name}\nslowest rank {balance.share.max():.2f}x, ring {balance.slowdown:.2f}x"
        axis.set_title(heading, size=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("causal work over ideal")
    handles, labels = axes[0, -1].get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(title, size=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)
