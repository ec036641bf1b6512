"""Short prompts that share a prefill program: each is computed as if it were alone, whichever way GDN layers are split."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_jax
from ring_jax.inference import Engine
from ring_jax.inference.ladders import Ladders
from ring_jax.inference.operands import Operands
from ring_jax.inference.operations import Piece, Text
from ring_jax.models.qwen3_5 import Sharding
from tests.inference.checkpoint import CONFIG, EOS, tiny_model

RNG = np.random.default_rng(1)
LENGTHS = (64, 9, 30, 2)  # of what is new, all padded to as much


def slow(ranks: int, strategy: str):
    return pytest.param((ranks, strategy), marks=pytest.mark.slow)


@pytest.fixture(
    scope="module",
    params=[
        (1, "auto"),
        (2, "batch"),
        *(slow(2, way) for way in ("state", "auto")),
        *(slow(n, "batch") for n in (3, 4, 8)),
    ],
    ids=lambda param: f"C{param[0]}-{param[1]}",
)
def engine(request) -> Engine:
    """Programs of 4 pieces; texts that hit share one up to 256 tokens, longer ones do not."""
    ranks, strategy = request.param
    sharding, least = None, 64
    if ranks > 1:
        mesh = jax.make_mesh(
            (ranks,), ("context",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:ranks]
        )
        cp = ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh)
        sharding, least = Sharding(cp, gdn_strategy=strategy), cp.padded_length(64)
    model, page = tiny_model(dataclasses.replace(CONFIG, max_positions=2048), sharding=sharding), -(-8 // ranks)
    return Engine(model, rows=4, chunk=4 * least, page=page, pages=200, snapshots=40, decode_steps=4)


def text(length: int) -> list[int]:
    return [int(t) for t in RNG.integers(0, EOS, length)]


@pytest.fixture(scope="module")
def log_probabilities():
    """Of the tokens of a text, from one pass of the model without any cache."""
    model = tiny_model()

    def of(tokens):
        padded = np.zeros((1, 256), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(model(jnp.asarray(padded), lengths=jnp.asarray([len(tokens)])).logits, np.float64)[0]
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return logits[np.arange(len(tokens) - 1), tokens[1:]]

    return of


def run(engine, prompts, log_probabilities):
    """All at once, each against one pass; how many programs prefilled them."""
    before = engine.stats().prefills
    requests = [engine.submit(prompt, max_new_tokens=5, stop_ids=()) for prompt in prompts]
    engine.run()
    for request, prompt in zip(requests, prompts, strict=True):
        wanted = log_probabilities([*prompt, *request.tokens])[-5:]
        np.testing.assert_allclose(request.log_probabilities, wanted, atol=1e-4)
    return engine.stats().prefills - before, requests


def test_prompts_share_a_program(engine, log_probabilities):
    """Prompts of several lengths; then second turns of all, which read cached keys; then some of either, and a long one."""
    engine.reset()
    prompts = [text(length) for length in (65, 10, 31, 3)]
    programs, first = run(engine, prompts, log_probabilities)
    assert programs == 1 and all(request.hit_tokens == 0 for request in first)
    turns = [[*p, *r.tokens, *text(new)] for p, r, new in zip(prompts, first, (20, 50, 2, 40), strict=True)]
    programs, second = run(engine, turns, log_probabilities)
    assert programs == 1 and [r.hit_tokens for r in second] == [len(p) + 4 for p in prompts]
    mixed = [[*prompts[0], *text(9)], text(30), text(100), [*prompts[1], *text(3)]]
    programs, third = run(engine, mixed, log_probabilities)
    assert programs > 1 and [r.hit_tokens > 0 for r in third] == [True, False, False, True]


def test_nothing_is_asked_for_that_warmup_has_not_compiled():
    """Every piece of a text, alone and among others: one program for each size and width, as few as where pieces went alone."""
    ladders = Ladders(sizes=(64, 256, 1024), widths=(128, 512), page=8, rows=6)
    known = {program[1:] for program in ladders.every_program() if program[0] == "prefill"}
    assert {program[0] for program in known} == {1, 2, 4, 6} and len(known) == (3 + 1) * (1 + 2)
    whole = Text(np.zeros(4097, np.int32), 4096)
    for start in range(0, 4096, 61):
        for length in (1, 64, 65, 256, 1000, 1024):
            stop = min(start + length, 4096)
            for others in (0, ladders.shape(start, stop)[0] - 1):
                pieces = [Piece(row, whole, start, stop, tuple(range(512))) for row in range(1 + others)]
                given = Operands(ladders).prefill(pieces)
                count, size = given["tokens"].shape
                width = given["table"].shape[1] if start else 0
                assert (count, size, width, given["whole"]) in known and count * width <= 512
                assert given["length"].sum() == (stop - start) * (1 + others)
                assert (given["row"] == 6).sum() == count - 1 - others


@pytest.mark.slow
def test_nothing_is_compiled_after_warmup(engine, monkeypatch):
    engine.reset()
    assert engine.warmup() == len(list(engine._ladders.every_program()))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "compile" in name else None
    )
    pieces, operands = [], Operands.prefill
    monkeypatch.setattr(Operands, "prefill", lambda self, given: pieces.append(len(given)) or operands(self, given))
    begin = text(200)
    for size in (5, 6):
        engine.submit(text(size), max_new_tokens=3)
    for _ in range(60):
        prompt = [*begin[: RNG.integers(0, 200)], *text(int(RNG.integers(1, 90)))]
        engine.submit(prompt, max_new_tokens=3)
        if RNG.random() < 0.4:
            engine.step()
    engine.run()
    assert engine.stats().finished == 62 and engine.stats().hit_tokens > 1000
    assert engine.stats().prefills == len(pieces) and pieces[0] == 2, "the first two went together"
    assert not compiled


@pytest.mark.parametrize("past", [False, True], ids=["", "past"])
def test_neighbours_change_no_bit(engine, past):
    """The program of a piece depends on its positions alone, and its numbers neither on its place nor on what else is there."""
    engine.reset()
    programs, page = engine._programs, engine._ladders.page
    start, size = (8 * page if past else 0), engine._ladders.sizes[0]
    count, size, width = engine._ladders.shape(start, start + LENGTHS[0])
    assert count == 4
    tokens = RNG.integers(0, EOS, (4, size)).astype(np.int32)
    width = width or -(-size // page)
    tables = 1 + np.arange(4 * width, dtype=np.int32).reshape(4, width)

    def left(pieces):
        """States, and the pages, of the piece number 0 where it is prefilled among `pieces`."""
        pool = jax.tree.map(lambda x: jnp.array(x, copy=True), clean)
        length, row, table = np.zeros(4, np.int32), np.full(4, 4, np.int32), np.zeros((4, width), np.int32)
        starts, new = np.full(4, start, np.int32), np.zeros((4, size), np.int32)
        for place, piece in pieces.items():
            length[place], row[place], table[place], new[place] = LENGTHS[piece], piece, tables[piece], tokens[piece]
        pool = programs.prefill(pool, new, starts, length, row, table, whole=False)
        return [np.asarray(x) for x in (pool.state[:, :, 0], pool.tail[:, :, 0], pool.pages[:, :, tables[0]])]

    noise = lambda x: RNG.normal(size=x.shape).astype(x.dtype) if x.dtype == jnp.float32 else np.asarray(x)  # noqa: E731
    clean = jax.tree.map(lambda x: jax.device_put(noise(x), x.sharding), engine._pool)
    alone = left({0: 0})
    for pieces in ({2: 0}, {0: 0, 1: 1, 2: 2, 3: 3}, {3: 0, 0: 2, 1: 3}):
        for x, y in zip(left(pieces), alone, strict=True):
            np.testing.assert_array_equal(x, y)
    clean = dataclasses.replace(clean, state=clean.state.at[:, :, 1].set(jnp.nan))
    for x, y in zip(left({0: 0, 1: 1}), alone, strict=True):
        np.testing.assert_array_equal(x, y)
