"""The strategies by name, and the rule behind strategy="auto".

A strategy is one function, called inside a shard_map that is manual over the context axis:

    strategy(spec, shard, query, kv, start, end, carry) -> (out, lse)

query [B, T/C, N, H] local; kv packed local; start, end int32 [B, T/C] *global* key bounds, monotone;
carry None or float32 (out, lse) to resume from. To add one: write that function, register it in
`STRATEGIES`, add its name to the harness in tests/context.
"""

from collections.abc import Callable

from ring_jax.context.gather import all_gather
from ring_jax.context.pass_q import pass_q
from ring_jax.context.ring import ring
from ring_jax.context.shard import Axis
from ring_jax.context.ulysses import ring_ulysses, ulysses

STRATEGIES: dict[str, Callable] = {
    "ring": ring,
    "pass_q": pass_q,
    "all_gather": all_gather,
    "ulysses": ulysses,
    "ring_ulysses": ring_ulysses,
}

# Up to this many keys per rank, two or three long calls beat several short hops (BUILD_NOTES.md), and up to this many in all
# every rank can hold them: KV of 8 heads of 128 then takes 1 GiB, and its float32 gradients 2.
_SHORT_SHARD, _GATHERED = 8192, 2**18


NAMES = ("auto", *sorted(STRATEGIES))


def choose(
    *, query_len: int, key_len: int, ranks: int, query_heads: int, kv_heads: int, head_size: int, axis: Axis = "context"
) -> tuple[str, str]:
    """The strategy that "auto" picks, and the reason in words.

    Args:
        query_len, key_len: whole (padded) lengths. ranks: context ranks C.
        query_heads, kv_heads, head_size: of the arrays on one rank.
        axis: the context axis; two axes leave only ring_ulysses.

    Example:
        >>> choose(query_len=512, key_len=1 << 20, ranks=8, query_heads=8, kv_heads=8, head_size=128)[0]
        'pass_q'
    """
    if isinstance(axis, tuple):
        return "ring_ulysses", "the sequence is spread over two mesh axes"
    if ranks > 2 and key_len // ranks <= _SHORT_SHARD and key_len <= _GATHERED:
        return (
            "all_gather",
            f"{key_len // ranks} keys per rank <= {_SHORT_SHARD}: few balanced calls beat {ranks} short hops",
        )
    # Elements per hop in units of two bytes: KV once, against queries, and float32 partials one hop behind.
    pass_kv = key_len * kv_heads * 2 * head_size
    pass_query = query_len * query_heads * (head_size + 2 * (head_size + 1))
    if 2 * pass_query < pass_kv:
        return "pass_q", f"queries and their partials are {pass_query / pass_kv:.2f} of the bytes of KV"
    if ranks <= 2:
        return "ring", f"{ranks} rank{'s' * (ranks > 1)}: at most one hop, which is all that gathering would do, too"
    return "ring", f"{key_len // ranks} keys per rank: long enough to hide the rotation of KV"
