"""The bundled model: small, complete, and it finds the key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.data.byte_tokenizer import END, tokens_of
from ring_jax.data.passkey import MODEL, held_out_text, random_text
from ring_jax.models.qwen3_5 import Qwen3_5


def missed(length: int, depths) -> list[float]:
    """Depths of keys that are not the most likely answer, digit by digit, full stop and end included."""
    random, text = np.random.default_rng(length), held_out_text()
    found = [random_text(random, length - 7, depth, text=text) for depth in depths]
    tokens = tokens_of([x.prompt + x.answer + chr(END) for x in found])
    model = Qwen3_5.from_pretrained(MODEL, dtype=jnp.float32)
    logits = jax.jit(lambda tokens: model(tokens, logits="all").logits)(tokens)
    right = np.asarray(logits[:, -8:-1].argmax(axis=-1)) == tokens[:, -7:]
    return [depth for depth, good in zip(depths, right.all(axis=1), strict=True) if not good]


def test_finds_the_key():
    assert missed(512, [0.0, 0.3, 0.6, 1.0]) == []


@pytest.mark.slow
def test_finds_the_key_far_away():
    assert missed(16384, [0.0, 0.25, 0.5, 0.75]) == []


def test_is_complete_and_small():
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert sum(sizes.values()) < 5 * 10**6
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert set(sizes) == wanted
