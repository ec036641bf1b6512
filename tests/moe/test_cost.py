"""What a layer computes and holds depends on the assignments, not on the number of experts."""

import jax
import numpy as np
import pytest

from ring_jax.moe import moe
from ring_jax.moe.blocks import block_size, capacity
from tests.moe.helpers import operands
from tests.support.numbers import jit


def compiled(experts, *, tokens=256, top_k=8, width=24, gradient=False):
    x, weights, _ = operands(tokens, experts, width=width)
    run = lambda x, w: (moe(x, w, top_k=top_k)[0] ** 2).sum()  # noqa: E731
    return jit(jax.grad(run, argnums=(0, 1)) if gradient else run).lower(x, weights).compile()


def rows_computed(experts, tokens, top_k):
    """Rows that the loop multiplies, with padding, for even random routing (`test_blocks` holds it to that)."""
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.uniform(size=(tokens, experts)), axis=1)[:, :top_k]
    size = block_size(tokens, top_k, experts)
    return int((-(-np.bincount(chosen.reshape(-1)) // size)).sum()) * size


@pytest.mark.parametrize("tokens", [1, 16, 256, 4096])
@pytest.mark.parametrize("experts", [16, 128, 512])
def test_rows_do_not_grow_with_experts(experts, tokens):
    """Padding at most as much again, down to 8 rows an expert; `lax.ragged_dot` on CPUs computes `experts` times the rows."""
    touched = min(experts, tokens * 8)
    assert rows_computed(experts, tokens, 8) <= 2 * max(tokens * 8, touched * min(8, tokens))


def test_one_token_touches_k_experts():
    assert capacity(1, 8, 256, block_size(1, 8, 256)) == 8
    assert rows_computed(256, 1, 8) == 8


def test_flops_of_a_block_are_those_of_its_rows():
    """XLA counts the body of a loop once: three products of one block, and a router that grows with the experts."""

    def flops(experts):
        size = block_size(256, 8, experts)
        router = 2 * 256 * 24 * experts
        block = size * 6 * 24 * 12
        return compiled(experts).cost_analysis()["flops"], router, block

    for experts in (16, 128):
        counted, router, block = flops(experts)
        # Softmax, top-k, sorting and indices on top, some tens of operations per token and expert.
        assert router + block <= counted <= router + block + 60 * 256 * experts
        assert counted < router + 256 * 8 * 6 * 24 * 12, "less than all assignments: there is one loop over blocks"


def test_memory_does_not_grow_with_experts_of_a_token():
    """No rows of assignments are held, forward or backward: six more experts a token cost some integers."""
    few, many = (
        compiled(16, tokens=2048, width=256, top_k=k, gradient=True).memory_analysis().temp_size_in_bytes
        for k in (2, 8)
    )
    assert many - few < 0.1 * 6 * 2048 * 256 * 4
