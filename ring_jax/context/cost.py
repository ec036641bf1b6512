"""What each strategy of attention takes, from the table of hardware facts: what `auto` and the planner compare.

One forward pass of one layer, seconds on one of C ranks, tokens spread evenly. A hop computes a share 1/C of the rank's work beside
the transfer of the next; whichever takes longer counts. Gathering computes in two calls, a rank's own keys beside the gather (in
halves of the heads where that hides more), then those of all others.
"""

from typing import NamedTuple

from ring_jax._hardware import HOPPER, Hardware

# The strategies that `costs` knows, which the planner takes.
NAMES = ("ring", "pass_q", "all_gather", "ulysses")


class Cost(NamedTuple):
    """Of one rank. compute: seconds in blocks. bytes: received. transfer: seconds that they take. seconds: all in all, what is
    hidden not counted twice."""

    compute: float
    bytes: float
    transfer: float
    seconds: float

    @property
    def exposed(self) -> float:
        """Seconds of transfer during which nothing is computed."""
        return self.seconds - self.compute


def costs(
    *,
    query_len: int,
    key_len: int,
    ranks: int,
    query_heads: int,
    kv_heads: int,
    head_size: int,
    rows: int = 1,
    causal: bool | None = None,
    bytes_per_second: float | None = None,
    gpu: Hardware = HOPPER,
    work: float = 1.0,
    moved: float = 1.0,
) -> dict[str, Cost]:
    """Of every strategy over one mesh axis.

    Args:
        query_len, key_len: whole (padded) lengths. ranks: context ranks C. rows: of the batch on one rank.
        query_heads, kv_heads, head_size: of the arrays on one rank.
        causal: whether half of the pairs are masked; None: where there are as many queries as keys.
        bytes_per_second: that a rank receives; None for NVLink.
        work, moved: so many times the work and the bytes of a forward pass (a backward).

    Example:
        >>> shape = dict(query_len=32768, key_len=32768, query_heads=32, kv_heads=8, head_size=128)
        >>> [round(1e3 * costs(ranks=C, **shape)["ring"].seconds, 1) for C in (1, 2, 4)]
        [13.6, 7.3, 3.7]
    """
    causal = query_len == key_len if causal is None else causal
    pairs = rows * query_len * key_len * (0.5 if causal else 1.0)
    work *= 4.0 * pairs * query_heads * head_size / ranks / gpu.attention_rate(head_size)
    if ranks == 1:
        return dict.fromkeys(NAMES, Cost(work, 0.0, 0.0, work))
    rate = gpu.gather_bytes_per_s if bytes_per_second is None else bytes_per_second
    rate /= moved
    kv = rows * key_len / ranks * kv_heads * 2 * head_size * 2.0
    queries = rows * query_len / ranks * query_heads * head_size * 2.0
    partials = rows * query_len / ranks * query_heads * (head_size + 1) * 4.0
    hop_share, gather_share = gpu.hop_share
    hop = work / ranks / hop_share + gpu.hop_seconds[0]
    return {
        "ring": _hops(ranks, hop, kv, rate, gpu),
        "pass_q": _hops(ranks, hop, queries + partials, rate, gpu),
        "all_gather": _gather(ranks, work, gather_share, (ranks - 1) * kv, rate, gpu, halves=kv_heads > 1),
        "ulysses": _in_the_open(work, (2 * queries + kv) * (ranks - 1) / ranks, rate, gpu),
    }


def _hops(ranks: int, hop: float, moved: float, rate: float, gpu: Hardware) -> Cost:
    transfer = moved / rate + gpu.seconds_per_collective
    compute = ranks * hop
    exposed = (ranks - 1) * max(0.0, transfer - hop)
    return Cost(compute, (ranks - 1) * moved, (ranks - 1) * transfer, compute + exposed)


def _gather(ranks: int, work: float, share: float, moved: float, rate: float, gpu: Hardware, halves: bool) -> Cost:
    compute = work / share + 2 * gpu.hop_seconds[0]
    transfer = moved / rate + gpu.seconds_per_collective
    own = compute / ranks
    exposed = max(0.0, transfer - own)
    if halves:
        exposed = min(exposed, max(0.0, transfer / 2 - own) + max(0.0, transfer / 2 - (compute - own) / 2))
    return Cost(compute, moved, transfer, compute + exposed)


def _in_the_open(work: float, moved: float, rate: float, gpu: Hardware) -> Cost:
    compute, transfer = work + gpu.hop_seconds[0], moved / rate + 2 * gpu.seconds_per_collective
    return Cost(compute, moved, transfer, compute + transfer)
