"""Generation against the plainest way there is: the whole text through the model again for every token."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_jax
from ring_jax.inference import Sampling, generate, stream
from ring_jax.models.qwen3_5 import Qwen3_5, Sharding
from tests.inference.checkpoint import CONFIG, EOS, tiny_model

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
    assert result.prompt_tokens == 58 and result.seconds_to_first > 0
    # The devices give eight tokens of a row at a time; those that came first came in no time.
    assert result.tokens_decoding == sum(len(row) - 8 for row in plain) and result.tokens_per_second > 0
    assert generate(model, PROMPTS[:1], max_new_tokens=4, stop_ids=()).tokens_per_second == 0


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
    ("prompts", "options", "error", "match"),
    [
        ([], {}, ValueError, "at least one token"),
        ([[1], []], {}, ValueError, "at least one token"),
        (
            [[1, 999]],
            {},
            ValueError,
            r"prompts\[0\] holds token id 999, which is outside of the model's vocabulary of 257",
        ),
        ([[1], [3, -1]], {}, ValueError, r"prompts\[1\] holds token id -1"),
        ([[2**40]], {}, ValueError, "token id 1099511627776"),
        ([[2**80]], {}, ValueError, "a token id in prompts"),
        ([[1.7, 2.2]], {}, TypeError, r"a token id in prompts\[0\] must be an integer, got 1.7"),
        ([[True]], {}, TypeError, "must be an integer, got True"),
        ([np.ones(3)], {}, TypeError, r"prompts\[0\] must be integers \[S\], got float64 \(3,\)"),
        ([np.ones((1, 3), np.int32)], {}, TypeError, r"must be integers \[S\], got int32 \(1, 3\)"),
        ("123", {}, TypeError, "prompts must be token ids, got the text '123' .*: encode it"),
        (["123"], {}, TypeError, r"prompts\[0\] must be token ids, got the text '123' .*: encode it"),
        (
            [1, 2, 3],
            {},
            TypeError,
            r"prompts\[0\] must be a sequence of token ids, got 1 .*: one prompt is a list in a list",
        ),
        (np.arange(3), {}, TypeError, r"prompts\[0\] must be a sequence"),
        (3, {}, TypeError, "prompts must be a sequence of prompts, each of token ids, got 3"),
        (None, {}, TypeError, "prompts must be a sequence of prompts"),
        ([[1]], {"max_new_tokens": 0}, ValueError, "max_new_tokens must be >= 1, got 0"),
        ([[1]], {"max_new_tokens": 2.5}, TypeError, "max_new_tokens must be an integer, got 2.5"),
        ([[1] * 510], {"max_new_tokens": 3}, ValueError, "510 tokens and 3 new ones exceed the model's 512"),
        ([[1]], {"stop_ids": "abc"}, TypeError, "stop_ids must be a sequence of token ids or None, got 'abc'"),
        ([[1]], {"stop_ids": 3}, TypeError, "stop_ids must be a sequence"),
        ([[1]], {"stop_ids": [1.5]}, TypeError, "stop_ids must be an integer, got 1.5"),
        ([[1]], {"stop_ids": [257]}, ValueError, r"stop_ids must be in \[0, 256\], got 257"),
        ([[1]], {"sampling": None}, TypeError, "sampling must be a ring_jax.inference.Sampling, got None"),
        ([[1]], {"seed": "a"}, TypeError, "seed must be an integer"),
        ([[1]], {"on_tokens": 3}, TypeError, "on_tokens must be a function"),
    ],
)
def test_errors(model, prompts, options, error, match):
    with pytest.raises(error, match=match):
        generate(model, prompts, **options)
    if "on_tokens" not in options:
        with pytest.raises(error, match=match):  # at the call, before the first step is asked for
            stream(model, prompts, **options)


def test_what_is_no_model():
    for bad in (None, 3, object()):
        with pytest.raises(TypeError, match="model must be a ring_jax.models.qwen3_5.Qwen3_5"):
            generate(bad, [[1]])


def test_prompts_of_any_integers(model, plain):
    same = [np.arange(40, dtype=np.uint8), (5,), jnp.arange(100, 117)]
    assert generate(model, same, max_new_tokens=STEPS, stop_ids=set()).tokens == plain
    for prompts in (np.asarray([PROMPTS[2]]), jnp.asarray([[5]]), [np.int64([5])]):
        stream(model, prompts, stop_ids=np.zeros(0, np.int64))


def test_a_checkpoint_ends_where_any_of_its_files_says(model, plain, tmp_path):
    """The id in generation_config.json alone ends a row of the model, as it does for transformers."""
    stop = plain[0][3]
    assert stop != EOS
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, stop]}))
    loaded = Qwen3_5.from_pretrained(tmp_path / "a")
    assert loaded.config.eos_token_ids == (EOS, stop)
    found = generate(loaded, PROMPTS[:1], max_new_tokens=STEPS).tokens
    assert found == [plain[0][: plain[0].index(stop) + 1]]


def test_longest_prompt_that_fits(model):
    prompt = [1] * (CONFIG.max_positions - 1)
    assert len(generate(model, [prompt], max_new_tokens=1, stop_ids=()).tokens[0]) == 1
