"""What each program moves between ranks, and what a rank holds."""

import dataclasses
import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_jax
from ring_jax.inference import programs
from ring_jax.inference.control import COLUMNS
from ring_jax.inference.ladders import Ladders
from ring_jax.inference.pool import Geometry, Pool
from ring_jax.models.qwen3_5 import Qwen3_5, Sharding
from tests.inference.checkpoint import CONFIG
from tests.support.hlo import memory

RANKS, ROWS, CHUNK = 4, 4, 512
SIZES = {"f32": 4, "i32": 4, "ui32": 4, "i1": 1}
COLLECTIVE = re.compile(
    r"stablehlo\.(all_gather|all_reduce|all_to_all|collective_permute|reduce_scatter)\b.*?-> tensor<([\dx]*)(\w+)>",
    re.DOTALL,
)


def structure(ranks: int, strategy: str = "auto"):
    mesh = jax.make_mesh(
        (ranks,), ("context",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:ranks]
    )
    sharding = Sharding(ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh, strategy=strategy))
    return Qwen3_5(CONFIG, rngs=None, dtype=jnp.float32, sharding=sharding).split()


@pytest.fixture
def moved(monkeypatch):
    """(kind, bytes) of every collective of a program, from its lowered text: nothing is compiled, no array is there."""
    model, params = structure(RANKS, "pass_q")
    geometry = Geometry(64, 8, ROWS, 4)
    own, run = programs.Programs(model, params, geometry, 2), programs._run

    def of(call):
        captured = []
        monkeypatch.setattr(programs, "_run", lambda *operands: captured.append(operands))
        call(own, geometry.shapes(model))
        text = run.lower(*captured[0]).as_text()
        found = [
            (m[1], math.prod(int(n) for n in m[2].split("x") if n), SIZES[m[3]]) for m in COLLECTIVE.finditer(text)
        ]
        return sorted((kind, elements * size) for kind, elements, size in found)

    return of


@pytest.mark.parametrize("steady", [False, True])
def test_decode_moves_nothing_of_the_cached_length(moved, steady):
    def decode(width):
        control, table = np.zeros((ROWS, COLUMNS), np.int32), np.zeros((ROWS, width), np.int32)
        return moved(lambda run, pool: run.decode(pool, control, table, steady=steady))

    short, long = decode(2), decode(64)
    assert short == long and short, "queries, or partial results of them"
    partial = ROWS * CONFIG.num_heads * (CONFIG.head_dim + 1) * 4
    full_layers = CONFIG.layer_types.count("full_attention")
    assert sum(size for _, size in short) <= 4 * full_layers * partial
    assert {kind for kind, _ in short} == {"all_reduce"} and len(short) == 2 * full_layers


def test_states_move_only_to_come_back(moved):
    assert moved(lambda run, pool: run.save(pool, 0, 0)) == []
    assert moved(lambda run, pool: run.copy(pool, 1, 2)) == []
    back = moved(lambda run, pool: run.restore(pool, 0, 0))
    assert [kind for kind, _ in back] == ["all_gather"] * 2
    states = (CONFIG.num_layers - 1) * CONFIG.linear.value_heads * CONFIG.linear.key_size * CONFIG.linear.value_size * 4
    assert max(size for _, size in back) == states


