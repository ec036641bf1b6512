"""Prefill once over all ranks, then decode token by token where keys and states lie."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ring_jax._checks import check_callable, check_count, check_instance, describe, is_array
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
        stop_ids: tokens that end a row. Default: the config's `eos_token_ids`, for a checkpoint all that its config,
            generation config and tokenizer name.
        on_tokens: called after every step with each row's new token, None for rows that have ended; returning True
            ends all.

    Raises:
        TypeError: prompts that are no sequences of integers (text has to be encoded first), or another argument of a
            wrong type.
        ValueError: an empty prompt, ids outside of the vocabulary, or more tokens than the model has positions.

    Example:
        >>> from ring_jax.data import passkey
        >>> from ring_jax.inference.tokenizer import Tokenizer
        >>> from ring_jax.models.qwen3_5 import Qwen3_5
        >>> model, tokenizer = Qwen3_5.from_pretrained(passkey.MODEL), Tokenizer(passkey.MODEL)
        >>> text = generate(model, [tokenizer.encode("Once upon a time")], max_new_tokens=2)
        >>> [len(row) for row in text.tokens]
        [2]
    """
    begin = time.perf_counter()
    check_callable("on_tokens", on_tokens, "a function of each step's tokens", optional=True)
    rows: Any = _rows(prompts)
    steps = stream(model, rows, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop_ids=stop_ids)
    result = Generation([[] for _ in rows], sum(len(row) for row in rows))
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
    rows = _rows(prompts)
    config = _config(model)
    check_count("max_new_tokens", max_new_tokens, 1)
    check_instance("sampling", sampling, Sampling, "a ring_jax.inference.Sampling")
    check_count("seed", seed, -(2**63), 2**63 - 1)
    stop = frozenset(config.eos_token_ids if stop_ids is None else _stop_ids(stop_ids, config.vocab_size))
    longest = max(map(len, rows))
    if longest + max_new_tokens > config.max_positions:
        raise ValueError(
            f"a prompt of {longest:,} tokens and {max_new_tokens:,} new ones exceed the model's "
            f"{config.max_positions:,} positions"
        )
    for number, row in enumerate(rows):
        outside = (row < 0) | (row >= config.vocab_size)
        if outside.any():
            raise ValueError(
                f"prompts[{number}] holds token id {row[outside][0]}, which is outside of the model's vocabulary of "
                f"{config.vocab_size}: do tokenizer and checkpoint belong together?"
            )
    return _steps(model, rows, int(max_new_tokens), sampling, int(seed), stop)


def _steps(
    model: Any, prompts: list[np.ndarray], max_new_tokens: int, sampling: Sampling, seed: int, stop: frozenset[int]
) -> Iterator[list[int | None]]:
    rows = len(prompts)
    if model.sharding is not None:  # rows of a data axis: the last are made up and never shown
        ranks = axis_size(model.sharding.resolve_mesh(), model.sharding.batch)
        prompts = [*prompts, *([np.zeros(1, np.int32)] * (-len(prompts) % ranks))]
    tokens, lengths = _batch(prompts, model.config.max_positions - max_new_tokens)
    (program, params), key = model.split(), jax.random.key(seed)
    last, cache = _prefill(program, sampling, max_new_tokens, params, tokens, lengths, key)
    running = [True] * rows
    for step in range(max_new_tokens):
        if step:
            last, cache = _step(program, sampling, params, last, cache, jax.random.fold_in(key, step))
        found: list[int | None] = [
            int(t) if alive else None for t, alive in zip(np.asarray(last)[:rows], running, strict=True)
        ]
        yield found
        running = [alive and t not in stop for t, alive in zip(found, running, strict=True)]
        if not any(running):
            return


def _config(model: Any) -> Any:
    """The model's config; raises TypeError for what cannot generate."""
    if not callable(getattr(model, "decode", None)) or not hasattr(model, "config"):
        raise TypeError(f"model must be a ring_jax.models.qwen3_5.Qwen3_5, got {describe(model)}")
    return model.config


def _rows(prompts: Any) -> list[np.ndarray]:
    """Each prompt as integers [S]."""
    if isinstance(prompts, (str, bytes)):
        raise TypeError(
            f"prompts must be token ids, got the text {describe(prompts)}: encode it with the tokenizer first"
        )
    if not (is_array(prompts) and prompts.ndim) and not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a sequence of prompts, each of token ids, got {describe(prompts)}")
    rows = [_row(f"prompts[{number}]", prompt) for number, prompt in enumerate(prompts)]
    if not rows or not all(map(len, rows)):
        raise ValueError("every prompt needs at least one token, got an empty one (or none at all)")
    return rows


def _row(name: str, prompt: Any) -> np.ndarray:
    if isinstance(prompt, (str, bytes)):
        raise TypeError(
            f"{name} must be token ids, got the text {describe(prompt)}: encode it with the tokenizer first"
        )
    if not is_array(prompt) and not isinstance(prompt, Sequence) or is_array(prompt) and prompt.ndim == 0:
        raise TypeError(
            f"{name} must be a sequence of token ids, got {describe(prompt)}: one prompt is a list in a list"
        )
    if isinstance(prompt, jax.core.Tracer):
        raise ValueError(f"{name} must be known, got a traced array: generation is a loop on the host")
    if not is_array(prompt):
        return np.asarray([check_count(f"a token id in {name}", t, -(2**63), 2**63 - 1) for t in prompt], np.int64)
    if prompt.ndim != 1 or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers [S], got {describe(prompt)}")
    return np.asarray(prompt)


def _stop_ids(stop_ids: Any, vocabulary: int) -> list[int]:
    if isinstance(stop_ids, (str, bytes)) or not (
        isinstance(stop_ids, (Sequence, Set)) or (is_array(stop_ids) and stop_ids.ndim == 1)
    ):
        raise TypeError(f"stop_ids must be a sequence of token ids or None, got {describe(stop_ids)}")
    return [check_count("stop_ids", token, 0, vocabulary - 1) for token in stop_ids]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(program, sampling: Sampling, room: int, params, tokens, lengths, key):
    out = program(params, tokens, lengths=lengths, logits="last", cache_room=room)
    return sample(out.logits, key, sampling), out.cache


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4,))
def _step(program, sampling: Sampling, params, tokens, cache, key):
    logits, cache = program.decode(params, tokens, cache)
    return sample(logits, key, sampling), cache


def _batch(prompts: Sequence[np.ndarray], limit: int) -> tuple[jax.Array, jax.Array]:
    """Prompts padded on the right to one length, a little rounded up so that similar lengths share one program."""
    longest = max(map(len, prompts))
    step = max(64, 1 << max(longest.bit_length() - 4, 0))
    padded = np.zeros((len(prompts), min(-(-longest // step) * step, limit)), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(padded), jnp.asarray([len(p) for p in prompts], jnp.int32)
