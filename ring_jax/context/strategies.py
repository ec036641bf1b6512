"""The strategies by name, and the one place where strategy and backend of a call are chosen.

A strategy is one function, called inside a shard_map that is manual over the context axis:

    strategy(block, shard, query, kv, bounds, carry) -> (out in `block.out_dtype(query)`, float32 lse)

block: what computes (`flash.block.Block`), whose `backend` takes and gives what `flash/backends.py` says; shard: where the *keys* lie
(of the queries a strategy knows the bounds alone: they may have another length and another layout); query [B, T/C, N, H] local; kv local,
packed in one of two shapes (`flash/kv.py`); bounds int32 [B, T/C] on *global* key positions, monotone; carry None or float32 (out, lse)
to resume from. `flash.block.differentiable` makes one of a forward and a gradient function; float32 gradients are what the latter
gives. CONTRIBUTING.md says how to add one.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

from ring_jax._arrays import Shaped
from ring_jax._checks import check_choice
from ring_jax._hardware import HOPPER, Hardware
from ring_jax._mesh import Axis
from ring_jax._repr import figure
from ring_jax.context import cudnn_ring
from ring_jax.context.cost import costs
from ring_jax.context.gather import all_gather
from ring_jax.context.pass_q import pass_q
from ring_jax.context.ring import ring
from ring_jax.context.shard import Shard
from ring_jax.context.ulysses import ring_ulysses, ulysses
from ring_jax.flash.backends import FixedMask, Implementation, select
from ring_jax.flash.block import Block
from ring_jax.flash.operands import BlockOptions, Partial

StrategyName = Literal["auto", "ring", "pass_q", "all_gather", "ulysses", "ring_ulysses"]

STRATEGIES: dict[str, Callable[..., Partial]] = {
    "ring": ring,
    "pass_q": pass_q,
    "all_gather": all_gather,
    "ulysses": ulysses,
    "ring_ulysses": ring_ulysses,
}

# Up to so many bytes of KV every rank can hold all of them; the float32 gradients take twice that.
_GATHERED = 2**30
# Another strategy than the ring, which holds the least, must be so much faster.
_GAIN = 0.02


NAMES = get_args(StrategyName)


def check_strategy(strategy: StrategyName, axis: Axis | None = None) -> None:
    """Raises unless `strategy` is a name that fits the context axis."""
    check_choice("strategy", strategy, dict.fromkeys((*NAMES, *STRATEGIES)))
    if axis is not None and strategy != "auto" and (strategy == "ring_ulysses") != isinstance(axis, tuple):
        raise ValueError(
            f"strategy {strategy!r} does not fit context axis {axis!r}: 'ring_ulysses' takes two mesh axes (outer, inner), "
            "the others one"
        )


class Choice(NamedTuple):
    """What runs a call, and why."""

    strategy: StrategyName
    block: Block
    reason: str


def choose(
    strategy: StrategyName,
    implementation: Implementation | None,
    keys: Shard,
    query: Shaped,
    kv: Shaped,
    options: BlockOptions,
    fixed_mask: FixedMask | None = None,
) -> Choice:
    """Strategy and backend of a call, from the arrays of one rank.

    Args:
        strategy: a name, or "auto". implementation: a backend's name, or None for the best that runs.
        keys: where the keys lie. query, kv: of one rank, or their shapes and dtypes.
        options: of the block.
        fixed_mask: what the call's mask is known to be, over whole sequences.
    """
    reason = "asked for"
    if strategy == "auto":
        strategy, reason = choose_strategy(
            query_len=query.shape[1] * keys.ranks, key_len=keys.length, ranks=keys.ranks, axis=keys.axis,
            query_heads=query.shape[2], kv_heads=kv.shape[-2], head_size=query.shape[3],
        )  # fmt: skip
        ring_mask = _block_mask("ring", keys, query, fixed_mask)
        if strategy == "all_gather" and ring_mask != _block_mask("all_gather", keys, query, fixed_mask):
            if select(implementation, query, kv, options, ring_mask).name == "cudnn":
                strategy, reason = "ring", "cuDNN is the block, which takes no causal mask over gathered keys"
    backend = select(implementation, query, kv, options, _block_mask(strategy, keys, query, fixed_mask))
    return Choice(strategy, Block(backend, options), f"{strategy}: {reason}; block {backend.name}")


def _block_mask(strategy: StrategyName, keys: Shard, query: Shaped, fixed_mask: FixedMask | None) -> FixedMask | None:
    """The mask that every block of a strategy sees, where the whole call's is `fixed_mask`."""
    if fixed_mask != "causal":
        return fixed_mask
    natural = keys.ranks == 1 or strategy == "ulysses"
    same_length = query.shape[1] * keys.ranks == keys.length
    cut = strategy in ("ring", "ring_ulysses") and cudnn_ring.serves(keys.layout) and same_length
    return "causal" if natural or cut else None


def choose_strategy(
    *,
    query_len: int,
    key_len: int,
    ranks: int,
    query_heads: int,
    kv_heads: int,
    head_size: int,
    axis: Axis = "context",
    bytes_per_second: float | None = None,
    gpu: Hardware = HOPPER,
) -> tuple[StrategyName, str]:
    """The strategy that "auto" picks, and the reason in words: the fastest by `context.cost`, the ring where that gains little.

    Args:
        query_len, key_len: whole (padded) lengths. ranks: context ranks C.
        query_heads, kv_heads, head_size: of the arrays on one rank.
        axis: the context axis; two axes leave only ring_ulysses.
        bytes_per_second: that a rank receives; None for NVLink.

    Example:
        >>> choose_strategy(query_len=512, key_len=1 << 20, ranks=8, query_heads=8, kv_heads=8, head_size=128)[0]
        'pass_q'
    """
    if isinstance(axis, tuple):
        return "ring_ulysses", "the sequence is spread over two mesh axes"
    if ranks <= 2:
        return "ring", f"{ranks} rank{'s' * (ranks > 1)}: at most one hop, which is all that gathering would do, too"
    found = costs(
        query_len=query_len, key_len=key_len, ranks=ranks,
        query_heads=query_heads, kv_heads=kv_heads, head_size=head_size, bytes_per_second=bytes_per_second, gpu=gpu,
    )  # fmt: skip
    able: list[StrategyName] = ["pass_q", "all_gather"] if _holds(key_len, kv_heads, head_size) else ["pass_q"]
    best = min(able, key=lambda name: found[name].seconds)
    name: StrategyName = best if found[best].seconds < (1 - _GAIN) * found["ring"].seconds else "ring"
    figures = ", ".join(f"{name} {figure(1e3 * found[name].seconds)} ms" for name in ("ring", *able))
    return name, f"{figures} a layer; {_BECAUSE[name]}"


_BECAUSE = {
    "ring": "long shards hide the rotation of KV",
    "pass_q": "queries and their partials are fewer bytes than KV",
    "all_gather": "few balanced calls beat many short hops",
}


def _holds(key_len: int, kv_heads: int, head_size: int) -> bool:
    return 4 * key_len * kv_heads * head_size <= _GATHERED
