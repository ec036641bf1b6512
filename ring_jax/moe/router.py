"""Which experts a token goes to, with what weight, and how evenly experts are used."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ring_jax import _repr
from ring_jax._arrays import rounded_to
from ring_jax._checks import Sizes, check_array, check_count, check_flag, check_instance, describe
from ring_jax.moe.hopper import top_k as hopper
from ring_jax.mosaic.device import runs_kernels


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """The experts of every token.

    Args:
        experts: int32 [T, k], best first; E where the token is not routed (padding).
        weights: float32 [T, k], the factors of the experts' outputs.
        probs: float32 [T, E], router probabilities; zero for padding.
    """

    experts: Int[Array, "T k"]
    weights: Float[Array, "T k"]
    probs: Float[Array, "T E"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStats:
    """Sums over tokens; add them up over layers, micro-batches and (with `lax.psum`) ranks before taking the loss.

    Args:
        counts: float32 [E], assignments of each expert; without a gradient.
        probs: float32 [E], sums of router probabilities; with a gradient.
        tokens: float32 [], number of valid tokens.
    """

    counts: Float[Array, " E"]
    probs: Float[Array, " E"]
    tokens: Float[Array, ""]
    __repr__ = _repr.of_fields

    def __add__(self, other: "RouterStats") -> "RouterStats":
        """Those of both sets of tokens."""
        if not isinstance(other, RouterStats):
            raise TypeError(f"RouterStats add up with others of their kind, got {describe(other)}")
        return jax.tree.map(jnp.add, self, other)

    @classmethod
    def of(cls, routing: Routing, valid: Bool[Array, " T"] | None = None) -> "RouterStats":
        """Those of one layer's tokens."""
        check_instance("routing", routing, Routing, "a ring_jax.moe.Routing")
        if valid is not None:
            check_array("valid", valid, "T", {"T": routing.probs.shape[0]}, kind="bool")
        experts, (tokens, count) = lax.stop_gradient(routing.experts), routing.probs.shape
        dtype = routing.probs.dtype
        chosen = experts[..., None] == jnp.arange(count, dtype=experts.dtype)[None, None]
        counts = chosen.sum(axis=(0, 1), dtype=jnp.int32).astype(dtype)
        seen = jnp.full((), tokens, dtype) if valid is None else valid.sum(dtype=jnp.int32).astype(dtype)
        return cls(counts, routing.probs.sum(axis=0), seen)


def route(
    x: Float[Array, "T D"],
    router: Float[Array, "D E"],
    *,
    top_k: int,
    renormalize: bool = True,
    valid: Bool[Array, " T"] | None = None,
) -> Routing:
    """The k experts with the highest softmax probability.

    Logits have x's dtype, as in transformers' `Qwen3_5MoeTopKRouter`; softmax, top-k and weights are float32 (there
    the weights are rounded to x's dtype at the end).

    Args:
        x: tokens. router: kernel [in, out].
        top_k: k, experts of a token.
        renormalize: scale the k weights to sum to one.
        valid: tokens that are not padding; default: all.

    Returns:
        The routing; of two equally probable experts the lower index wins.

    Example:
        >>> import jax.numpy as jnp
        >>> route(jnp.eye(2), jnp.array([[0.0, 1.0, 2.0], [3.0, 1.0, 2.0]]), top_k=2).experts.tolist()
        [[2, 1], [0, 2]]
    """
    sizes = Sizes()
    check_array("x", x, "T D", sizes, advice="flatten batch and sequence first")
    check_array("router", router, "D E", sizes)
    if router.dtype != x.dtype:
        raise ValueError(f"router must have x's dtype {x.dtype}, got {router.dtype}: cast it first")
    check_top_k(top_k, sizes["E"])
    check_flag("renormalize", renormalize)
    if valid is not None:
        check_array("valid", valid, "T", sizes, kind="bool", advice="one entry per token")
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    # Explicit, since XLA leaves out the rounding between a product and a cast: near ties would depend on the program.
    logits = rounded_to(x @ router, x.dtype)
    probs = jax.nn.softmax(logits.astype(wide), axis=-1)
    if runs_kernels() and hopper.worthwhile(probs, top_k):
        _, experts = hopper.top_k(lax.stop_gradient(probs), top_k)
        weights = jnp.take_along_axis(probs, experts, axis=-1)
    else:
        weights, experts = lax.top_k(probs, top_k)
    if renormalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    if valid is not None:
        here = valid[:, None]
        experts = jnp.where(here, experts, jnp.full_like(experts, router.shape[1]))
        weights, probs = (jnp.where(here, a, jnp.zeros_like(a)) for a in (weights, probs))
    return Routing(experts, weights, probs)


def check_top_k(top_k: int, experts: int) -> None:
    """Raises unless a token can go to so many of these experts."""
    check_count("top_k", top_k, 1, experts, advice="a token goes to some of the router's experts")


def load_balance_loss(stats: RouterStats) -> Float[Array, ""]:
    """Auxiliary loss that is lowest, k, when all experts are used alike.

        E * sum_e (counts_e / tokens) (probs_e / tokens)

    Args:
        stats: summed over all layers and all tokens (of all ranks).

    Returns:
        float32 scalar; the gradient flows through the probabilities only. Zero without tokens.

    Example:
        >>> import jax.numpy as jnp
        >>> float(load_balance_loss(RouterStats(jnp.array([4.0, 4.0]), jnp.array([2.0, 2.0]), jnp.array(4.0))))
        2.0

    Source: Fedus, Zoph, Shazeer, Switch Transformers (arXiv 2101.03961), eq. 4-6, summed over the k choices as
    transformers' `load_balancing_loss_func` does.
    """
    check_instance("stats", stats, RouterStats, "a ring_jax.moe.RouterStats")
    sizes = Sizes()
    check_array("stats.counts", stats.counts, "E", sizes)
    check_array("stats.probs", stats.probs, "E", sizes)
    check_array("stats.tokens", stats.tokens, "")
    tokens = jnp.maximum(stats.tokens, jnp.ones_like(stats.tokens))
    used = lax.stop_gradient(stats.counts) / tokens
    return stats.counts.shape[0] * jnp.sum(used * (stats.probs / tokens))
