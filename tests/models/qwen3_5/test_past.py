"""A prompt prefilled in chunks, cut anywhere, equals one pass over it: logits, states, and what is decoded after it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.models.qwen3_5 import Chunks
from tests.models.qwen3_5.golden import LENGTHS
from tests.models.qwen3_5.harness import KNOWN, ROWS, STATE_RELATIVE, Spread, close, model, prefill
from tests.support.hlo import collectives, kinds
from tests.support.numbers import jit

_slow = pytest.mark.slow
WIDTH = 56  # tokens of a chunk at most; no multiple of what a layout divides into


@functools.cache
def programs(name: str, spread: Spread):
    """(parameters, a pass after a past, one token after a past)."""
    program, params = model(name, spread).split()

    def chunk(params, past, tokens, lengths):
        out = program(params, tokens, past=past, lengths=lengths, logits="all", return_new=True)
        return out.logits, out.new if past is None else past.then(out.new)

    def step(params, past, tokens):
        out = program(params, tokens, past=past, logits="last", return_new=True)
        return out.logits, past.then(out.new)

    return params, jit(chunk), jit(step)


def in_chunks(name: str, spread: Spread, cuts: list[list[int]]) -> tuple[np.ndarray, Chunks]:
    """Logits of every real token [rows, longest, V], and the past; `cuts[row]` says how many tokens each pass takes of a row."""
    params, chunk, _ = programs(name, spread)
    tokens = KNOWN[name].tokens()
    logits = np.zeros((*tokens.shape, KNOWN[name].config()["vocab_size"]), np.float32)
    past, done = None, np.zeros(len(LENGTHS), int)
    for counts in np.transpose(cuts):
        piece = np.full((len(LENGTHS), WIDTH), 7, np.int32)  # what lies beyond a row's tokens is not looked at
        for row, count in enumerate(counts):
            piece[row, :count] = tokens[row, done[row] : done[row] + count]
        found, past = chunk(params, past, jnp.asarray(piece), jnp.asarray(counts, jnp.int32))
        for row, count in enumerate(counts):
            logits[row, done[row] : done[row] + count] = np.asarray(found)[row, :count]
        done = done + counts
    assert tuple(done) == LENGTHS and past is not None
    return logits, past


# Rows of 150, 90 and 5 tokens, at cuts that differ from row to row; some have no token in some passes.
CUTS = [[56, 41, 53], [1, 56, 33], [2, 0, 3]]
OTHER_CUTS = [[50, 50, 50], [0, 56, 34], [0, 0, 5]]


def check(name: str, spread: Spread, cuts: list[list[int]] = CUTS) -> Chunks:
    whole = prefill(name, spread, ROWS)
    logits, past = in_chunks(name, spread, cuts)
    for row, length in enumerate(LENGTHS):
        close("logits", logits[row, :length], np.asarray(whole.logits)[row, :length])
    close("states", past.gdn.state, whole.cache.gdn.state, most=None, relative=STATE_RELATIVE)
    close("convolution tails", past.gdn.tail, whole.cache.gdn.tail)
    np.testing.assert_array_equal(past.lengths, LENGTHS)
    return past


def check_steps(name: str, spread: Spread, past: Chunks) -> None:
    """Two tokens after the chunks, against decoding from the cache of one pass."""
    params, _, step = programs(name, spread)
    cache, decode = prefill(name, spread, ROWS).cache, jit(model(name, spread).split()[0].decode)
    for token in (3, 5):
        tokens = np.full(len(LENGTHS), token, np.int32)
        wanted, cache = decode(params, tokens, cache)
        found, past = step(params, past, tokens[:, None])
        close("logits of a new token", found, wanted)


@pytest.mark.parametrize(
    "name, spread",
    [
        pytest.param("dense pair", Spread(), marks=_slow),
        ("moe pair", Spread(context=2, strategy="ring")),
        pytest.param("dense pair", Spread(context=4, data=1, tensor=2, weights="context"), marks=_slow),
    ],
    ids=["one device", "two ranks", "every axis"],
)
def test_chunks(name, spread):
    check_steps(name, spread, check(name, spread))


@pytest.mark.slow
@pytest.mark.parametrize("way, layout", [("state", "zigzag"), ("head", "contiguous"), ("batch", "striped")])
@pytest.mark.parametrize("strategy", ["ring", "pass_q", "all_gather", "ulysses"])
def test_ways_of_chunks(way, layout, strategy):
    check("dense pair", Spread(context=2, way=way, layout=layout, strategy=strategy), OTHER_CUTS)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ["dense", "moe", "next"])
def test_families(name, ranks):
    spread = Spread() if ranks == 1 else Spread(context=ranks)
    check_steps(name, spread, check(name, dataclasses.replace(spread, shared=name == "next")))


def test_errors():
    tiny = model("dense pair", Spread())
    tokens = jnp.zeros((1, 4), jnp.int32)
    past = jax.eval_shape(lambda: tiny(tokens, return_new=True).new)
    past = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), past)
    for options, match in (
        ({"cache_room": 3}, "without a past.*past.then"),
        ({"segment_ids": tokens}, "pack no documents"),
        ({"lengths": jnp.array([5])}, "from 0 to 4"),
        ({"past": dataclasses.replace(past, lengths=jnp.array([4094], jnp.int32))}, "4094 cached tokens, 4 tokens"),
        ({"past": dataclasses.replace(past, lengths=jnp.zeros(2, jnp.int32))}, r"past.lengths must have shape \[B=1\]"),
    ):
        with pytest.raises(ValueError, match=match):
            tiny(tokens, **({"past": past} | options))
    with pytest.raises(TypeError, match="past must be a past"):
        tiny(tokens, past=3)


def test_nothing_of_the_cached_length_moves():
    """A short chunk after long cached keys: its queries travel, and what it leaves is not gathered."""
    spread, places = Spread(context=4), 1 << 18
    program, params = model("dense pair", spread).split()
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    past = jax.eval_shape(lambda params, tokens: program(params, tokens, return_new=True).new, params, tokens)
    chunk = past.chunks[0]
    kv = jax.ShapeDtypeStruct((*chunk.kv.shape[:2], places, *chunk.kv.shape[3:]), chunk.kv.dtype)
    past = dataclasses.replace(past, chunks=(dataclasses.replace(chunk, kv=kv),))
    mesh = program.sharding.resolve_mesh()
    on_mesh = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))  # noqa: E731
    past = jax.tree.map(on_mesh, past, past.specs(program.sharding))
    run = jit(lambda params, past, tokens: program(params, tokens, past=past, logits="last", return_new=True))
    found = collectives(run.lower(params, past, tokens).compile())
    assert {"collective-permute", "all-reduce"} <= set(kinds(found))
    assert max(size for _, size in found) < 1 << 20 < kv.size * 4 // 8
