"""The token mixer of a GDN layer from projected inputs to heads, as pure functions: one text for every partition.

    mixed = x W_qkv = [q | k | v],  (b, a) = x W_ba
    mixed = silu(causal_convolution(mixed));  q, k <- l2norm per head
    beta = sigmoid(b);  log_decay = -exp(A_log) softplus(a + dt_bias)      float32
    out, state = gated_delta_rule(q, k, v, log_decay, beta)

Source: transformers' `Qwen3_5GatedDeltaNet` and `Qwen3NextGatedDeltaNet`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ring_jax import _repr
from ring_jax._checks import check_array, check_count, check_dtype, check_instance
from ring_jax.context.shard import axis_to_seq
from ring_jax.gdn import by_head, segments
from ring_jax.gdn.checks import widened
from ring_jax.gdn.convolved import convolved
from ring_jax.gdn.cost import gathers_input
from ring_jax.gdn.heads import Heads
from ring_jax.gdn.partition import HeadSplit, Partition


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GDNCache:
    """What a GDN layer hands from one call to the next; a pytree.

    Under context parallelism all context ranks hold the same cache (batch sharded over the batch axis): a decoded
    token is computed on all of them without any communication.

    Fields:
        state: after the last valid token, float32.
        tail: the last W - 1 inputs of the convolution, zeros where the document is shorter.
        segment: id of the last valid token, negative where none was given; a first token with another id starts anew.
    """

    state: Float[Array, "B N dk dv"]
    tail: Float[Array, "B W-1 F"]
    segment: Int[Array, " B"]
    __repr__ = _repr.of_fields

    @classmethod
    def empty(cls, batch: int, heads: Heads, width: int, dtype: Any = jnp.float32) -> "GDNCache":
        """The cache before the first token; `dtype` is that of the activations."""
        check_count("batch", batch)
        check_instance("heads", heads, Heads, "ring_jax.gdn.Heads")
        check_count("width", width, 1)
        check_dtype("dtype", dtype)
        return cls(
            jnp.zeros(
                (batch, heads.value_heads, heads.key_size, heads.value_size),
                jnp.float64 if dtype == jnp.float64 else jnp.float32,
            ),
            jnp.zeros((batch, width - 1, heads.features), dtype),
            jnp.full((batch,), segments.PADDING, jnp.int32),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MixerWeights:
    """Weights up to the heads. Key features of all heads lie together, as do the values: [q | k | v]."""

    qkv: tuple[Float[Array, "D _"], ...]  # one kernel of all three parts, or one for each
    ba: tuple[Float[Array, "D _"], ...]  # b of all heads, then a; one kernel or two
    conv: Float[Array, "W F"]
    a_log: Float[Array, " N"]
    dt_bias: Float[Array, " N"]
    heads: Heads = dataclasses.field(metadata={"static": True})
    precision: Any = dataclasses.field(default=None, metadata={"static": True})  # of the projections

    def project(self, x: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """q, k and v, or the three in one array [B, T, F], and (b | a) [B, T, 2N], in x's dtype."""

        def product(kernel: jax.Array) -> jax.Array:
            return jnp.matmul(x, kernel.astype(x.dtype), precision=self.precision)

        return tuple(product(kernel) for kernel in self.qkv), product(by_head.joined(self.ba))


def mix(
    weights: MixerWeights,
    x: Float[Array, "B T D"],
    cache: GDNCache | None,
    partition: Partition,
    implementation: str | None = None,
    projected: Float[Array, "B T K P"] | None = None,
) -> tuple[Float[Array, "B T N dv"], GDNCache]:
    """Layer input to heads before the output norm, and the cache to go on from.

    Args:
        weights: all of them, on every rank.
        x: the tokens that are here under `partition`.
        cache: of the tokens before; None for none.
        partition: how tokens lie.
        implementation: of the gated delta rule.
        projected: of x, from a caller who has it already, key head by key head (`by_head`); not used where `projects_own_heads`.
    """
    if cache is None:
        tail = jnp.zeros((x.shape[0], weights.conv.shape[0] - 1, weights.heads.features), x.dtype)
        segment = jnp.full(x.shape[:1], segments.PADDING, jnp.int32)
        cache = GDNCache(None, tail, segment)  # type: ignore[arg-type]  # no state to read
    edges = partition.edge_segments()
    if edges is not None:
        first, last = edges
        carried = lambda c: segments.carried(c, cache.segment, first)  # noqa: E731
        state, tail = jax.tree.map(carried, (cache.state, cache.tail))
        cache = GDNCache(state, tail, jnp.where(last >= 0, last, cache.segment))
    if projects_own_heads(weights.heads, x.shape[-1], partition):
        return _mix_head_split(weights, x, None, cache, partition, implementation)
    if projected is None:
        parts, ba = weights.project(x)
    else:
        heads = weights.heads
        check_array("projected", projected, f"B T {heads.key_heads} {heads.stride}", {"B": x.shape[0], "T": x.shape[1]})
        parts, ba = (projected,), by_head.strength_and_decay(projected, heads)
    if isinstance(partition, HeadSplit):
        return _mix_head_split(weights, x, (parts, ba), cache, partition, implementation)
    return mix_projected(weights, parts, ba, cache, partition, implementation)


