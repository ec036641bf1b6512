"""The Hopper kernel of paged attention: lowered for CUDA and interpreted on the CPU, compared with the oracle on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.flash.hopper import paged_launch
from ring_jax.flash.hopper.paged_launch import PagedConfig, operand_reason, paged_config, shares
from ring_jax.flash.operands import BlockOptions
from ring_jax.flash.paged import paged_attention
from ring_jax.mosaic import compat
from tests.flash.test_paged import dense
from tests.support.hopper import on_hopper
from tests.support.marks import interpreted

LAYERS = 2


def inputs(seed, lengths, tokens, group, kv_heads, size, slots, dtype=jnp.bfloat16):
    """query, pages, table, lengths; the rows' pages in random order, what no row sees is NaN."""
    rng = np.random.default_rng(seed)
    rows, width = len(lengths), -(-max(lengths) // slots) + 1
    table = np.full((rows, width), 10**6, np.int32)  # not there
    pages = np.full((LAYERS, 2, rows * width + 1, slots, kv_heads, size), np.nan, np.float32)
    ids = iter(rng.permutation(np.arange(1, pages.shape[2])))
    for row, length in enumerate(lengths):
        for first in range(0, length, slots):
            table[row, first // slots] = page = next(ids)
            seen = min(slots, length - first)
            pages[:, :, page, :seen] = rng.normal(size=(LAYERS, 2, seen, kv_heads, size))
    query = rng.normal(size=(rows, tokens, group * kv_heads, size))
    return jnp.asarray(query, dtype), jnp.asarray(pages, dtype), jnp.asarray(table), jnp.asarray(lengths, jnp.int32)


def check(arrays, config=None, cap=None):
    query, pages, table, lengths = arrays
    run = functools.partial(paged_launch.forward, options=BlockOptions(0.11, cap), config=config)
    there = jnp.clip(lengths, 0, pages.shape[-3] * table.shape[1])
    out, lse = jax.jit(run)(query, pages, table, there, jnp.int32(1))
    arrays = (np.asarray(jnp.asarray(x, jnp.float32)) for x in (query, pages))
    want, want_lse = dense(*arrays, np.asarray(table), np.asarray(lengths), 1, 0.11, cap)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
    empty = np.isneginf(want_lse)
    np.testing.assert_allclose(np.where(empty, 0, lse), np.where(empty, 0, want_lse), atol=2e-5, rtol=1e-5)
    assert np.linalg.norm(out - want) <= 4e-3 * np.linalg.norm(want)
    assert np.abs(out - want).max() <= 2e-2 and not np.any(np.asarray(out)[empty])


# Interpreted on the CPU.


@interpreted
@pytest.mark.parametrize(
    ("lengths", "slots", "heads", "config"),
    [
        ([40, 0, 65], 16, (1, 2), PagedConfig(block_kv=16, stages=2, warpgroups=2, blocks=3)),
        ([50], 8, (2, 1), PagedConfig(block_kv=16, stages=3, blocks=4)),
    ],
    ids=["shares end inside of rows", "copies of part of a block"],
)
def test_interpreted(lengths, slots, heads, config):
    with compat.interpret_mode():
        check(inputs(0, lengths, 1, *heads, 64, slots), config)


@pytest.mark.parametrize("lengths", [[0, 0], [1], [700, 0, 64, 65, 0], [128] * 9, [10**6, 1]])
@pytest.mark.parametrize("blocks", [1, 7, 132])
def test_every_tile_has_one_share(lengths, blocks):
    """Shares cover the line of tiles without gaps, and partial results of share and segment have places of their own."""
    kv_heads, config = 3, PagedConfig(block_kv=32, stages=2, blocks=blocks)
    starts, visits = map(np.asarray, jax.jit(shares, static_argnums=(1, 2))(np.int32(lengths), kv_heads, config))
    share = max(1, -(-starts[-1] // blocks))  # as the kernels have it
    tiles = np.repeat(-(-np.asarray(lengths) // config.tile), kv_heads)
    np.testing.assert_array_equal(starts, np.concatenate([[0], np.cumsum(tiles)]))
    seen, places = np.zeros(len(tiles), int), []
    for block, (first, last) in enumerate(visits.T):
        begin, end = block * share, min((block + 1) * share, starts[-1])
        for segment in range(first, last + 1):
            here = min(end, starts[segment + 1]) - max(begin, starts[segment])
            if here > 0:
                seen[segment] += here
                places.append(block + segment)
    np.testing.assert_array_equal(seen, tiles)
    assert len(set(places)) == len(places) and max(places, default=0) < blocks + len(tiles) - 1


# Lowering for CUDA, on the CPU.


@interpreted
@pytest.mark.parametrize(
    ("size", "slots", "group", "tokens"), [(64, 128, 8, 2), (128, 64, 4, 1), (192, 8, 16, 4), (256, 16, 8, 1)]
)
def test_lowers(size, slots, group, tokens):
    shape = jax.ShapeDtypeStruct
    operands = (
        shape((3, tokens, 2 * group, size), jnp.float16),
        shape((LAYERS, 2, 9, slots, 2, size), jnp.float16),
        shape((3, 4), jnp.int32),
        shape((3,), jnp.int32),
        shape((), jnp.int32),
    )
    assert operand_reason(*operands[:2], BlockOptions(1.0)) is None
    with on_hopper():
        run = jax.jit(functools.partial(paged_launch.forward, options=BlockOptions(1.0)))
        text = run.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize("size", [64, 128, 192, 256])
def test_configs_fit(size):
    config = paged_config(size)
    assert config.shared_memory_bytes(size) <= paged_launch.HOPPER.shared_memory_bytes
    # Bytes in flight on all multiprocessors cover two microseconds of 3.35 TB/s.
    assert 132 * 4 * size * config.stages * config.tile >= 2 * 3.35e6


@pytest.mark.parametrize(
    ("size", "slots", "tokens", "dtype", "word"),
    [
        (96, 64, 1, jnp.bfloat16, "head size"),
        (128, 48, 1, jnp.bfloat16, "48 slots"),
        (128, 64, 17, jnp.bfloat16, "64 queries"),
        (128, 64, 1, jnp.float32, "bfloat16"),
    ],
)
@interpreted
def test_says_what_it_cannot_run(size, slots, tokens, dtype, word):
    shape = jax.ShapeDtypeStruct
    operands = shape((1, tokens, 8, size), dtype), shape((1, 2, 4, slots, 2, size), dtype)
    assert word in operand_reason(*operands, BlockOptions(1.0))


# On a GPU.

RAGGED = [0, 1, 63, 64, 65, 1000, 2048, 0, 129]


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128, 192, 256])
@pytest.mark.parametrize(
    ("slots", "group", "tokens", "dtype", "cap"),
    [
        (64, 4, 1, jnp.bfloat16, None),
        (16, 8, 2, jnp.float16, 20.0),
        (8, 1, 1, jnp.bfloat16, None),
        (256, 16, 4, jnp.bfloat16, None),
    ],
)
def test_gpu_against_dense(size, slots, group, tokens, dtype, cap):
    check(inputs(1, RAGGED, tokens, group, 2, size, slots, dtype), cap=cap)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[20000], [300] * 70, [0], [0, 0, 5], [4096, 1, 4096]])
def test_gpu_lengths(lengths):
    """One row over all thread blocks, more segments than those, rows that see nothing."""
    check(inputs(2, lengths, 1, 4, 4, 128, 64))


@pytest.mark.gpu
def test_gpu_repeats_bit_by_bit_and_is_the_default():
    query, pages, table, lengths = inputs(3, RAGGED, 1, 4, 4, 256, 64)
    out, lse = paged_attention(query, pages, table, lengths, layer=1)
    for _ in range(5):
        again = paged_attention(query, pages, table, lengths, layer=1, implementation="mosaic")
        np.testing.assert_array_equal(out, again[0])
        np.testing.assert_array_equal(lse, again[1])


@pytest.mark.gpu
def test_gpu_one_program_for_all_layers():
    """In a loop over layers with a traced index the pool is neither copied nor sliced."""
    query, pages, table, lengths = inputs(4, RAGGED, 1, 4, 4, 128, 64)

    def step(query, pages, table, lengths):
        def layer(query, index):
            return paged_attention(query, pages, table, lengths, layer=index)[0].astype(query.dtype), None

        return jax.lax.scan(layer, query, jnp.arange(LAYERS, dtype=jnp.int32))[0]

    compiled = jax.jit(step).lower(query, pages, table, lengths).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < pages.nbytes // 2
    assert np.isfinite(np.asarray(compiled(query, pages, table, lengths), np.float32)).all()
