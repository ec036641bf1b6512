"""Generation against the plainest way there is: the whole text through the model again for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_jax
from ring_jax.inference import Sampling, generate, stream
from ring_jax.models.qwen3_5 import Sharding
from tests.inference.checkpoint import CONFIG, tiny_model

PROMPTS = [list(range(40)), [5], list(range(100, 117))]
STEPS = 12


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def plain(model):
    """Greedy continuations, every token from a pass over all tokens before it."""
    rows = [list(p) for p in PROMPTS]
    for _ in range(STEPS):
        tokens = np.zeros((len(rows), 64), np.int32)
        for row, values in zip(tokens, rows, strict=True):
            row[: len(values)] = values
        lengths = jnp.asarray([len(r) for r in rows], jnp.int32)
        logits = model(jnp.asarray(tokens), lengths=lengths, logits="last").logits
        for row, token in zip(rows, np.asarray(logits).argmax(-1), strict=True):
            row.append(int(token))
    return [row[len(p) :] for row, p in zip(rows, PROMPTS, strict=True)]


def test_greedy_equals_whole_passes(model, plain):
    result = generate(model, PROMPTS, max_new_tokens=STEPS, stop_ids=())
    assert result.tokens == plain
    assert result.prompt_tokens == 58 and result.seconds_to_first > 0 and result.tokens_per_second > 0


@pytest.mark.parametrize("kind", ["Explicit", pytest.param("Auto", marks=pytest.mark.slow)])
def test_the_same_over_a_mesh(plain, kind):
    axis_types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((4, 1), ("context", "tensor"), axis_types=axis_types, devices=jax.devices()[:4])
    cp = ring_jax.ContextParallel("context", layout="zigzag", head_axis="tensor", mesh=mesh)
    sharded = tiny_model(sharding=Sharding(cp, weights="context"))
    assert generate(sharded, PROMPTS, max_new_tokens=STEPS, stop_ids=()).tokens == plain


def test_rows_end_by_themselves(model, plain):
    stop = plain[0][3]
    found = generate(model, PROMPTS, max_new_tokens=STEPS, stop_ids=(stop,)).tokens
    for row, whole in zip(found, plain, strict=True):
        assert row == whole[: whole.index(stop) + 1 if stop in whole else STEPS]
    steps = list(stream(model, PROMPTS[:1], max_new_tokens=STEPS, stop_ids=(stop,)))
    assert len(steps) == 4


def test_callback_ends_all(model, plain):
    seen = []
    generate(model, PROMPTS, max_new_tokens=STEPS, stop_ids=(), on_tokens=lambda t: seen.append(t) or len(seen) == 2)
    assert seen == [[row[i] for row in plain] for i in range(2)]


def test_seeds(model):
    once = [
        generate(model, PROMPTS, max_new_tokens=STEPS, sampling=Sampling(2.0, top_k=50), seed=seed, stop_ids=()).tokens
        for seed in (1, 1, 2)
    ]
    assert once[0] == once[1] != once[2]


@pytest.mark.parametrize(
    ("prompts", "options", "match"),
    [
        ([], {}, "at least one token"),
        ([[1], []], {}, "at least one token"),
        ([[1, 999]], {}, "999 is outside of the model's vocabulary of 257"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be positive"),
        ([[1] * 510], {"max_new_tokens": 3}, "510 tokens and 3 new ones exceed the model's 512"),
    ],
)
def test_errors(model, prompts, options, match):
    with pytest.raises(ValueError, match=match):
        generate(model, prompts, **options)


def test_longest_prompt_that_fits(model):
    prompt = [1] * (CONFIG.max_positions - 1)
    assert len(generate(model, [prompt], max_new_tokens=1, stop_ids=()).tokens[0]) == 1
