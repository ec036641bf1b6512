"""The mixture of experts of one layer: checks, routing, exchange, products."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ring_jax._checks import (
    Sizes,
    check_array,
    check_choice,
    check_flag,
    check_instance,
    check_mesh_axes,
    renamed_arguments,
)
from ring_jax._device import target
from ring_jax._mesh import Axis, axis_names
from ring_jax.moe.backends import BACKENDS, Implementation, select
from ring_jax.moe.exchange import STRATEGIES, Exchange, Gathered, Here, choose_strategy, slices
from ring_jax.moe.ragged import Ragged
from ring_jax.moe.router import RouterStats, Routing, check_top_k, route


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEWeights:
    """Parameters of one layer's routed experts, as they lie on this rank. Kernels are [in, out].

    Args:
        router: [D, E], of all experts.
        gate_up: [E / ranks, D, 2, F], gate first.
        down: [E / ranks, F, D].
    """

    router: Float[Array, "D E"]
    gate_up: Float[Array, "e D 2 F"]
    down: Float[Array, "e F D"]


@renamed_arguments(exchange="strategy")
def moe(
    x: Float[Array, "T D"],
    weights: MoEWeights,
    *,
    top_k: int,
    renormalize: bool = True,
    expert_axis: Axis | None = None,
    tokens_spread: bool = True,
    tensor_axis: Axis | None = None,
    valid: Bool[Array, " T"] | None = None,
    strategy: str = "auto",
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "T D"], RouterStats]:
    """Each token through the k experts that the router picks for it; no token is ever dropped.

        y_t = sum_{e in top-k} w_te down_e^T (silu(gate_e^T x_t) * up_e^T x_t)

    A plain function on local arrays: call it inside a shard_map that is manual over the axes named here, or without
    any mesh. Its cost is that of T k assignments, whatever E is.

    Args:
        x: the tokens here; float32, bfloat16 or float16 (float64 where x64 is on).
        weights: x's dtype. The router is whole; experts lie over `expert_axis` in order (rank r holds
            r E / C ... (r + 1) E / C - 1), their features F over `tensor_axis`.
        top_k: k. renormalize: scale the k weights to sum to one.
        expert_axis: mesh axis (or several) of the experts; None: all are here.
        tokens_spread: whether the ranks of `expert_axis` hold different tokens (training, prefill), as many on each.
            False: the same tokens are on all of them (decode).
        tensor_axis: mesh axis of the experts' features; the same tokens are on all of its ranks.
        strategy: how different tokens reach the experts: "gather" (all_gather and psum_scatter), "ragged"
            (ragged_all_to_all, on GPUs), "auto" takes the one that moves fewer bytes (see `ring_jax.moe.exchange`).
        implementation: of the experts' products, "mosaic" (Hopper kernels) or "xla"; None takes the best that runs here.
        valid: False for padding, which is not routed, gives zeros and is not counted, whatever x holds there.

    Returns:
        y in x's dtype, summed in float32, the same on all ranks of `tensor_axis` (and of `expert_axis` where the
        tokens are); and the router's statistics over the tokens here.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit, an unknown strategy, or an axis that is none here.
        NotImplementedError: strategy="ragged" on CPUs, or a named implementation that cannot run here.

    Example:
        >>> import jax.numpy as jnp
        >>> weights = MoEWeights(jnp.ones((4, 8)), jnp.ones((8, 4, 2, 6)), jnp.ones((8, 6, 4)))
        >>> y, stats = moe(jnp.ones((3, 4)), weights, top_k=2)
        >>> y.shape, stats.counts.sum().item()
        ((3, 4), 6.0)

    Source: as transformers' `Qwen3_5MoeSparseMoeBlock` without its shared expert.
    """
    check_flag("renormalize", renormalize)
    check_flag("tokens_spread", tokens_spread)
    check_choice("strategy", strategy, ("auto", *STRATEGIES))
    expert_axis, ranks = _axis_ranks("expert_axis", expert_axis)
    tensor_axis, _ = _axis_ranks("tensor_axis", tensor_axis)
    shared = set(axis_names(expert_axis)) & set(axis_names(tensor_axis))
    if shared:
        raise ValueError(f"expert_axis and tensor_axis must differ, both name {sorted(shared)}")
    if strategy != "auto" and (expert_axis is None or not tokens_spread):
        raise ValueError(
            f"strategy={strategy!r} moves tokens that differ between ranks: it needs an expert_axis and tokens_spread=True"
        )
    _check(x, weights, top_k, ranks, valid)
    check_choice("implementation", implementation, BACKENDS, optional=True)
    if valid is not None:
        x = jnp.where(valid[:, None], x, jnp.zeros_like(x))
    routing = route(x, weights.router, top_k=top_k, renormalize=renormalize, valid=valid)
    stats = RouterStats.of(routing, valid)
    if x.shape[0] == 0:  # XLA gathers no empty arrays
        return jnp.zeros_like(x), stats
    with jax.named_scope("moe"):
        if expert_axis is None or not tokens_spread:
            here = Here(expert_axis, tensor_axis)
            y = _run(x, routing.experts, routing.weights, weights, expert_axis, lambda experts: here, implementation)
        else:
            chosen = choose_strategy(strategy, ranks, top_k, target().platform)
            y = _run_spread(x, routing, weights, expert_axis, tensor_axis, chosen, implementation)
    return y.astype(x.dtype), stats


def _run_spread(
    x: jax.Array,
    routing: Routing,
    weights: MoEWeights,
    axis: Axis,
    tensor: Axis | None,
    strategy: str,
    implementation: Implementation | None,
) -> jax.Array:
    """Tokens differ between the ranks of `axis`; long sequences go slice by slice."""

    def exchange(experts: jax.Array) -> Exchange:
        ragged = strategy == "ragged"
        return Ragged.of(experts, weights.gate_up.shape[0], axis, tensor) if ragged else Gathered(axis, tensor)

    count = slices(x.shape[0], lax.axis_size(axis))
    if count == 1:
        return _run(x, routing.experts, routing.weights, weights, axis, exchange, implementation)

    def cut(a: jax.Array, fill: int = 0) -> jax.Array:
        size = -(-x.shape[0] // count)
        a = jnp.pad(a, ((0, size * count - a.shape[0]), (0, 0)), constant_values=fill)
        return a.reshape(count, size, -1)

    pieces = cut(x), cut(routing.experts, weights.router.shape[1]), cut(routing.weights)
    # The rows of other ranks are not kept for the backward pass: those of all slices would need the room again.
    one = jax.checkpoint(lambda x, experts, factors: _run(x, experts, factors, weights, axis, exchange, implementation))
    return lax.map(lambda piece: one(*piece), pieces).reshape(-1, x.shape[1])[: x.shape[0]]


def _run(
    x: jax.Array,
    experts: jax.Array,
    factors: jax.Array,
    weights: MoEWeights,
    axis: Axis | None,
    make_exchange: Callable[[jax.Array], Exchange],
    implementation: Implementation | None,
) -> jax.Array:
    """Sums of the experts' outputs, float32 [T, D], for int32 [T, k] experts (E: none) and their factors."""
    count, total = weights.gate_up.shape[0], weights.router.shape[1]
    exchange = make_exchange(experts)
    # Numbers of experts travel with their factors, as one array; 0 is none, and exact: there are fewer than 2^24.
    number = (experts + 1) % (total + 1)
    packed = jnp.concatenate([factors, number.astype(factors.dtype)], axis=1)
    x, packed = exchange.send(x), exchange.send(packed)
    factors, number = jnp.split(packed, 2, axis=1)
    first = 0 if axis is None else lax.axis_index(axis).astype(jnp.int32) * count
    experts = lax.stop_gradient(number).astype(jnp.int32) - 1 - first
    arrays = x, weights.gate_up, weights.down
    return exchange.combine(select(implementation, *arrays).run(*arrays, factors, experts, total))


