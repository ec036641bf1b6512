"""Prefill once over all ranks, then decode token by token where keys and states lie."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ring_jax._mesh import axis_size
from ring_jax.inference.sampling import Sampling, sample

GREEDY = Sampling()


@dataclasses.dataclass
class Generation:
    """What was generated, and how fast.

    Fields:
        tokens: for each prompt the new token ids, the one that ended it included.
        prompt_tokens: of all prompts together, without padding.
        seconds_to_first: from the call to the first new tokens, compilation included.
        seconds_decoding: from the second new tokens (the first step compiles) to the last.
    """

    tokens: list[list[int]]
    prompt_tokens: int
    seconds_to_first: float = 0.0
    seconds_decoding: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of all rows together, after the second ones; 0 where there are none."""
        counted = sum(max(len(row) - 2, 0) for row in self.tokens)
        return counted / self.seconds_decoding if self.seconds_decoding > 0 else 0.0


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
    on_tokens: Callable[[list[int | None]], bool | None] | None = None,
) -> Generation:
    """Continues each prompt by up to `max_new_tokens` tokens.

    Args:
        model: a `ring_jax.models.qwen3_5.Qwen3_5`, on one device or over a mesh.
        prompts: token ids of each prompt, of any lengths, none empty.
        max_new_tokens: at most so many tokens for each.
        sampling, seed: how tokens are drawn; equal seeds give equal texts.
        stop_ids: tokens that end a row (default: the config's `eos_token_ids`).
        on_tokens: called after every step with each row's new token, None for rows that have ended; returning True
            ends all.

    Raises:
        ValueError: an empty prompt, ids outside of the vocabulary, or more tokens than the model has positions.

    Example:
        >>> generate(model, [tokenizer.encode("Once upon a time")], max_new_tokens=16).tokens  # doctest: +SKIP
    """
    begin = time.perf_counter()
    result = Generation([[] for _ in prompts], sum(len(p) for p in prompts))
    steps = stream(model, prompts, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop_ids=stop_ids)
    second = begin
    for step, tokens in enumerate(steps):
        now = time.perf_counter()
        if step == 0:
            result.seconds_to_first = now - begin
        elif step == 1:
            second = now
        else:
            result.seconds_decoding = now - second
        for row, token in zip(result.tokens, tokens, strict=True):
            if token is not None:
                row.append(token)
        if on_tokens is not None and on_tokens(tokens):
            break
    return result


def stream(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
) -> Iterator[list[int | None]]:
    """As `generate`, one step at a time: yields each row's new token, None for rows that have ended."""
    if len(prompts) == 0 or not all(len(p) for p in prompts):
        raise ValueError("every prompt needs at least one token, got an empty one (or none at all)")
    rows = len(prompts)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}")
    if max(map(len, prompts)) + max_new_tokens > model.config.max_positions:
        raise ValueError(
            f"a prompt of {max(map(len, prompts)):,} tokens and {max_new_tokens:,} new ones exceed the model's "
            f"{model.config.max_positions:,} positions"
        )
    if model.sharding is not None:  # rows of a data axis: the last are made up and never shown
        ranks = axis_size(model.sharding.resolve_mesh(), model.sharding.batch)
        prompts = [*prompts, *([[0]] * (-len(prompts) % ranks))]
    tokens, lengths = _batch(prompts, model.config, model.config.max_positions - max_new_tokens)
    stop = set(model.config.eos_token_ids if stop_ids is None else stop_ids)
    graph, state = nnx.split(model)
    params, key = nnx.to_pure_dict(state), jax.random.key(seed)
    last, cache = _prefill(graph, sampling, max_new_tokens, params, tokens, lengths, key)
    running = [True] * rows
    for step in range(max_new_tokens):
        if step:
            last, cache = _step(graph, sampling, params, last, cache, jax.random.fold_in(key, step))
        found: list[int | None] = [
            int(t) if alive else None for t, alive in zip(np.asarray(last)[:rows], running, strict=True)
        ]
        yield found
        running = [alive and t not in stop for t, alive in zip(found, running, strict=True)]
        if not any(running):
            return


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(graph, sampling: Sampling, room: int, params, tokens, lengths, key):
    out = nnx.merge(graph, nnx.State(params))(tokens, lengths=lengths, logits="last", cache_room=room)
    return sample(out.logits, key, sampling), out.cache


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4,))
def _step(graph, sampling: Sampling, params, tokens, cache, key):
    logits, cache = nnx.merge(graph, nnx.State(params)).decode(tokens, cache)
    return sample(logits, key, sampling), cache


def _batch(prompts: Sequence[Sequence[int]], config: Any, limit: int) -> tuple[jax.Array, jax.Array]:
    """Prompts padded on the right to one length, a little rounded up so that similar lengths share one program."""
    longest = max(map(len, prompts))
    step = max(64, 1 << max(longest.bit_length() - 4, 0))
    padded = np.zeros((len(prompts), min(-(-longest // step) * step, limit)), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    outside = (padded < 0) | (padded >= config.vocab_size)
    if outside.any():
        raise ValueError(
            f"token id {padded[outside][0]} is outside of the model's vocabulary of {config.vocab_size}: "
            "do tokenizer and checkpoint belong together?"
        )
    return jnp.asarray(padded), jnp.asarray([len(p) for p in prompts], jnp.int32)
