"""The engine against one pass of the plain model over each whole text: whatever the chunks, hits, neighbours and ranks."""

import asyncio
import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_jax
from ring_jax.inference import Engine, Sampling
from ring_jax.models.qwen3_5 import Sharding
from tests.inference.checkpoint import CONFIG, EOS, tiny_model

RNG = np.random.default_rng(0)
LONGEST = CONFIG.max_positions
TOKENS = 832  # of the pool: less than four of the texts that run in `test_preempted`


def make_engine(ranks: int, kind: str = "Auto", **options) -> Engine:
    model, least = tiny_model(), 64
    if ranks > 1:
        axis_types = (getattr(jax.sharding.AxisType, kind),)
        mesh = jax.make_mesh((ranks,), ("context",), axis_types=axis_types, devices=jax.devices()[:ranks])
        cp = ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh)
        model, least = tiny_model(sharding=Sharding(cp, weights="context")), cp.padded_length(64)
    page = -(-32 // ranks)
    sizes = {"rows": 4, "chunk": least, "page": page, "pages": -(-TOKENS // (page * ranks)), "snapshots": 24}
    return Engine(model, decode_steps=4, **sizes | options)


@pytest.fixture(scope="module")
def one():
    return make_engine(1)


@pytest.fixture(
    scope="module",
    params=[1, 2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (3, 4, 8))],
    ids="C{}".format,
)
def engine(request, one):
    return one if request.param == 1 else make_engine(request.param, "Explicit" if request.param == 2 else "Auto")


@pytest.fixture(scope="module")
def logits():
    """All logits of a text, from one pass."""
    model = tiny_model()

    def of(tokens):
        padded = np.zeros((1, LONGEST), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(model(jnp.asarray(padded), lengths=jnp.asarray([len(tokens)])).logits)[0, : len(tokens)]

    return of


def text(length: int) -> list[int]:
    return [int(t) for t in RNG.integers(0, EOS, length)]


def check(request, prompt, logits, *, tolerance=1e-4):
    """Each token is the most likely one of a pass over all before it, with that pass's probability."""
    assert request.done and request.finish_reason == "length" and request.error is None
    found = logits([*prompt, *request.tokens])[len(prompt) - 1 : -1].astype(np.float64)
    chosen = found[np.arange(len(request.tokens)), request.tokens]
    assert (found.max(axis=1) - chosen < tolerance).all()
    total = np.log(np.exp(found).sum(axis=1))
    np.testing.assert_allclose(request.log_probabilities, chosen - total, atol=tolerance)


def run(engine, *prompts, **options):
    requests = [engine.submit(prompt, **{"max_new_tokens": 6, "stop_ids": ()} | options) for prompt in prompts]
    engine.run()
    return requests


def test_equals_one_pass(engine, logits):
    """Prompts of many lengths share rows and wait for them; then the same again, and a second turn of each."""
    engine.reset()
    prompts = [text(length) for length in (1, 40, 64, 65, 129)]
    first = run(engine, *prompts)
    for request, prompt in zip(first, prompts, strict=True):
        check(request, prompt, logits)
        assert request.hit_tokens == 0 and request.prefilled_tokens == len(prompt) - 1
    for request, before in zip(run(engine, *prompts), first, strict=True):
        assert request.tokens == before.tokens
        assert request.hit_tokens == request.prompt_tokens - 1 and request.prefilled_tokens == 0
    turns = [[*prompt, *request.tokens, *text(20)] for prompt, request in zip(prompts, first, strict=True)]
    for request, prompt, before in zip(run(engine, *turns), turns, first, strict=True):
        check(request, prompt, logits)
        assert request.hit_tokens == before.prompt_tokens + 5  # all but the last of the answer, which nothing followed


def test_warm_equals_cold_bit_by_bit(engine):
    """Where a text resumes on the grid of chunks, it is computed by the same programs from the same bits."""
    engine.reset()
    begin = text(2 * engine.chunk)
    prompt = [*begin, *text(50)]
    (cold,) = run(engine, prompt, salt="cold")
    run(engine, [*begin, *text(20)])
    (warm,) = run(engine, prompt)
    assert (cold.hit_tokens, warm.hit_tokens) == (0, 2 * engine.chunk)
    assert warm.tokens == cold.tokens and warm.log_probabilities == cold.log_probabilities


def test_preempted(engine, logits):
    """A pool too small for all: the youngest waits, and goes on where it was."""
    engine.reset()
    prompts = [text(100) for _ in range(4)]
    for request, prompt in zip(run(engine, *prompts, max_new_tokens=140), prompts, strict=True):
        check(request, prompt, logits)
    assert engine.stats().preemptions > 0
    again = engine.stats().prefilled_tokens - 4 * 99
    assert 0 < again < 140, (
        "it resumes from a snapshot, that of its prompt at least, where the others took its last pages"
    )


def test_any_cuts(one, logits):
    one.reset()
    prompt = text(150)
    (whole,) = run(one, prompt)
    (cut,) = run(one, prompt, salt="cut", checkpoints=(1, 3, 17, 50, 51, 64, 133))
    check(cut, prompt, logits)
    assert cut.tokens == whole.tokens
    np.testing.assert_allclose(cut.log_probabilities, whole.log_probabilities, atol=1e-5)


def test_strangers_change_nothing(one):
    one.reset()
    prompt, warm = text(90), Sampling(1.5, top_k=40, top_p=0.9)
    alone = [run(one, prompt, salt="alone", sampling=how)[0].tokens for how in (Sampling(), warm)]
    requests = [one.submit(text(length), max_new_tokens=9, sampling=Sampling(3.0)) for length in (30, 3, 140)]
    for how, tokens in zip((Sampling(), warm), alone, strict=True):
        among = one.submit(prompt, max_new_tokens=6, stop_ids=(), sampling=how, salt=str(how))
        one.run()
        assert among.tokens == tokens
    assert all(request.done for request in requests)


def test_sampling_of_a_request(one, logits):
    one.reset()
    prompt = text(30)
    (greedy,) = run(one, prompt, top_log_probabilities=3)
    expected = logits([*prompt, *greedy.tokens])[len(prompt) - 1 : -1]
    for step, pairs in enumerate(greedy.top):
        want = np.argsort(-expected[step])[:3]
        assert [token for token, _ in pairs] == want.tolist() and pairs[0][0] == greedy.tokens[step]
        assert abs(pairs[0][1] - greedy.log_probabilities[step]) < 1e-6
    same = run(one, prompt, prompt, sampling=Sampling(1.0, top_k=1))
    assert [request.tokens for request in same] == [greedy.tokens] * 2
    drawn = [run(one, prompt, sampling=Sampling(2.0), seed=seed)[0].tokens for seed in (1, 1, 2, -(2**63))]
    assert drawn[0] == drawn[1] != drawn[2] != drawn[3]
    stop = greedy.tokens[2]
    for others in ((), range(200, 220)):  # few enough for the device, and too many
        (ended,) = run(one, prompt, stop_ids=(stop, *(t for t in others if t not in greedy.tokens)))
        assert ended.tokens == greedy.tokens[: greedy.tokens.index(stop) + 1] and ended.finish_reason == "stop"


def test_nothing_is_compiled_after_warmup(one):
    """200 texts of random lengths, samplings and ends."""
    one.reset()
    assert one.warmup() == len(list(one._ladders.every_program())) == 7
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "compile" in name else None
    )
    begin = text(300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(200):
            prompt = [*begin[: RNG.integers(0, 300)], *text(int(RNG.integers(1, 90)))]
            how = Sampling(
                float(RNG.choice([0.0, 0.7])), top_k=[None, 5][RNG.integers(2)], top_p=float(RNG.choice([0.5, 1.0]))
            )
            one.submit(
                prompt,
                max_new_tokens=int(RNG.integers(1, 20)),
                sampling=how,
                top_log_probabilities=int(RNG.integers(3)),
            )
            one.step()
        one.run()
    stats = one.stats()
    assert stats.finished == 200 and stats.hit_tokens > 10_000
    assert not compiled


def test_a_row_that_is_not_finite_ends_alone(one, logits):
    one.reset()
    good, bad = text(30), text(30)  # one chunk's worth: both decode after the first step
    requests = [one.submit(prompt, max_new_tokens=12, stop_ids=()) for prompt in (good, bad)]
    one.step()
    row = requests[1].text.row
    one._pool = dataclasses.replace(one._pool, state=one._pool.state.at[:, :, row].set(jnp.nan))
    one.run()
    check(requests[0], good, logits)
    assert requests[1].finish_reason == "error" and isinstance(requests[1].error, FloatingPointError)
    with pytest.raises(RuntimeError, match="not finite"):
        list(requests[1])
    (again,) = run(one, bad)
    assert again.hit_tokens == 0
    check(again, bad, logits)


def test_a_program_that_fails_kills_the_engine(one, monkeypatch):
    one.reset()
    request, waiting = one.submit(text(10)), one.submit(text(10))

    def fail(*operands, **options):
        raise ValueError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(one._programs, "decode", fail)
        with pytest.raises(RuntimeError, match="has died: out of memory.*reset"):
            one.run()
    for each in (request, waiting):
        assert each.done and each.finish_reason == "error" and str(each.error) == "out of memory"
    for call in (one.step, lambda: one.submit([1])):
        with pytest.raises(RuntimeError, match="has died"):
            call()
    one.reset()
    assert run(one, text(10))[0].finish_reason == "length" and one.stats().requests == 1


def test_cancel(one):
    one.reset()
    requests = [one.submit(text(20), max_new_tokens=300, stop_ids=()) for _ in range(6)]
    for _ in range(4):
        one.step()
    requests[0].cancel()
    requests[5].cancel()  # still waits
    one.step()
    assert [r.finish_reason for r in requests] == ["cancelled", *[None] * 4, "cancelled"]
    assert 0 < len(requests[0].tokens) < 300 and requests[5].tokens == []
    for request in requests[1:5]:
        request.cancel()
    one.run()
    assert one.stats().pages_held == 0


def test_iteration(one):
    one.reset()
    prompts = [text(20), text(70)]
    expected = [request.tokens for request in run(one, *prompts)]
    assert list(one.submit(prompts[0], max_new_tokens=6, stop_ids=())) == expected[0]

    async def gather(request):
        return [token async for token in request]

    async def both():
        requests = [one.submit(prompt, max_new_tokens=6, stop_ids=()) for prompt in prompts]
        return await asyncio.gather(*map(gather, requests))

    assert asyncio.run(both()) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([],), ValueError, "tokens must hold at least one token"),
        (("text",), TypeError, "encode it"),
        (([1, 999],), ValueError, "tokens holds token id 999"),
        (([1] * 510, 3), ValueError, "510 tokens and 3 new ones exceed the model's 512"),
        (([1], 0), ValueError, "max_new_tokens must be >= 1"),
        (([1], 1, "hot"), TypeError, "sampling must be a ring_jax.inference.Sampling"),
        (([1], 1, Sampling(), 2**70), ValueError, "seed"),
        (([1], 1, Sampling(), 0, [300]), ValueError, "stop_ids"),
        (([1], 1, Sampling(), 0, (), [2]), ValueError, "a checkpoint must be in"),
        (([1], 1, Sampling(), 0, (), (), 21), ValueError, "top_log_probabilities"),
    ],
)
def test_errors(one, arguments, error, match):
    names = "tokens max_new_tokens sampling seed stop_ids checkpoints top_log_probabilities".split()
    with pytest.raises(error, match=match):
        one.submit(**dict(zip(names, arguments, strict=False)))


def test_sizes_that_do_not_fit():
    model = tiny_model()
    with pytest.raises(ValueError, match="chunk must be a multiple of 64"):
        Engine(model, chunk=65)
    with pytest.raises(ValueError, match="snapshot_every must be a multiple of chunk=64"):
        Engine(model, chunk=64, snapshot_every=100)
    with pytest.raises(ValueError, match="memory=1,000 bytes a device do not hold a page"):
        Engine(model, memory=1000)
    small = Engine(model, pages=2, page=8, rows=1, snapshots=0)
    with pytest.raises(ValueError, match="need room for 30, the pool has room for 17"):
        small.submit([1] * 20, max_new_tokens=10)