def projects_own_heads(heads: Heads, width: int, partition: Partition) -> bool:
    """Whether a layer under `partition` gathers its input and projects it to its own heads alone: its weights are then cut
    into those heads at run time."""
    return isinstance(partition, HeadSplit) and gathers_input(heads, width, partition.shard.ranks)


def mix_projected(
    weights: MixerWeights,
    parts: Any,
    ba: jax.Array,
    cache: GDNCache,
    partition: Partition,
    implementation: str | None = None,
) -> tuple[jax.Array, GDNCache]:
    """From the projections on, `parts` as `convolved` takes them. `cache.segment` is already that of the last token."""
    query, key, value, tail = convolved(parts, weights.conv, weights.heads, cache.tail, partition, implementation)
    b, a = jnp.split(widened(ba), 2, axis=-1)
    a_log, dt_bias = (widened(x)[None, None] for x in (weights.a_log, weights.dt_bias))
    log_decay = -jnp.exp(a_log) * jax.nn.softplus(a + dt_bias)
    out, state = partition.gated_delta_rule(
        query,
        key,
        value,
        log_decay,
        jax.nn.sigmoid(b),
        initial_state=cache.state,
        implementation=implementation,
    )
    return out, GDNCache(state, tail, cache.segment)


def _mix_head_split(
    weights: MixerWeights,
    x: jax.Array,
    projected: Any,
    cache: GDNCache,
    partition: Any,
    implementation: str | None,
) -> tuple[jax.Array, GDNCache]:
    """`projected` is None where own heads are projected here, from the gathered input."""
    heads, shard = weights.heads, partition.shard
    partition.check_heads(heads.key_heads, heads.value_heads)
    ranks, rank = shard.ranks, shard.rank()
    own = _own_weights(weights, rank, ranks)
    if projected is None:
        x = lax.all_gather(x, shard.axis, axis=1, tiled=True)
        parts, ba = own.project(shard.layout.restore(x, 1, ranks))
    else:
        parts, ba = projected
        mixed, ba = _exchange(by_head.joined_inputs(parts, heads), ba, heads, partition)
        parts = (mixed,)
    state = jax.tree.map(lambda state: partition.own(state, 1), cache.state)  # None where there is none
    here = GDNCache(state, _own(cache.tail, heads.parts, rank, ranks), cache.segment)
    out, here = mix_projected(own, parts, ba, here, partition.inside, implementation)
    out = axis_to_seq(out, shard, 2)
    return out, GDNCache(partition.everyone(here.state, 1), _everyone(here.tail, heads.parts, partition), cache.segment)


def _exchange(mixed: jax.Array, ba: jax.Array, heads: Heads, partition: HeadSplit) -> tuple[jax.Array, jax.Array]:
    """Projections of all heads for the tokens here to those of own heads for all tokens: one all-to-all."""
    shard, parts = partition.shard, (*heads.parts, heads.value_heads, heads.value_heads)
    packed = jnp.concatenate([mixed, ba], axis=-1)
    by_rank = [p.reshape(*p.shape[:2], shard.ranks, p.shape[2] // shard.ranks) for p in _split(packed, parts)]
    packed = jnp.concatenate(by_rank, axis=-1)  # [B, T/C, C, features/C]
    packed = lax.all_to_all(packed, shard.axis, 2, 1, tiled=True)[:, :, 0]
    packed = shard.layout.restore(packed, 1, shard.ranks)
    features = heads.features // shard.ranks
    return packed[..., :features], packed[..., features:]


def _own_weights(weights: MixerWeights, rank: Any, ranks: int) -> MixerWeights:
    n, parts = weights.heads.value_heads, weights.heads.parts
    return MixerWeights(
        qkv=_own_kernels(weights.qkv, parts, rank, ranks),
        ba=_own_kernels(weights.ba, (n, n), rank, ranks),
        conv=_own(weights.conv, parts, rank, ranks),
        a_log=_own(weights.a_log, (n,), rank, ranks),
        dt_bias=_own(weights.dt_bias, (n,), rank, ranks),
        heads=weights.heads.share(ranks),
        precision=weights.precision,
    )


def _split(x: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
    """The last axis cut into parts of the given sizes."""
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [x[..., start:end] for start, end in zip(ends[:-1], ends[1:], strict=True)]


def _own(x: jax.Array, sizes: tuple[int, ...], rank: Any, ranks: int) -> jax.Array:
    """This rank's share of each part of the last axis."""
    return jnp.concatenate(
        [
            lax.dynamic_slice_in_dim(part, rank * (size // ranks), size // ranks, part.ndim - 1)
            for part, size in zip(_split(x, sizes), sizes, strict=True)
        ],
        axis=-1,
    )


def _own_kernels(
    kernels: tuple[jax.Array, ...], sizes: tuple[int, ...], rank: Any, ranks: int
) -> tuple[jax.Array, ...]:
    if not kernels:  # the caller has projected
        return ()
    if len(kernels) == 1:
        return (_own(kernels[0], sizes, rank, ranks),)
    return tuple(_own(kernel, (size,), rank, ranks) for kernel, size in zip(kernels, sizes, strict=True))


def _everyone(x: jax.Array, sizes: tuple[int, ...], partition: HeadSplit) -> jax.Array:
    """Inverse of `_own`, on all ranks."""
    ranks = partition.shard.ranks
    shares = [partition.everyone(part, part.ndim - 1) for part in _split(x, tuple(size // ranks for size in sizes))]
    return jnp.concatenate(shares, axis=-1)
