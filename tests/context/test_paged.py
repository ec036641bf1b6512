"""Pages over ranks: placement against the layout that it is, writes, moves to owners, decode against dense attention, HLO."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as S

import ring_jax
from ring_jax.context import merge
from ring_jax.context.merge import choose_merge, merge_costs, merge_over_ranks
from ring_jax.context.paged import Placement, decode_attention, most_owned, to_owners, write_pages
from ring_jax.flash.paged import gather_pages
from ring_jax.layout import Striped, as_layout
from tests.support.hlo import collectives, memory
from tests.support.layouts import Backwards

P, p, K, N, H, R, n, LAYERS = 12, 4, 2, 8, 16, 3, 4, 2
POOL = S(None, None, None, "context")


def mesh_of(ranks):
    return jax.sharding.Mesh(np.asarray(jax.devices()[:ranks]), ("context",))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_placement_is_a_closed_formula(ranks):
    placement, layout = Placement(ranks, p), Striped(p)
    total = ranks * p * 6
    position = np.arange(total)
    which, owner, slot = placement.locate(position)
    np.testing.assert_array_equal(owner, layout.rank_of(position, total, ranks))
    index = which * p + slot
    np.testing.assert_array_equal(index, [layout.local_index(int(t), total, ranks) for t in position])
    np.testing.assert_array_equal(placement.position(index, owner), position)
    for rank in range(ranks):
        counts = [layout.count_below(t, rank, total, ranks) for t in range(total + 1)]
        np.testing.assert_array_equal(placement.local_length(np.arange(total + 1), rank), counts)
        np.testing.assert_array_equal(placement.local_length(jnp.arange(total + 1), rank), counts)
        assert placement.local_length(total - 1, rank) == counts[-2]
    held = [placement.local_length(t + 7, 0) - placement.local_length(t, 0) for t in range(total)]
    assert max(held) == most_owned(placement, 7)
    assert placement.pages(0) == 0 and placement.pages(1) == 1 and placement.pages(total) == 6


def random_pool(seed, ranks, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=(LAYERS, 2, P, ranks * p, K, H)).astype(dtype)


def tables(ranks):
    """Ids of different pages for each row."""
    return np.random.default_rng(5).permutation(np.arange(1, P + 1))[: R * n].reshape(R, n).astype(np.int32) % P


@pytest.mark.parametrize("ranks", [1, 3])
def test_writes_what_is_its_own_and_drops_the_rest(ranks):
    placement, table = Placement(ranks, p), tables(ranks)
    table[2, 1] = P + 3  # not there
    pages = random_pool(0, ranks)
    span = n * ranks * p
    positions = np.array([[0, span - 1, ranks * p], [5, -1, span], [ranks * p, 2, span + 40]], np.int32)
    new = np.random.default_rng(1).normal(size=(LAYERS, 2, R, 3, K, H)).astype(np.float32)
    want = pages.copy()
    for r, t in np.ndindex(positions.shape):
        at = positions[r, t]
        if 0 <= at < span and table[r, at // (ranks * p)] < P:
            want[:, :, table[r, at // (ranks * p)], at % (ranks * p)] = new[:, :, r, t]

    def local(pages, new):
        return write_pages(pages, new, table, positions, placement, jax.lax.axis_index("context"))

    spec = S(None, None, None, "context")
    step = jax.jit(jax.shard_map(local, mesh=mesh_of(ranks), in_specs=(spec, S()), out_specs=spec), donate_argnums=0)
    lowered = step.lower(pages, new).compile()
    assert not collectives(lowered)
    np.testing.assert_array_equal(step(jnp.asarray(pages), new), want)


def test_writes_in_place():
    """One scatter into the donated pool: no copy, no transpose."""
    placement, table = Placement(1, p), tables(1)
    large = jax.ShapeDtypeStruct((4, 3, 2, 4096, p, K, H), jnp.float32)
    new = jax.ShapeDtypeStruct((4, 3, 2, R, 1, K, H), jnp.float32)
    write = jax.jit(functools.partial(write_pages, placement=placement), donate_argnums=0)
    found = memory(write.lower(large, new, table, np.zeros((R, 1), np.int32)))
    assert found.alias_size_in_bytes == np.prod(large.shape) * 4
    assert found.temp_size_in_bytes < 2**17


@pytest.mark.parametrize(("layout", "ranks"), [("zigzag", 4), ("contiguous", 3), ("striped", 2), (Backwards(), 2)])
@pytest.mark.parametrize("chunk", [24, 48])
def test_a_chunk_reaches_its_pages(layout, ranks, chunk):
    """From any layout, at any start, of any length; in one all-to-all."""
    placement, table, layout = Placement(ranks, p), tables(ranks), as_layout(layout)
    starts, lengths = np.array([0, 5, ranks * p + 1], np.int32), np.array([chunk, chunk - 7, 0], np.int32)
    order = np.concatenate([layout.positions(r, chunk, ranks) for r in range(ranks)])
    new = np.random.default_rng(2).normal(size=(LAYERS, 2, R, chunk, K, H)).astype(np.float32)
    pages = random_pool(0, ranks)

    def local(pages, new):
        rank = jax.lax.axis_index("context")
        arrived, positions = to_owners(new, starts, lengths, placement, layout, "context")
        return write_pages(pages, arrived, table, positions, placement, rank)

    spec = S(None, None, None, "context")
    step = jax.jit(jax.shard_map(local, mesh=mesh_of(ranks), in_specs=(spec, spec), out_specs=spec))
    want = pages.copy()
    for r in range(R):
        for t in range(lengths[r]):
            at = starts[r] + t
            if at < n * ranks * p:  # the table is not longer
                want[:, :, table[r, at // (ranks * p)], at % (ranks * p)] = new[:, :, r, t]
    np.testing.assert_array_equal(step(pages, new[:, :, :, order]), want)
    found = collectives(step.lower(pages, new).compile())
    blocks = chunk // ranks // layout.block_size(chunk, ranks)
    most = most_owned(placement, layout.block_size(chunk, ranks))
    assert found == [("all-to-all", LAYERS * 2 * R * ranks * blocks * most * K * H * 4)]


def dense(query, key, value, pages, table, lengths, layer):
    """float64 causal attention of the new tokens to what the pages hold and to themselves."""
    out = np.zeros(query.shape)
    pages = pages[layer].astype(np.float64)
    for r in range(R):
        past = pages[:, table[r]].reshape(2, -1, K, H)[:, : lengths[r]]
        for t in range(query.shape[1]):
            own = np.stack([key, value])[:, r, : t + 1]
            k, v = np.repeat(np.concatenate([past, own], axis=1), N // K, axis=2)
            logits = np.einsum("nh,snh->ns", query[r, t].astype(np.float64), k) * H**-0.5
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out[r, t] = np.einsum("ns,snh->nh", weights / weights.sum(-1, keepdims=True), v)
    return out


def step_inputs(ranks, tokens):
    rng = np.random.default_rng(3)
    query, key, value = (rng.normal(size=(R, tokens, h, H)).astype(np.float32) for h in (N, K, K))
    lengths = np.array([n * ranks * p - tokens, ranks * p + 3, 0], np.int32)
    return query, key, value, random_pool(4, ranks), tables(ranks), lengths


def decode_program(ranks, strategy, outputs):
    def local(query, key, value, pages, table, lengths):
        options = {"layer": 1, "placement": Placement(ranks, p), "axis": "context"}
        found = decode_attention(
            query, key, value, pages, table, lengths, outputs=outputs, strategy=strategy, **options
        )
        return found

    out = S() if outputs == "same" else S(None, None, "context")
    return jax.jit(jax.shard_map(local, mesh=mesh_of(ranks), in_specs=(S(), S(), S(), POOL, S(), S()), out_specs=out))


@pytest.mark.parametrize("strategy", merge.STRATEGIES)
@pytest.mark.parametrize(("ranks", "outputs", "tokens"), [(2, "same", 1), (4, "heads", 3)])
def test_decode_over_ranks(strategy, ranks, outputs, tokens):
    inputs = step_inputs(ranks, tokens)
    found = decode_program(ranks, strategy, outputs)(*inputs)
    np.testing.assert_allclose(found, dense(*inputs, 1), atol=5e-6)


def test_decode_on_one_device_and_by_auto_over_three():
    for ranks in (1, 3):
        inputs = step_inputs(ranks, 2)
        if ranks == 1:
            found = jax.jit(functools.partial(decode_attention, layer=1, placement=Placement(1, p), axis=None))(*inputs)
        else:
            found = decode_program(ranks, "auto", "same")(*inputs)
        np.testing.assert_allclose(found, dense(*inputs, 1), atol=5e-6)


def test_a_prefill_in_chunks():
    """What docs/kernels/paged.md shows: chunks go to pages from the layout in which they were computed, and later ones read them."""
    ranks, chunk, total = 2, 16, 32
    placement, mesh = Placement(ranks, p), mesh_of(ranks)
    past = ring_jax.ContextParallel("context", mesh=mesh, layout=Striped(p))
    here = ring_jax.ContextParallel("context", mesh=mesh, layout="zigzag")
    query, key, value = (np.random.default_rng(9).normal(size=(1, total, h, H)).astype(np.float32) for h in (N, K, K))
    table, pages = jnp.asarray([[3, 1, 4, 2]]), jnp.zeros((1, 2, 5, ranks * p, K, H))

    def write(pages, new, start):
        lengths = jnp.full(1, chunk)
        new, at = to_owners(new, start, lengths, placement, "zigzag", "context")
        return write_pages(pages, new, table, at, placement, jax.lax.axis_index("context"))

    write = jax.jit(jax.shard_map(write, mesh=mesh, in_specs=(POOL, POOL, S()), out_specs=POOL), donate_argnums=0)
    read = jax.jit(jax.shard_map(gather_pages, mesh=mesh, in_specs=(POOL, S()), out_specs=S(None, None, "context")))
    outs = []
    for start in range(0, total, chunk):
        q, k, v = (here.to_layout(jnp.asarray(x[:, start : start + chunk])) for x in (query, key, value))
        partial = ring_jax.ring_attention(q, k, v, is_causal=True, context=here, return_residual=True)
        if start:
            seen = {"key_value_seq_lengths": jnp.full(1, start), "context": past}
            partial = ring_jax.merge_partials(
                *partial, *ring_jax.ring_attention(q, *read(pages, table), return_residual=True, **seen)
            )
        outs.append(here.from_layout(partial[0], chunk))
        pages = write(pages, jnp.stack([k, v])[None], jnp.full(1, start))
    want = ring_jax.flash_attention(
        query, key, value, np.zeros((1, total), np.int32), np.arange(1, total + 1, dtype=np.int32)[None]
    )[0]
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), want, atol=5e-6)


C = 4
ROW = R * 1 * N * 4  # bytes of the LSEs
EXPECTED = {
    ("all_reduce", "same"): [("all-reduce", ROW), ("all-reduce", ROW * (H + 1))],
    ("reduce_scatter", "heads"): [("all-gather", ROW * C), ("reduce-scatter", ROW * H // C)],
    ("all_to_all", "heads"): [("all-to-all", ROW * (H + 1))],
    ("reduce_scatter", "same"): [("all-gather", ROW * C), ("reduce-scatter", ROW * H // C), ("all-gather", ROW * H)],
    ("all_to_all", "same"): [("all-to-all", ROW * (H + 1)), ("all-gather", ROW * H)],
}


@pytest.mark.parametrize(("strategy", "outputs"), EXPECTED)
def test_what_moves(strategy, outputs):
    """Kinds, number and bytes; nothing of the length of the keys. `merge_costs` counts what a rank receives of it."""
    compiled = decode_program(C, strategy, outputs).lower(*step_inputs(C, 1)).compile()
    found, want = collectives(compiled), EXPECTED[strategy, outputs]
    assert sorted(found) == sorted(want)
    cost = merge_costs(R, N, H, C, outputs, 4)[strategy]
    received = {
        "all-reduce": 2 * (C - 1) / C,
        "all-gather": (C - 1) / C,
        "reduce-scatter": C - 1,
        "all-to-all": (C - 1) / C,
    }
    assert cost.collectives == len(want)
    assert cost.bytes == pytest.approx(sum(size * received[kind] for kind, size in want))


def test_auto_says_why():
    name, why = choose_merge(32, 16, 256, 8, "heads")
    assert name == "all_to_all" and "bytes" in why and "reduce_scatter" in why
    assert choose_merge(32, 6, 256, 8) == (
        "all_reduce",
        "reduce_scatter and all_to_all cannot run: 6 heads do not divide over 8 ranks",
    )


def test_empty_everywhere_is_empty():
    """A row that no rank sees: 0, not NaN, by each way."""
    out, lse = jnp.zeros((1, 1, N, H)), jnp.full((1, 1, N), -jnp.inf)
    for strategy in merge.STRATEGIES:
        run = functools.partial(merge_over_ranks, axis="context", strategy=strategy)
        merged = jax.jit(jax.shard_map(run, mesh=mesh_of(2), in_specs=(S(), S()), out_specs=S()))(out, lse)
        assert not np.any(np.asarray(merged))


def test_says_what_does_not_divide():
    out, lse = jnp.zeros((1, 1, 3, H)), jnp.zeros((1, 1, 3))
    for strategy, outputs in (("all_to_all", "same"), ("auto", "heads")):
        run = functools.partial(merge_over_ranks, axis="context", strategy=strategy, outputs=outputs)
        with pytest.raises(ValueError, match="3 heads do not divide over 2 ranks"):
            jax.shard_map(run, mesh=mesh_of(2), in_specs=(S(), S()), out_specs=S())(out, lse)
