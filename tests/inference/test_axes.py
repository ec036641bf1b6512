"""Every family over every mesh, against passes of the plain model on one device over each whole text: cold, cut anywhere, after a
prefix hit, after preemption."""

import itertools

import jax
import numpy as np
import pytest

from ring_jax.inference import Sampling, generate
from tests.inference.checkpoint import FAMILIES
from tests.inference.harness import Plain, check, check_states, make_engine, over, run, text

MESHES = [
    *({"context": ranks} if ranks > 1 else {} for ranks in (1, 2, 3, 4, 8)),
    *({"context": 2, axis: 2} for axis in ("tensor", "data", "expert")),
]
DEFAULT = ("qwen3_5_moe", {"context": 2, "tensor": 2})
CASES = [
    pytest.param((family, axes), marks=[] if (family, axes) == DEFAULT else pytest.mark.slow)
    for family, axes in itertools.product(FAMILIES, MESHES)
    if "expert" not in axes or FAMILIES[family].experts is not None
]
LENGTHS = (1, 40, 65, 130)


def name(case) -> str:
    family, axes = case
    return "-".join([family, *(f"{axis}{size}" for axis, size in axes.items())])


@pytest.fixture(scope="module", params=CASES, ids=name)
def case(request):
    """(engine, what it is compared with, prompts)."""
    family, axes = request.param
    config, rng = FAMILIES[family], np.random.default_rng(1)
    yield make_engine(config, **axes), Plain(config), [text(rng, length, config) for length in LENGTHS]
    jax.clear_caches()  # the product's programs are more than a process can map


@pytest.fixture
def engine(case):
    case[0].reset()
    return case[0]


def test_cold_cut_and_hit(case, engine):
    """Log-probabilities of 20 tokens each step, and the states that a prefill leaves; then in other chunks, then from the cache."""
    _, plain, prompts = case
    cold = run(engine, *prompts, top_log_probabilities=20)
    for request, prompt in zip(cold, prompts, strict=True):
        check(request, prompt, plain)
        assert request.hit_tokens == 0
    for prompt in prompts[1:]:
        check_states(engine, prompt, plain)
    cuts = {"salt": "cut", "checkpoints": (1, 3, 17, 50, 51, 64, 113), "top_log_probabilities": 20}
    (cut,) = run(engine, prompts[-1], **cuts)
    check(cut, prompts[-1], plain)
    check_states(engine, prompts[-1], plain, "cut")
    assert cut.tokens == cold[-1].tokens and cut.hit_tokens == 0
    turns = [[*p, *r.tokens, *prompts[-1][:10]] for p, r in zip(prompts, cold, strict=True)]
    for request, before, prompt in zip(run(engine, *prompts), cold, prompts, strict=True):
        assert request.tokens == before.tokens and request.hit_tokens == len(prompt) - 1
    for request, prompt in zip(run(engine, *turns, top_log_probabilities=20), turns, strict=True):
        assert request.hit_tokens == len(prompt) - 11
        check(request, prompt, plain)


def test_preempted(case, engine):
    """A pool too small for all: the youngest waits, and goes on where it was."""
    _, plain, prompts = case
    rows = [prompts[-1][n : n + 100] for n in range(4)]
    for request, prompt in zip(run(engine, *rows, max_new_tokens=140), rows, strict=True):
        check(request, prompt, plain)
    assert engine.stats().preemptions > 0


@pytest.mark.slow
def test_nothing_is_compiled_after_warmup(case, engine):
    """200 texts of random lengths, samplings and ends: on a mesh, operands have to lie where the warm programs had them, too."""
    (_, plain, prompts), rng = case, np.random.default_rng(2)
    engine.warmup()
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "compile" in name else None
    )
    for _ in range(200):
        prompt = [*prompts[-1][: rng.integers(0, 130)], *text(rng, int(rng.integers(1, 40)), plain.config)]
        how = Sampling(
            float(rng.choice([0.0, 0.7])), top_k=[None, 5][rng.integers(2)], top_p=float(rng.choice([0.5, 1.0]))
        )
        engine.submit(
            prompt, max_new_tokens=int(rng.integers(1, 10)), sampling=how, top_log_probabilities=int(rng.integers(3))
        )
        engine.step()
    engine.run()
    stats, seen = engine.stats(), list(compiled)
    assert stats.finished == 200 and stats.hit_tokens > 1000 and stats.preemptions + stats.evicted_pages > 0
    assert not seen


@pytest.mark.slow
def test_generate_gives_the_same(request, case, engine):
    """Greedy, and drawn with the same seed: on every mesh the tokens of one device."""
    family, axes = request.node.callspec.params["case"]
    prompt = case[2][1]
    for how in (Sampling(), Sampling(1.3, top_k=30)):
        options = {"max_new_tokens": 6, "sampling": how, "stop_ids": ()}
        found = generate(over(FAMILIES[family], **axes), [prompt], **options).tokens
        assert found == generate(over(FAMILIES[family]), [prompt], **options).tokens
        assert found == [run(engine, prompt, sampling=how, salt=str(how))[0].tokens]
