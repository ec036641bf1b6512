"""Engines over meshes of emulated devices, and what they are compared with: single passes of the plain model over each whole text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

import ring_jax
from ring_jax.inference import Engine
from ring_jax.inference.requests import Request
from ring_jax.models.qwen3_5 import Config, Qwen3_5, Sharding
from tests.inference.checkpoint import tiny_model
from tests.support.mesh import make_mesh

TOKENS = 832  # of the pool: fewer than four of the texts that run together in `check_preempted`
Tokens = Sequence[int]


def over(config: Config, **axes: int) -> Qwen3_5:
    """The model over a mesh of these axes: context, and data, tensor or expert; on one device where there are none."""
    if not axes:
        return tiny_model(config)
    named = {field: axis for field, axis in (("batch_axis", "data"), ("head_axis", "tensor")) if axis in axes}
    context = ring_jax.ContextParallel("context", layout="zigzag", mesh=make_mesh(**axes), **named)
    expert = "expert" if "expert" in axes else None
    if config.experts is not None and expert is None and config.experts.count % axes["context"] == 0:
        expert = "context"
    return tiny_model(config, sharding=Sharding(context, expert=expert, weights="context"))


def make_engine(config: Config, **axes: int) -> Engine:
    """A small pool of `TOKENS` tokens, whatever the mesh."""
    model, ranks = over(config, **axes), axes.get("context", 1)
    least = 64 if model.sharding is None else model.sharding.context.padded_length(64)
    page = -(-32 // ranks)
    sizes = {"page": page, "pages": -(-TOKENS // (page * ranks)), "snapshots": 24}
    return Engine(model, rows=4, chunk=least, decode_steps=4, **sizes)


@dataclasses.dataclass(frozen=True)
class Plain:
    """One pass of the model on one device."""

    config: Config

    def __call__(self, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
        """(logits [S, V], GDN states behind the last token) of a text."""
        padded = np.zeros((1, self.config.max_positions - 1), np.int32)
        padded[0, : len(tokens)] = tokens
        lengths = jnp.asarray([len(tokens)], jnp.int32)
        out = _model(self.config)(jnp.asarray(padded), lengths=lengths, logits="all", cache_room=1)
        return np.asarray(out.logits)[0, : len(tokens)], np.asarray(out.cache.gdn.state)[:, :, 0]


@functools.cache
def _model(config: Config) -> Qwen3_5:
    return tiny_model(config)


def text(rng: np.random.Generator, length: int, config: Config) -> list[int]:
    return [int(t) for t in rng.integers(0, config.vocab_size - 1, length)]


def run(engine: Engine, *prompts: Tokens, **options) -> list[Request]:
    requests = [engine.submit(prompt, **{"max_new_tokens": 6, "stop_ids": ()} | options) for prompt in prompts]
    engine.run()
    return requests


def check(request: Request, prompt: Tokens, plain: Plain) -> None:
    """Each token is the most likely one of a pass over all before it, with the log-probabilities of that pass."""
    assert request.done and request.finish_reason == "length" and request.error is None
    found = plain([*prompt, *request.tokens])[0][len(prompt) - 1 : -1].astype(np.float64)
    assert request.tokens == found.argmax(axis=1).tolist()
    likely = found - np.log(np.exp(found).sum(axis=1, keepdims=True))
    chosen = likely[np.arange(len(request.tokens)), request.tokens]
    np.testing.assert_allclose(request.log_probabilities, chosen, rtol=1e-5, atol=1e-4)
    for step, pairs in enumerate(request.top):
        np.testing.assert_allclose([x for _, x in pairs], likely[step, [t for t, _ in pairs]], rtol=1e-5, atol=1e-4)


def check_states(engine: Engine, prompt: Tokens, plain: Plain, salt: str = "") -> None:
    """The snapshot at the end of a prefill is what one pass leaves."""
    found = engine._scheduler.prefixes.find(np.asarray(prompt, np.int32), salt.encode())
    assert found.tokens == len(prompt) - 1
    assert found.snapshot is not None
    saved = np.asarray(engine._pool.saved)[found.snapshot.slot]
    expected = plain(prompt[:-1])[1]
    saved, padding = np.split(saved, [expected.shape[-1]], axis=-1)
    assert not padding.any()
    error = np.linalg.norm(saved - expected) / np.linalg.norm(expected)
    assert error <= 5e-6, error
