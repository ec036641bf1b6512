"""Every strategy against float64: masks x layouts x ranks, forward, LSE and all gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_jax
from ring_jax.context import gather
from ring_jax.context.cost import NAMES, costs
from ring_jax.context.strategies import choose_strategy
from ring_jax.flash import backends
from tests.context.harness import expected, in_shares, inputs, run
from tests.support import oracle
from tests.support.layouts import LAYOUTS, Backwards
from tests.support.masks import B, S, cases
from tests.support.mesh import make_mesh
from tests.support.strategies import SINGLE_AXIS

RANKS = (1, 2, 3, 4, 5, 8)
TOLERANCE = 2e-6  # relative L2, everywhere; the contract is 2e-5

EVERYTHING = list(itertools.product(RANKS, SINGLE_AXIS, LAYOUTS))
# Pairwise: each strategy meets each number of ranks, and every layout with some of both.
COVER = [
    (C, s, list(LAYOUTS)[(i + j) % len(LAYOUTS)])
    for (i, C), (j, s) in itertools.product(enumerate(RANKS), enumerate(SINGLE_AXIS))
]


def check_every_mask(ranks, strategy, layout):
    heads = (
        {3: (6, 3), 5: (5, 5), 8: (8, 8)}.get(ranks, (4, 4 if ranks == 4 else 2)) if strategy == "ulysses" else (4, 2)
    )
    x = inputs(B, S, S, *heads, H=8)
    data = 2 if 2 * ranks <= 8 else 1
    context = ring_jax.ContextParallel(
        "context",
        layout=LAYOUTS[layout],
        batch_axis="data",
        mesh=make_mesh(data=data, context=ranks),
        strategy=strategy,
    )
    cap = 2.0 if layout == "striped" else None
    failures = []
    for name, (mask, _) in cases().items():
        start, end = (np.broadcast_to(b, (B, S)) for b in mask.interval(q_len=S, kv_len=S))
        try:
            oracle.assert_close(
                run(x, start, end, context=context, cap=cap), expected(x, start, end, cap=cap), TOLERANCE
            )
        except AssertionError as error:
            failures.append(f"{name}: {error}")
    assert not failures, "\n".join(failures)


# Of these, one rank and a number that nothing divides by are for the full product.
@pytest.mark.parametrize(
    "ranks, strategy, layout",
    [pytest.param(*case, marks=pytest.mark.slow) if case[0] in (1, 5) else case for case in COVER],
)
def test_every_mask(ranks, strategy, layout):
    check_every_mask(ranks, strategy, layout)


@pytest.mark.parametrize(
    "ranks, strategy, kv_heads, short",
    [
        (2, "ring", 2, True),
        (4, "ring", 3, True),
        (4, "all_gather", 4, True),
        (2, "all_gather", 2, False),
        pytest.param(3, "all_gather", 3, True, marks=pytest.mark.slow),
    ],
)
def test_halves_of_the_heads_at_a_time(ranks, strategy, kv_heads, short, monkeypatch):
    """Of a backend that takes shares of the heads: a rank's own keys at both ends, and of short shards halves gathered in
    turn."""
    jax.clear_caches()
    monkeypatch.setitem(backends.BACKENDS, "mosaic", in_shares(backends.BACKENDS["reference"]))
    monkeypatch.setattr(gather, "_gathers_in_halves", lambda *_: short)
    x = inputs(B, S, S, 2 * kv_heads, kv_heads, H=8)
    context = ring_jax.ContextParallel("context", layout="zigzag", mesh=make_mesh(context=ranks), strategy=strategy)
    for mask in (ring_jax.causal(), ring_jax.Mask()):
        start, end = (np.broadcast_to(b, (B, S)) for b in mask.interval(q_len=S, kv_len=S))
        got = run(x, start, end, context=context, implementation="mosaic")
        oracle.assert_close(got, expected(x, start, end), TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, strategy, layout", [case for case in EVERYTHING if case not in COVER])
def test_every_mask_full_product(ranks, strategy, layout):
    check_every_mask(ranks, strategy, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ring_ulysses_over_two_axes(layout):
    x = inputs(1, S, S, 4, 2, H=8)
    context = ring_jax.ContextParallel(("outer", "inner"), layout=LAYOUTS[layout], mesh=make_mesh(outer=3, inner=2))
    for name in ("causal", "causal cu_seqlens", "full"):
        start, end = cases()[name][0].interval(q_len=S, kv_len=S)
        oracle.assert_close(run(x, start, end, context=context), expected(x, start, end), TOLERANCE)


@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_a_layout_of_the_users_own(strategy):
    x = inputs(1, S, S, 4, 2, H=8)
    context = ring_jax.ContextParallel("context", layout=Backwards(), mesh=make_mesh(context=2), strategy=strategy)
    start, end = cases()["causal cu_seqlens"][0].interval(q_len=S, kv_len=S)
    oracle.assert_close(run(x, start, end, context=context), expected(x, start, end), TOLERANCE)


@pytest.mark.parametrize("strategy", ["ring", "pass_q", "all_gather"])
def test_short_chunk_after_a_long_prefix(strategy):
    """T != S: a chunk of 10 queries at offset 50 over 60 keys, and values wider than keys."""
    x = inputs(1, 10, 60, 4, 2, H=8, Hv=12)
    context = ring_jax.ContextParallel("context", layout="zigzag", mesh=make_mesh(context=4), strategy=strategy)
    start, end = ring_jax.causal().interval(q_len=10, kv_len=60, query_offset=50)
    oracle.assert_close(run(x, start, end, context=context), expected(x, start, end), TOLERANCE)


@pytest.mark.parametrize("strategy", SINGLE_AXIS)
def test_head_axis_beside_the_context_axis(strategy):
    x = inputs(1, S, S, 8, 4, H=8)
    mesh = make_mesh(tensor=2, context=2)
    context = ring_jax.ContextParallel("context", layout="zigzag", head_axis="tensor", mesh=mesh, strategy=strategy)
    start, end = ring_jax.causal().interval(q_len=S, kv_len=S)
    oracle.assert_close(run(x, start, end, context=context), expected(x, start, end), TOLERANCE)


# The cases of vLLM pull request 39875: documents x direction x heads x dtype, and one long causal run.
DOCUMENTS = {"single": [0, 96], "equal": [0, 32, 64, 96], "different": [0, 7, 61, 96]}


@pytest.mark.parametrize(
    "heads, dtype",
    [
        ((4, 2), jnp.bfloat16),
        ((4, 4), jnp.float16),
        pytest.param((4, 4), jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param((4, 2), jnp.float16, marks=pytest.mark.slow),
    ],
    ids=["GQA, bf16", "MHA, fp16", "MHA, bf16", "GQA, fp16"],
)
def test_half_precision_error_does_not_grow_with_ranks(heads, dtype):
    check_half_precision(heads, dtype, 96, DOCUMENTS)


def test_half_precision_long_causal_gqa():
    check_half_precision((8, 2), jnp.bfloat16, 1024, {"single": [0, 1024]}, causal=(True,), ranks=(2, 4))


def check_half_precision(heads, dtype, length, documents, causal=(True, False), ranks=(2, 4, 8)):
    x = inputs(1, length, length, *heads, H=16)
    x = {name: v.astype(dtype) if name in ("query", "key", "value", "dout") else v for name, v in x.items()}
    layout = "zigzag"
    contexts = {
        C: ring_jax.ContextParallel("context", layout=layout, mesh=make_mesh(context=C), strategy="ring")
        for C in (1, *ranks)
    }
    for (name, cu), is_causal in itertools.product(documents.items(), causal):
        mask = ring_jax.documents(cu_seqlens=cu) & (ring_jax.causal() if is_causal else ring_jax.Mask())
        start, end = mask.interval(q_len=length, kv_len=length)
        want = expected({k: np.asarray(v, np.float64) for k, v in x.items()}, start, end, gradients=False)
        reference = run(x, start, end, context=contexts[1], gradients=False, implementation="reference")
        base = {key: oracle.relative(reference[key], want[key]) for key in want}
        errors = {C: run(x, start, end, context=contexts[C], gradients=False) for C in ranks}
        for C, got in errors.items():
            for key in want:
                error = oracle.relative(got[key], want[key])
                assert error <= 2 * base[key] + 1e-7, f"{name}, C={C}, {key}: {error} against {base[key]} unsharded"
        first, last = (oracle.relative(errors[C]["out"], want["out"]) for C in (ranks[0], ranks[-1]))
        assert last <= 1.1 * first, f"{name}: error grew from {first} to {last} with the ranks"


MEASURED = [  # ms a layer, H200, forward, causal zigzag, 32/8 heads of 128 (docs/measurements/2026-11-22_ring.md)
    (8192, 2, "ring", 0.559), (16384, 2, "ring", 1.940), (32768, 2, "ring", 7.405), (32768, 2, "all_gather", 7.467),
    (8192, 4, "ring", 0.332), (16384, 4, "ring", 1.001), (32768, 4, "ring", 3.678),
    (8192, 4, "all_gather", 0.311), (16384, 4, "all_gather", 0.965), (32768, 4, "all_gather", 3.597),
]  # fmt: skip


@pytest.mark.parametrize("length, ranks, strategy, milliseconds", MEASURED)
def test_costs_agree_with_what_was_measured(length, ranks, strategy, milliseconds):
    found = costs(query_len=length, key_len=length, ranks=ranks, query_heads=32, kv_heads=8, head_size=128)[strategy]
    assert 1e3 * found.seconds == pytest.approx(milliseconds, rel=0.15)


def test_choose_gives_reasons():
    common = {"query_heads": 32, "kv_heads": 8, "head_size": 128}
    assert all(set(costs(query_len=64, key_len=64, ranks=ranks, **common)) == set(NAMES) for ranks in (1, 2))
    for ranks, length, name in (
        (1, 8192, "ring"),
        (2, 8192, "ring"),
        (4, 8192, "all_gather"),
        (4, 4 * 32768, "ring"),
        (8, 1 << 20, "ring"),
        (64, 1 << 20, "ring"),  # nobody holds all keys
    ):
        found, reason = choose_strategy(query_len=length, key_len=length, ranks=ranks, **common)
        assert found == name and (ranks < 3 or "ms a layer" in reason)
    name, reason = choose_strategy(query_len=1024, key_len=1 << 20, ranks=8, **common)
    assert name == "pass_q" and "fewer bytes than KV" in reason
    assert choose_strategy(query_len=64, key_len=64, ranks=4, axis=("a", "b"), **common)[0] == "ring_ulysses"
