"""Blocks of assignments: complete, disjoint, and no more of them than promised."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from ring_jax.moe.blocks import Blocks, block_size, capacity


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def chunks(experts, count, size, step):
    """Every chunk of the table's whole length, and the number of blocks that have rows."""
    blocks = Blocks.of(experts, count, size, step)
    steps = blocks.experts.shape[0] // step
    return [blocks.chunk(i, step, experts.shape[0]) for i in range(steps)], blocks.count


def table(experts, count, size, step):
    """{expert: assignments} as the loop would see them, and the number of blocks."""
    tokens, per_token = experts.shape
    all_chunks, blocks = chunks(jnp.asarray(experts, jnp.int32), count, size, step)
    found: dict[int, list[int]] = {}
    for i, chunk in enumerate(all_chunks):
        for j, (expert, assignments, rows) in enumerate(zip(*map(np.asarray, chunk), strict=True)):
            real = assignments < tokens * per_token
            assert real.any() == (i * step + j < blocks)
            assert np.array_equal(rows[real], assignments[real] // per_token)
            assert np.all(rows[~real] >= tokens) and len(set(assignments)) == len(set(rows)) == size
            assert 0 <= expert < count
            if real.any():
                found.setdefault(int(expert), []).extend(assignments[real].tolist())
    return found, int(blocks)


# Tokens, experts of a token, experts here, rows of a block, blocks of a step: few, for each is a program.
_SHAPES = [(1, 1, 2, 1, 2), (17, 2, 5, 4, 1), (23, 4, 3, 7, 2), (6, 3, 1, 6, 3)]


@settings(max_examples=25)
@given(st.data())
def test_every_assignment_once(data):
    tokens, per_token, count, size, step = data.draw(st.sampled_from(_SHAPES))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    # -2 ... count + 2: experts of other ranks on both sides.
    pool = np.arange(-2, max(count, per_token) + 3)
    weights = rng.uniform(size=pool.size) ** data.draw(st.sampled_from([0.1, 1.0, 8.0])) + 1e-9
    experts = np.stack([rng.choice(pool, per_token, replace=False, p=weights / weights.sum()) for _ in range(tokens)])
    found, blocks = table(experts, count, size, step)
    flat = experts.reshape(-1)
    assert found == {e: np.flatnonzero(flat == e).tolist() for e in range(count) if (flat == e).any()}
    assert blocks == sum(-(-len(a) // size) for a in found.values()) <= capacity(tokens, per_token, count, size)


def test_capacity_is_reached():
    """One row in every block but those of one expert: nothing smaller would do."""
    experts = np.array([[0]] * 9 + [[1], [2], [3]])
    assert table(experts, 4, 4, 1)[1] == capacity(12, 1, 4, 4) == 3 + 3


@pytest.mark.parametrize(
    "tokens, per_token, experts, size",
    [
        (0, 2, 4, 1),
        (1, 8, 256, 1),
        (4, 8, 256, 4),
        (512, 8, 256, 16),
        (8192, 8, 256, 128),
        (32768, 8, 256, 256),
        (2**17, 8, 256, 512),
        (100, 2, 4, 64),
    ],
)
def test_block_size(tokens, per_token, experts, size):
    assert block_size(tokens, per_token, experts) == size
