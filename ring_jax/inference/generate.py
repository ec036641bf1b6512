"""A few prompts continued together: the engine, filled once and run until all have ended."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ring_jax._checks import check_callable, check_count, check_instance
from ring_jax.inference.engine import GREEDY, Engine
from ring_jax.inference.pool import context_ranks, default_page
from ring_jax.inference.prompts import check_length, check_prompts, check_stop_ids, check_vocabulary, config_of
from ring_jax.inference.sampling import Sampling


@dataclasses.dataclass
class Generation:
    """What was generated, and how fast.

    Fields:
        tokens: for each prompt the new token ids, the one that ended it included.
        prompt_tokens: of all prompts together, without padding.
        seconds_to_first: from the call to the first new tokens, compilation included. The devices give several tokens of
            a row at a time.
        seconds_decoding: from the first of these times to the last.
        tokens_decoding: how many tokens came in `seconds_decoding`, of all rows together.
    """

    tokens: list[list[int]]
    prompt_tokens: int
    seconds_to_first: float = 0.0
    seconds_decoding: float = 0.0
    tokens_decoding: int = 0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of all rows together, after those that came first; 0 where all came at once."""
        return self.tokens_decoding / self.seconds_decoding if self.seconds_decoding > 0 else 0.0


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
    rows: Any = check_prompts(prompts)
    steps = _checked(model, rows, max_new_tokens, sampling, seed, stop_ids)
    result = Generation([[] for _ in rows], sum(len(row) for row in rows))
    for step, (tokens, fresh) in enumerate(steps):
        if step == 0:
            result.seconds_to_first = time.perf_counter() - begin
        elif fresh:
            result.seconds_decoding = time.perf_counter() - begin - result.seconds_to_first
        if result.seconds_decoding > 0:
            result.tokens_decoding += sum(token is not None for token in tokens)
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
    return (tokens for tokens, _ in _checked(model, prompts, max_new_tokens, sampling, seed, stop_ids))


def _checked(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    stop_ids: Sequence[int] | None,
) -> Iterator[tuple[list[int | None], bool]]:
    """The steps of `stream`, once its arguments are known to be right."""
    rows = check_prompts(prompts)
    config = config_of(model)
    check_count("max_new_tokens", max_new_tokens, 1)
    check_instance("sampling", sampling, Sampling, "a ring_jax.inference.Sampling")
    check_count("seed", seed, -(2**63), 2**63 - 1)
    stop = check_stop_ids(stop_ids, config)
    check_length(max(map(len, rows)), max_new_tokens, config)
    for number, row in enumerate(rows):
        check_vocabulary(f"prompts[{number}]", row, config)
    return _steps(model, rows, int(max_new_tokens), sampling, int(seed), stop)


def _steps(
    model: Any, prompts: list[np.ndarray], max_new_tokens: int, sampling: Sampling, seed: int, stop: frozenset[int]
) -> Iterator[tuple[list[int | None], bool]]:
    """Each step's tokens, and whether the devices were asked for them: other steps had been computed with one before."""
    engine = Engine(model, **_sizes(model, prompts, max_new_tokens))
    options: Any = {"max_new_tokens": max_new_tokens, "sampling": sampling, "stop_ids": stop}
    requests = [engine.submit(row, seed=_seed(seed, number), **options) for number, row in enumerate(prompts)]
    for step in range(max_new_tokens):
        fresh = False
        for request in requests:
            while len(request.tokens) <= step and not request.done:
                engine.step()
                fresh = True
            if request.error is not None:
                raise RuntimeError(f"generation failed: {request.error}") from request.error
        found = [request.tokens[step] if step < len(request.tokens) else None for request in requests]
        if all(token is None for token in found):
            return
        yield found, fresh


def _seed(seed: int, number: int) -> int:
    """Rows of one call differ, the first has the seed itself."""
    return (seed + number * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63


def _sizes(model: Any, prompts: list[np.ndarray], max_new_tokens: int) -> dict[str, Any]:
    """Rows for all prompts, up to 32, and pages for what runs at once; rounded up, so that similar calls share programs."""
    ranks = context_ranks(model.sharding)
    rows = next((r for r in (1, 8) if r >= len(prompts)), 32)
    page = default_page(ranks)
    longest = min(_power(max(map(len, prompts)) + max_new_tokens), model.config.max_positions)
    pages = -(-longest // (ranks * page))
    return {"rows": rows, "page": page, "pages": rows * pages, "snapshots": 0}


def _power(n: int) -> int:
    """The next power of four times 64 that is not less."""
    size = 64
    while size < n:
        size *= 4
    return size
