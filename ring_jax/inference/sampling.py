"""From logits to the next token."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, UInt32

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

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, low=0, advice="0 takes the most likely token")
        if self.top_k is not None:
            check_count("top_k", self.top_k, 1, advice="None takes all tokens")
        check_number("top_p", self.top_p, above=0, high=1, advice="1 takes all tokens")

    @property
    def cuts(self) -> bool:
        """Whether some tokens are never drawn, for which a vocabulary has to be sorted."""
        return self.temperature > 0 and (self.top_k is not None or self.top_p < 1)


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


MOST_TOP = 20  # most likely tokens whose log-probabilities a step can give


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSampling:
    """How each row's next token is drawn, as arrays: no value compiles anything again.

    Fields:
        temperature: 0 takes the most likely token. top_k: 0 for all. top_p. seed: uint32 [R, 2], high and low half.
        top: how many log-probabilities of the most likely tokens are asked for.
    """

    temperature: Float32[Array, " R"]
    top_k: Int[Array, " R"]
    top_p: Float32[Array, " R"]
    seed: UInt32[Array, "R 2"]
    top: Int[Array, " R"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """Fields: token. log_probability of it, before temperature and cuts. The most likely tokens (zeros where no row asks for
    them) and theirs. finite: whether all logits of the row were."""

    token: Int[Array, " R"]
    log_probability: Float32[Array, " R"]
    top_tokens: Int[Array, "R top"]
    top_log_probabilities: Float32[Array, "R top"]
    finite: Bool[Array, " R"]


def draw(logits: Float[Array, "R V"], position: Int[Array, " R"], how: RowSampling, *, easy: bool = False) -> Drawn:
    """Each row's next token, by its own sampling and a key of its own seed and position: rows do not see each other, and a text
    that is computed again is drawn again.

    Sorting a large vocabulary costs more than a layer, so it is done only where a row asks for it. `easy` says that none does: then
    there are no branches, for which a GPU would ask the host.
    """
    logits = logits.astype(jnp.float32)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    warm = how.temperature > 0
    scaled = logits / jnp.where(warm, how.temperature, 1.0)[:, None]

    def drawn() -> jax.Array:
        cut = warm & ((how.top_k > 0) | (how.top_p < 1))
        kept = scaled if easy else jax.lax.cond(jnp.any(cut), lambda: _cut(scaled, how), lambda: scaled)
        keys = jax.vmap(lambda s, p: jax.random.fold_in(jax.random.wrap_key_data(s, impl="threefry2x32"), p))
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys(how.seed, position))
        return jnp.where(warm, jnp.argmax(kept + noise, axis=-1).astype(jnp.int32), greedy)

    token = drawn() if easy else jax.lax.cond(jnp.any(warm), drawn, lambda: greedy)
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - total
    most = min(MOST_TOP, logits.shape[1])

    def top() -> tuple[jax.Array, jax.Array]:
        values, tokens = jax.lax.top_k(logits, most)
        return values - total[:, None], tokens.astype(jnp.int32)

    none = jnp.zeros_like(logits[:, :most]), jnp.zeros_like(greedy)[:, None] * jnp.zeros(most, jnp.int32)[None]
    values, tokens = none if easy else jax.lax.cond(jnp.any(how.top > 0), top, lambda: none)
    return Drawn(token, chosen, tokens, values, jnp.all(jnp.isfinite(logits), axis=-1))


def _cut(scaled: Float32[Array, "R V"], how: RowSampling) -> Float32[Array, "R V"]:
    """-inf for tokens beyond the k-th, and of the rest beyond the fewest with probabilities of p in all; ties stay."""
    ranked = jnp.sort(scaled, axis=-1, descending=True)
    k = jnp.where(how.top_k > 0, jnp.minimum(how.top_k, scaled.shape[1]), scaled.shape[1])
    kept = ranked >= jnp.take_along_axis(ranked, k[:, None] - 1, axis=-1)
    probabilities = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(kept & (before < how.top_p[:, None]), ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= least, scaled, -jnp.inf)
