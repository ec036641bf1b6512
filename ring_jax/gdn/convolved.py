"""From projections to the operands of the gated delta rule: convolution, SiLU and the l2 norms of queries and keys.

Where the rule runs its Hopper kernel and the tokens here are whole sequences or whole chunks of one, all of it is one kernel
(`hopper/conv.py`) that reads q, k and v where they are and rounds once; else the plain form, which runs anything anywhere.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ring_jax.gdn import by_head
from ring_jax.gdn.backends import select
from ring_jax.gdn.checks import widened
from ring_jax.gdn.heads import Heads
from ring_jax.gdn.hopper import conv
from ring_jax.gdn.hopper.conv_kernel import NORM_EPSILON
from ring_jax.gdn.partition import OneDevice, Partition
from ring_jax.gdn.state_passing import StatePassing
from ring_jax.mosaic.device import hopper_reason


def convolved(
    parts: tuple[Float[Array, "B T ..."], ...],
    weight: Float[Array, "W F"],
    heads: Heads,
    tail: Float[Array, "B W-1 F"],
    partition: Partition,
    implementation: str | None,
) -> tuple[Array, Array, Array, Array]:
    """Queries, keys [B, T, K, dk] and values [B, T, N, dv] for the tokens here, and the whole sequence's leaving tail.

    Args:
        parts: projections q, k and v, or the three in one array, or one array of all projections by key heads [B, T, K, P].
        weight, tail: as `causal_convolution` takes them.
        implementation: of the rule that comes next; where it is the Hopper kernel queries and keys are rounded to its 16 bits,
            else they keep all digits of their norms.
    """
    batch, time = parts[0].shape[:2]
    kinds = zip(heads.parts, (heads.key_size, heads.key_size, heads.value_size), strict=True)
    shapes = [(batch, time, size // of_head, of_head) for size, of_head in kinds]
    like = (jax.ShapeDtypeStruct(shape, parts[0].dtype) for shape in shapes)
    rounds = select(implementation, *like).name == "mosaic"
    if rounds and (hopper_reason() or conv.unsupported_reason(parts, weight, heads)) is None:
        if isinstance(partition, OneDevice):
            return conv.convolve(parts, weight, heads, tail=tail, segment_ids=partition.segment_ids)
        if isinstance(partition, StatePassing) and partition.passes_whole_tails(weight.shape[0] - 1):
            return _by_chunks(parts, weight, heads, tail, partition)
    mixed, tail = partition.causal_convolution(by_head.joined_inputs(parts, heads), weight, tail=tail)
    ends = [heads.parts[0], sum(heads.parts[:2])]
    query, key, value = (
        x.reshape(shape) for x, shape in zip(jnp.split(jax.nn.silu(mixed), ends, axis=2), shapes, strict=True)
    )
    query, key = l2_normalize(query), l2_normalize(key)
    if rounds:
        query, key = query.astype(value.dtype), key.astype(value.dtype)
    return query, key, value, tail


def _by_chunks(
    parts: Any, weight: jax.Array, heads: Heads, tail: jax.Array, partition: StatePassing
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Each chunk here after the last inputs of the one before it, all at once as rows of a batch."""
    chunks, history = partition.chunks, weight.shape[0] - 1
    split = [chunks.split(x) for x in parts]
    last = by_head.joined_inputs([x[:, :, x.shape[2] - history :] for x in split], heads, leading=3)
    entering = partition.entering_tails(last, tail)
    rows: Any = tuple(x.reshape(-1, *x.shape[2:]) for x in split)
    *operands, leaving = conv.convolve(rows, weight, heads, tail=entering.reshape(-1, *entering.shape[2:]))
    by_chunk = lambda x: x.reshape(*entering.shape[:2], *x.shape[1:])  # noqa: E731
    query, key, value = (chunks.join(by_chunk(x)) for x in operands)
    return query, key, value, chunks.of_last(by_chunk(leaving))


def l2_normalize(x: Float[Array, "... H"]) -> Float[Array, "... H"]:
    """x / sqrt(sum x^2 + 1e-6) over the last axis, in float32 and left there: the delta rule takes it so."""
    x = widened(x)
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + NORM_EPSILON)
