"""Checks of what users hand in to be continued."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ring_jax._checks import check_count, describe, is_array


def config_of(model: Any) -> Any:
    """The model's config; raises TypeError for what cannot generate."""
    if not callable(getattr(model, "decode", None)) or not hasattr(model, "config"):
        raise TypeError(f"model must be a ring_jax.models.qwen3_5.Qwen3_5, got {describe(model)}")
    return model.config


def check_prompts(prompts: Any) -> list[np.ndarray]:
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
        if all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in set(map(type, prompt))):
            # One by one, 128K of them take longer than a prefill of the next thousand.
            with contextlib.suppress(OverflowError):
                return np.asarray(prompt, np.int64)
        return np.asarray([check_count(f"a token id in {name}", t, -(2**63), 2**63 - 1) for t in prompt], np.int64)
    if prompt.ndim != 1 or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers [S], got {describe(prompt)}")
    return np.asarray(prompt)


def check_prompt(name: str, prompt: Any, config: Any) -> np.ndarray:
    """One prompt as integers [S] of the model's vocabulary."""
    row = _row(name, prompt)
    if not len(row):
        raise ValueError(f"{name} must hold at least one token")
    check_vocabulary(name, row, config)
    return row


def check_vocabulary(name: str, row: np.ndarray, config: Any) -> None:
    """Raises for ids that the model does not have."""
    outside = (row < 0) | (row >= config.vocab_size)
    if outside.any():
        raise ValueError(
            f"{name} holds token id {row[outside][0]}, which is outside of the model's vocabulary of "
            f"{config.vocab_size}: do tokenizer and checkpoint belong together?"
        )


def check_length(prompt: int, new: int, config: Any) -> None:
    """Raises where a text would exceed the model's positions."""
    if prompt + new > config.max_positions:
        raise ValueError(
            f"a prompt of {prompt:,} tokens and {new:,} new ones exceed the model's {config.max_positions:,} positions"
        )


def check_stop_ids(stop_ids: Any, config: Any) -> frozenset[int]:
    """The tokens that end a text; the config's where none are named."""
    if stop_ids is None:
        return frozenset(config.eos_token_ids)
    if isinstance(stop_ids, (str, bytes)) or not (
        isinstance(stop_ids, (Sequence, Set)) or (is_array(stop_ids) and stop_ids.ndim == 1)
    ):
        raise TypeError(f"stop_ids must be a sequence of token ids or None, got {describe(stop_ids)}")
    return frozenset(check_count("stop_ids", token, 0, config.vocab_size - 1) for token in stop_ids)
