"""Partial results of attention over the same queries, one a rank: the ways to make them one, and which is taken.

    out = sum_r w_r out_r / sum_r w_r,   w_r = exp(lse_r - max_r lse_r)

    all_reduce      the maximum of the LSEs, then the sum of [w out, w]: all heads on all ranks
    reduce_scatter  an all-gather of the LSEs, then a reduce-scatter of the weighted outputs: each rank gets its heads
    all_to_all      each rank gets its heads' partial results of all ranks, (out, lse) packed, and merges them itself

Where each rank is to have all heads (`outputs="same"`), the last two end with an all-gather of what is merged, in the narrower dtype
of the model. Where the queries are spread by heads, an all-gather comes before all three (`gather_heads`).

Sources: vLLM RFC 37995, PRs 23734 (all-gather of the LSEs, reduce-scatter) and 34883 (all-to-all).
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from ring_jax._checks import check_choice, check_count
from ring_jax._hardware import HOPPER
from ring_jax._mesh import Axis, axis_names
from ring_jax._vma import pcast_to
from ring_jax.context.decode import merge_ranks
from ring_jax.flash.merge import weight

Outputs = Literal["same", "heads"]
STRATEGIES = ("all_reduce", "reduce_scatter", "all_to_all")


@dataclass(frozen=True)
class MergeCost:
    """Of one way, for one rank. `obstacle` says why it cannot run, None if it can."""

    bytes: float
    collectives: int
    obstacle: str | None = None

    @property
    def seconds(self) -> float:
        """Rough time over NVLink."""
        return self.bytes / HOPPER.gather_bytes_per_s + self.collectives * HOPPER.seconds_per_collective


def merge_costs(
    queries: int, heads: int, head_size: int, ranks: int, outputs: Outputs, itemsize: int
) -> dict[str, MergeCost]:
    """What each way has a rank receive.

    Args:
        queries: rows times new tokens. itemsize: bytes of an element of the merged result.
    """
    share = (ranks - 1) / ranks
    lses = 4 * queries * heads
    outs = lses * head_size
    last = (share * queries * heads * head_size * itemsize, 1) if outputs == "same" else (0, 0)
    obstacle = None if heads % ranks == 0 else f"{heads} heads do not divide over {ranks} ranks"
    return {
        "all_reduce": MergeCost(2 * share * (2 * lses + outs), 2),
        "reduce_scatter": MergeCost((ranks - 1) * lses + share * outs + last[0], 2 + last[1], obstacle),
        "all_to_all": MergeCost(share * (lses + outs) + last[0], 1 + last[1], obstacle),
    }


def choose_merge(
    queries: int, heads: int, head_size: int, ranks: int, outputs: Outputs = "same", itemsize: int = 2
) -> tuple[str, str]:
    """The strategy that "auto" takes, and why: the least bytes plus collectives; see `merge_costs`.

    Args:
        queries: rows times new tokens. heads, head_size: of queries, here. ranks: of the context axis.
        outputs: "same" for all heads on every rank, "heads" for its share on each.
        itemsize: bytes of an element of the merged result.

    Example:
        >>> choose_merge(32, 16, 256, 8, "heads")[0]
        'all_to_all'
        >>> choose_merge(32, 2, 256, 8)
        ('all_reduce', 'reduce_scatter and all_to_all cannot run: 2 heads do not divide over 8 ranks')
    """
    for name, value, low in (("queries", queries, 0), ("heads", heads, 0), ("head_size", head_size, 1)):
        check_count(name, value, low)
    check_count("ranks", ranks, 1)
    check_count("itemsize", itemsize, 1)
    check_choice("outputs", outputs, get_args(Outputs))
    costs = merge_costs(queries, heads, head_size, ranks, outputs, itemsize)
    able = {name: cost for name, cost in costs.items() if cost.obstacle is None}
    if len(able) == 1:
        return "all_reduce", f"reduce_scatter and all_to_all cannot run: {costs['all_to_all'].obstacle}"
    best, *others = sorted(able, key=lambda name: able[name].seconds)

    def said(name: str) -> Any:
        return f"{able[name].bytes:.0f} bytes in {able[name].collectives} collectives"

    return best, f"{said(best)} a rank, against " + " and ".join(f"{said(name)} for {name}" for name in others)


def merge_over_ranks(
    out: Float32[Array, "R T N H"],
    lse: Float32[Array, "R T N"],
    axis: Axis,
    *,
    outputs: Outputs = "same",
    strategy: str = "auto",
    dtype: Any = None,
) -> Float[Array, "R T _ H"]:
    """The partial results (out, lse) of all ranks of `axis` as one, inside a shard_map.

    Args:
        outputs: "same" gives every rank all heads; "heads" gives rank r the heads from r N / C.
        strategy: one of `STRATEGIES`, or "auto" (see `choose_merge`).
        dtype: of the result; float32 by default.

    Raises:
        ValueError: unknown names; heads that do not divide where they must.
    """
    dtype = jnp.dtype(dtype or jnp.float32)
    check_choice("outputs", outputs, get_args(Outputs))
    check_choice("strategy", strategy, ("auto", *STRATEGIES))
    (R, T, N, H), ranks = out.shape, lax.axis_size(axis_names(axis))
    sizes = (R * T, N, H, ranks, outputs, dtype.itemsize)
    if strategy == "auto":
        strategy = choose_merge(*sizes)[0]
    if (obstacle := merge_costs(*sizes)[strategy].obstacle) is not None or (outputs == "heads" and N % ranks):
        raise ValueError(f"{strategy=} with {outputs=}: {obstacle or f'{N} heads do not divide over {ranks} ranks'}")
    out, lse = pcast_to((out, lse), axis_names(axis))
    if strategy == "all_reduce":
        out = merge_ranks(out, lse, axis)[0].astype(dtype)
        own = lax.axis_index(axis_names(axis)) * (N // ranks)
        return out if outputs == "same" else lax.dynamic_slice_in_dim(out, own, N // ranks, axis=2)
    merge = _reduce_scatter if strategy == "reduce_scatter" else _all_to_all
    out = merge(out, lse, axis_names(axis), ranks).astype(dtype)
    return gather_heads(out, axis) if outputs == "same" else out


def gather_heads(x: Float[Array, "R T n H"], axis: Axis) -> Float[Array, "R T N H"]:
    """All heads of queries or outputs of which each rank has its share, on all ranks."""
    return lax.all_gather(x, axis_names(axis), axis=2, tiled=True, to="invarying")


def _reduce_scatter(out: Any, lse: Any, axes: Any, ranks: int) -> Any:
    every = lax.all_gather(lse, axes)  # [C, R, T, N]
    share = weight(lse, jax.nn.logsumexp(every, axis=0))[..., None]
    return lax.psum_scatter(out * share, axes, scatter_dimension=2, tiled=True)


def _all_to_all(out: Any, lse: Any, axes: Any, ranks: int) -> Any:
    R, T, N, H = out.shape
    packed = jnp.concatenate([out, lse[..., None]], axis=-1).reshape(R, T, ranks, N // ranks, H + 1)
    packed = lax.all_to_all(packed, axes, 2, 2, tiled=True)  # of each rank
    out, lse = packed[..., :-1], packed[..., -1]
    share = weight(lse, jax.nn.logsumexp(lse, axis=2, keepdims=True))
    return jnp.sum(out * share[..., None], axis=2)
