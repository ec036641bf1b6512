"""From logits to the next token."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ring_jax._checks import (
    check_array,
    check_count,
    check_instance,
    check_number,
    describe,
    is_array,
)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Static under jit.

    Args:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: draw from the k most likely tokens only; None for all.
        top_p: of these, from the fewest whose probabilities sum to at least p; 1 for all.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        check_number("temperature", self.temperature, low=0, advice="0 takes the most likely token")
        if self.top_k is not None:
            check_count("top_k", self.top_k, 1, advice="None takes all tokens")
        check_number("top_p", self.top_p, above=0, high=1, advice="1 takes all tokens")


def sample(logits: Float[Array, "B V"], key: jax.Array, sampling: Sampling = Sampling()) -> Int[Array, " B"]:  # noqa: B008
    """One token for each row, int32 [B].

    Temperature first, then top-k, then top-p of what is left, as Hugging Face's generate does. Ties at the k-th logit
    all stay in; of equal logits greedy takes the first.

    Args:
        logits: float [B, V].
        key: a JAX random key; not used at temperature 0.
        sampling: temperature, top_k, top_p.

    Example:
        >>> sample(jnp.array([[0.0, 2.0, 1.0]]), jax.random.key(0)).tolist()
        [1]

    Source: Holtzman et al., The Curious Case of Neural Text Degeneration (arXiv:1904.09751), for top-p.
    """
    check_array("logits", logits, "B V")
    if logits.shape[1] == 0:
        raise ValueError(f"logits must have a vocabulary of at least one token, got shape {logits.shape}")
    check_instance("sampling", sampling, Sampling, "a ring_jax.inference.Sampling")
    if not is_array(key) or not (jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32):
        raise TypeError(f"key must be a JAX random key, got {describe(key)}: make one with jax.random.key(seed)")
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / sampling.temperature
    vocabulary = logits.shape[-1]
    if sampling.top_k is not None and sampling.top_k < vocabulary:
        threshold = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    if sampling.top_p < 1:
        order = jnp.argsort(logits, axis=-1, descending=True)
        ranked = jnp.take_along_axis(logits, order, axis=-1)
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
        drawn = jax.random.categorical(key, ranked, axis=-1)
        return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