def _check(x: Array, weights: MoEWeights, top_k: int, ranks: int, valid: jax.Array | None) -> None:
    check_instance("weights", weights, MoEWeights, "a ring_jax.moe.MoEWeights")
    sizes = Sizes()
    check_array("x", x, "T D", sizes, advice="flatten batch and sequence first")
    check_array("weights.router", weights.router, "D E", sizes)
    check_array("weights.gate_up", weights.gate_up, "e D 2 F", sizes, advice="gate first")
    check_array("weights.down", weights.down, "e F D", sizes)
    here, experts = sizes["e"], sizes["E"]
    if here * ranks != experts:
        raise ValueError(
            f"the router knows {experts} experts, but {ranks} ranks with {here} each hold {here * ranks}: shard gate_up and "
            "down over expert_axis, and only there"
        )
    check_top_k(top_k, experts)
    for name in ("router", "gate_up", "down"):
        if getattr(weights, name).dtype != x.dtype:
            raise ValueError(
                f"weights.{name} must have x's dtype {x.dtype}, got {getattr(weights, name).dtype}: cast the parameters first"
            )
    if valid is not None:
        check_array("valid", valid, "T", sizes, kind="bool", advice="one entry per token")


def _axis_ranks(name: str, axis: Axis | None) -> tuple[Axis | None, int]:
    """Mesh axes as a name or a tuple, and how many ranks they have."""
    if axis is None:
        return None, 1
    axis = check_mesh_axes(name, axis)
    try:
        return axis, lax.axis_size(axis)
    except NameError:
        raise ValueError(
            f"{name}={axis!r} is no axis here: call moe inside a shard_map that is manual over it, or leave it out"
        ) from None