def prefill_moves(moved, pieces: int, width: int, start: int):
    tokens, table = np.zeros((pieces, CHUNK // pieces), np.int32), np.zeros((pieces, width), np.int32)
    start, length, row = (np.full(pieces, n, np.int32) for n in (start, CHUNK // pieces, 0))
    return moved(lambda run, pool: run.prefill(pool, tokens, start, length, row, table, whole=False))


def test_a_chunk_sends_its_new_keys_once(moved):
    """One all-to-all of all layers' new keys, beside what attention and states move; more cached keys cost no more where the
    queries travel."""

    new_keys = 2 * CONFIG.num_kv_heads * CONFIG.head_dim * 4 * CHUNK // RANKS
    prefill = functools.partial(prefill_moves, moved, 1)
    first = prefill(16, 0)
    sends = [size for kind, size in first if kind == "all_to_all"]
    assert new_keys <= max(sends) <= 2 * new_keys
    some, many = prefill(256, CHUNK), prefill(1024, CHUNK)
    query = CHUNK // RANKS * CONFIG.num_heads * CONFIG.head_dim * 4
    result, seen = query + query // CONFIG.head_dim, 2 * CHUNK // RANKS * 4
    around = Counter({("collective_permute", size): RANKS - 1 for size in (query, result, seen)})
    assert Counter(some) - Counter(first) == around and Counter(some) - around == Counter(first), "once around the ring"
    assert sum(size for _, size in some) == sum(size for _, size in many)
    assert max(size for _, size in many) < 256 * 32 * 2 * CONFIG.head_dim * 4 // RANKS


def test_pieces_together_are_split_by_rows(moved):
    """As many pieces as ranks: activations go into the run of GDN layers and out of it, and no collective is added for a piece."""
    one, several = (prefill_moves(moved, pieces, 16, 0) for pieces in (1, RANKS))
    assert len(several) < len(one)
    activations, new_keys = (
        features * 4 * CHUNK // RANKS for features in (CONFIG.hidden_size, 2 * CONFIG.num_kv_heads * CONFIG.head_dim)
    )
    assert [size for kind, size in one if kind == "all_to_all"] == [new_keys]
    sends = [size for kind, size in several if kind == "all_to_all"]
    assert sends == [activations, activations, 2 * new_keys], "short pieces have blocks of half a page of all ranks"


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_a_rank_holds_its_share(ranks):
    """At C = 8 at most a seventh of the keys and snapshots; dimensions that do not divide are padded."""
    tokens = 1 << 14
    alone = Qwen3_5(CONFIG, rngs=None, dtype=jnp.float32).split()[0]
    model = structure(ranks)[0]
    geometry = Geometry(tokens // (ranks * 8), 8, ROWS, 64)
    shapes, places, whole = (
        geometry.shapes(model),
        geometry.specs(model.sharding),
        Geometry(tokens // 8, 8, ROWS, 64).shapes(alone),
    )
    for name in ("pages", "saved", "saved_tail"):
        place = jax.sharding.NamedSharding(model.sharding.resolve_mesh(), getattr(places, name))
        held = math.prod(place.shard_shape(getattr(shapes, name).shape))
        assert held <= math.prod(getattr(whole, name).shape) / ranks * (8 / 7)


@pytest.fixture(scope="module")
def held():
    """{program: bytes of one rank} for 16,384 tokens and 64 snapshots at C = 1 and 8, of compiled programs; without the states of
    the rows, which every rank has."""

    def of(ranks):
        model, params = structure(ranks)
        geometry = Geometry(1 + (1 << 14) // (ranks * 8), 8, ROWS, 64)
        shapes = geometry.shapes(model)
        rows = sum(
            x.size * x.dtype.itemsize for x in (shapes.state, shapes.tail, shapes.token, shapes.position, shapes.active)
        )
        own = programs.Programs(model, params, geometry, 2)
        calls = {
            "save": lambda pool: own.save(pool, 0, 0),
            "restore": lambda pool: own.restore(pool, 0, 0),
            "copy": lambda pool: own.copy(pool, 1, 2),
        }
        return {name: _memory(call, shapes) for name, call in calls.items()}, rows

    return {ranks: of(ranks) for ranks in (1, 8)}


def _memory(call, shapes):
    captured, run = [], programs._run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "_run", lambda *operands: captured.append(operands))
        call(shapes)
    return memory(run.lower(*captured[0]))


def test_eight_ranks_hold_an_eighth_each(held):
    """Of keys and snapshots, by compiled sizes: at most a seventh. What a program takes it gives back in the same place, and it needs
    the states of a row or one page beside."""
    (one, rows), (eight, same) = held[1], held[8]
    assert rows == same
    for name, program in eight.items():
        assert program.argument_size_in_bytes - rows <= (one[name].argument_size_in_bytes - rows) / 7, name
        pointers = 8 * (len(dataclasses.fields(Pool)) + 2)
        assert program.output_size_in_bytes - program.alias_size_in_bytes <= pointers, name
        assert program.argument_size_in_bytes - program.alias_size_in_bytes <= pointers, name
        assert program.temp_size_in_bytes < 4 * rows, name


def test_every_program_has_the_pool_for_good(monkeypatch):
    """All its arrays are donated, so that none is there twice."""
    model, params = structure(RANKS)
    geometry = Geometry(64, 8, ROWS, 4)
    own, run, captured = programs.Programs(model, params, geometry, 2), programs._run, []
    monkeypatch.setattr(programs, "_run", lambda *operands: captured.append(operands) or (operands[5], None))
    longest = {name: sizes for name, *sizes in Ladders.of(model, geometry, None).every_program()}
    for name, sizes in longest.items():
        own.rehearse(geometry.shapes(model), name, *sizes)
    assert len(captured) == len(own.keys) >= 5
    for operands in captured:
        text = run.lower(*operands).as_text()
        main = text[text.index("@main(") :].split("\n", 1)[0]
        assert len(re.findall(r"jax\.buffer_donor = true|tf\.aliasing_output", main)) == len(dataclasses.fields(Pool))
