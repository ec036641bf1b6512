"""The whole model over other meshes: tensor, data, expert and weight axes, Explicit meshes, gradients, compile time."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from ring_jax.models.qwen3_5 import Config, Qwen3_5
from tests.gdn.helpers import jit
from tests.models.qwen3_5 import tiny
from tests.models.qwen3_5.golden import CASES, LENGTHS, PAIRS
from tests.models.qwen3_5.harness import (
    KNOWN,
    Spread,
    check_greedy,
    check_prefill,
    close,
    decoder,
    keys_and_values,
    model,
    prefill,
    ranks,
    states_and_tails,
)

FOUR_ROWS = (0, 1, 2, 1)
GRADIENT = 1e-4  # relative L2
SPREADS = {
    "explicit": Spread(context=2, kind=AxisType.Explicit),
    "weights": Spread(context=4, weights="context"),
    "tensor": Spread(context=2, tensor=2),
    "tensor, weights": Spread(context=2, tensor=2, weights="context"),
    "tensor, weights, explicit": Spread(context=2, tensor=2, weights="context", kind=AxisType.Explicit),
    "weights on one rank": Spread(context=1, weights="context"),
    "weights over both": Spread(context=2, data=2, weights=("data", "context")),
    "data": Spread(context=2, data=2),
    "data, weights": Spread(context=2, data=2, weights="data"),
    "data, tensor, weights, explicit": Spread(context=2, data=2, tensor=2, weights="data", kind=AxisType.Explicit),
}
EXPERT_SPREADS = {
    "expert": Spread(context=4, expert="context"),
    "expert, weights": Spread(context=4, expert="context", weights="context"),
    "expert over data": Spread(context=2, data=2, expert="data", weights="context"),
    "expert, tensor, explicit": Spread(
        context=2, tensor=2, expert="context", weights="context", kind=AxisType.Explicit
    ),
}
_slow = pytest.mark.slow


def rows_for(spread: Spread) -> tuple[int, ...]:
    """Golden rows, as many as the data axis divides."""
    return FOUR_ROWS if spread.data else (0, 1, 2)


def check(name: str, spread: Spread) -> None:
    """Prefill and 64 greedy tokens."""
    rows = rows_for(spread)
    check_prefill(name, spread, rows)
    if CASES[name].greedy:
        check_greedy(name, spread, rows)


def test_every_axis_at_once():
    """An Explicit mesh of all axes against one device: prefill and a few steps of decode."""
    everything = Spread(context=2, data=2, tensor=2, expert="data", weights="context", kind=AxisType.Explicit)
    results = []
    for spread in (everything, Spread()):
        out = prefill("moe pair", spread, FOUR_ROWS)
        logits, cache = [], out.cache
        for token in (1, 2, 3):
            step, cache = decoder("moe pair", spread)(np.full(len(FOUR_ROWS), token, np.int32), cache)
            logits.append(np.asarray(step))
        caches = *keys_and_values(out, spread), *states_and_tails("moe pair", out, spread)
        real = np.arange(out.logits.shape[1]) < np.asarray(LENGTHS)[list(FOUR_ROWS), None]
        keys, values = (x * real[:, :, None, None] for x in caches[:2])
        results.append(
            (np.asarray(out.logits)[real], np.asarray(out.hidden)[:, real], keys, values, *caches[2:], logits)
        )
    names = "logits", "hidden states", "keys", "values", "states", "tails", "logits of new tokens"
    for what, found, wanted in zip(names, *results, strict=True):
        close(what, found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("what", SPREADS)
def test_dense(what):
    check("dense", SPREADS[what])


@pytest.mark.slow
@pytest.mark.parametrize("what", SPREADS)
@pytest.mark.parametrize("name", ["moe", "next"])
def test_other_families(name, what):
    check(name, SPREADS[what])


@pytest.mark.slow
@pytest.mark.parametrize("what", [what for what in SPREADS if not SPREADS[what].tensor])
def test_large_heads(what):
    """One key-value head, which no tensor axis divides."""
    check("head256", SPREADS[what])


@pytest.mark.slow
@pytest.mark.parametrize("what", EXPERT_SPREADS)
def test_experts(what):
    check("moe", EXPERT_SPREADS[what])


@pytest.mark.slow
@pytest.mark.parametrize("what", EXPERT_SPREADS)
def test_experts_of_next(what):
    check("next", EXPERT_SPREADS[what])


@functools.cache
def loss_and_gradients(name: str, spread: Spread, rows: tuple[int, ...], remat: str | None = None):
    """Next-token loss over golden rows and gradients as a flat list of (path, array)."""
    graph, state = nnx.split(model(name, spread, remat))
    tokens, lengths = KNOWN[name].tokens()[list(rows)], np.asarray(LENGTHS, np.int32)[list(rows)]
    run = jit(jax.value_and_grad(lambda state, *rows: nnx.merge(graph, state).loss(rows[0], lengths=rows[1])))
    loss, gradients = run(state, tokens, lengths)
    return float(loss), [(path, np.asarray(x[...])) for path, x in nnx.to_flat_state(gradients)]


def check_gradients(name: str, spread: Spread, remat: str | None = None) -> None:
    rows = rows_for(spread)
    loss, found = loss_and_gradients(name, spread, rows, remat)
    wanted_loss, wanted = loss_and_gradients(name, ranks(1), rows)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    for (path, a), (_, b) in zip(found, wanted, strict=True):
        close(f"gradient of {path}", a, b, most=None, relative=GRADIENT)


def test_loss_is_the_cross_entropy_of_the_logits():
    logits = np.asarray(prefill("dense pair", ranks(1)).logits, np.float64)
    tokens, total, count = PAIRS["dense pair"].tokens(), 0.0, 0
    for row, length in enumerate(LENGTHS):
        here = logits[row, : length - 1]
        chosen = here[np.arange(length - 1), tokens[row, 1:length]]
        total += (np.log(np.exp(here).sum(-1)) - chosen).sum()
        count += length - 1
    loss, _ = loss_and_gradients("dense pair", ranks(1), rows_for(ranks(1)))
    assert loss == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    "name", ["dense pair", *(pytest.param(name, marks=_slow) for name in ("dense", "moe", "next", "head256"))]
)
def test_gradients_of_eight_ranks(name):
    check_gradients(name, Spread(context=8, way="state"))


@pytest.mark.slow
@pytest.mark.parametrize("spread", [ranks(8), Spread(context=2, way="head")], ids=["batch", "head"])
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_gradients_of_other_ways(name, spread):
    check_gradients(name, spread)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "attention"])
def test_gradients_with_remat(remat):
    check_gradients("dense", ranks(4), remat)


@pytest.mark.slow
@pytest.mark.parametrize("what", SPREADS)
def test_gradients_of_other_meshes(what):
    check_gradients("dense", SPREADS[what])


@pytest.mark.slow
@pytest.mark.parametrize("what", EXPERT_SPREADS)
def test_gradients_of_experts(what):
    check_gradients("moe", EXPERT_SPREADS[what])


def lowered(layers: int, spread: Spread):
    """A forward pass over 64 tokens of a model with `layers` layers, not compiled yet."""
    config = Config.from_hf(tiny.config("dense", layers=layers))
    graph, state = nnx.split(Qwen3_5(config, rngs=None, dtype=jnp.float32, sharding=spread.sharding()))
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    return jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens).logits).lower(state, tokens)


def test_program_does_not_grow_with_depth():
    short, long = (lowered(layers, ranks(2)).as_text() for layers in (8, 64))
    assert long.count("\n") <= 1.02 * short.count("\n")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_compile_time_does_not_grow_with_depth(count):
    """64 layers within 1.3 of 8, tracing included; CPU time, the better of two."""

    def seconds(layers: int) -> float:
        taken = []
        for _ in range(2):
            jax.clear_caches()
            start = time.process_time()
            lowered(layers, ranks(count)).compile()
            taken.append(time.process_time() - start)
        return min(taken)

    short, long = seconds(8), seconds(64)
    assert long <= 1.3 * short, (long, short)
