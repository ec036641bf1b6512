"""The cost function and the choice that `auto` makes."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from ring_jax.context import ContextParallel
from ring_jax.gdn import GDNShape, Heads, choose_strategy, costs, gated_delta_rule
from ring_jax.gdn.cost import BETWEEN_HOSTS, kernel_seconds, rule_flops
from ring_jax.layout import Zigzag
from tests.gdn.helpers import operands

QWEN = GDNShape(batch=1, length=1 << 17, heads=Heads(16, 32, 128, 128), width=2048, layers=3)


@pytest.mark.parametrize(
    "rows, tokens, key_heads, value_heads, milliseconds",
    [
        (1, 32768, 16, 32, 0.80),
        (1, 32768, 16, 64, 1.1),
        (1, 8192, 16, 32, 0.22),
        (4, 8192, 16, 32, 0.40),
        (1, 32768, 2, 8, 0.296),
    ],
)
def test_kernel_time_agrees_with_what_was_measured(rows, tokens, key_heads, value_heads, milliseconds):
    """docs/kernels/gdn.md; the row of 64 value heads is that of the first form."""
    found = 1e3 * kernel_seconds(tokens, rows, Heads(key_heads, value_heads, 128, 128))
    assert found == pytest.approx(milliseconds, rel=0.15)


@pytest.mark.parametrize("ranks", [2, 4, 8, 32])
@pytest.mark.parametrize("length", [16384, 1 << 17, 1 << 20])
def test_one_long_row_passes_states(ranks, length):
    """Dealt by the batch it would stay whole on one rank, and so would all that runs between the two all-to-alls."""
    shape = dataclasses.replace(QWEN, length=length)
    assert (
        choose_strategy(shape, ranks, "zigzag")[0]
        == choose_strategy(shape, ranks, "zigzag", BETWEEN_HOSTS)[0]
        == "state"
    )
    assert costs(shape, ranks, "zigzag")["batch"].beside > 0


def test_few_rows_do_not_stay_whole():
    """Though that would be fast for a model this small: the bundled one, whose heads do not divide over eight ranks."""
    bundled = GDNShape(1, 16384, Heads(2, 4, 32, 32), width=128, layers=3, itemsize=4)
    assert choose_strategy(bundled, 8, "zigzag")[0] == "state"
    assert choose_strategy(dataclasses.replace(bundled, width=0, batch=0), 8, "zigzag")[0] == "batch"  # nothing to hold


def test_many_rows_split_the_batch():
    assert choose_strategy(dataclasses.replace(QWEN, batch=64, length=4096), 8)[0] == "batch"


def test_fine_layouts_take_another_way():
    way, reason = choose_strategy(QWEN, 8, Zigzag(block=128))
    assert way == "head" and "state: layout Zigzag(block=128) cuts the sequence" in reason
    assert choose_strategy(QWEN, 32, Zigzag(block=128))[0] == "batch"  # 16 key heads do not divide either


def test_a_fixed_block_that_makes_two_chunks_is_served():
    assert costs(QWEN, 8, Zigzag(block=(1 << 17) // 16))["state"].obstacle is None


def test_indivisible_rows_are_paid_for():
    three, four = (costs(dataclasses.replace(QWEN, batch=b), 4)["batch"] for b in (3, 4))
    assert dataclasses.replace(three, beside=0.0) == four  # and products beside the rule run on the padding, too
    assert three.beside > four.beside == 0
    assert costs(QWEN, 8)["batch"].flops == pytest.approx(8 * costs(QWEN, 8)["head"].flops)


def test_state_moves_nothing_that_grows_with_the_sequence():
    longer = dataclasses.replace(QWEN, length=1 << 20)
    assert costs(longer, 8)["state"].bytes == costs(QWEN, 8)["state"].bytes
    assert costs(longer, 8)["head"].bytes == 8 * costs(QWEN, 8)["head"].bytes


def test_one_rank_moves_nothing():
    assert all(cost.bytes == 0 and cost.collectives == 0 for cost in costs(QWEN, 1).values())


def test_flops_agree_with_the_compiled_program():
    """Within a fifth of XLA's own count for one group of chunks (element-wise work is not in ours)."""
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in operands(0, 1, 64, 2, 4, 128, 128)]
    rule = lambda *x: gated_delta_rule(*x[:5], initial_state=x[5], implementation="chunked")  # noqa: E731
    counted = jax.jit(rule).lower(*shapes).compile().cost_analysis()["flops"]
    assert rule_flops(64, Heads(2, 4, 128, 128)) == pytest.approx(counted, rel=0.2)


def test_auto_is_the_cheapest_way():
    mesh = jax.make_mesh((4,), ("context",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    context = ContextParallel("context", layout="zigzag", mesh=mesh)
    arrays = operands(0, 1, 64, 4, 8, 16, 16)[:5]
    shape = GDNShape(1, 64, Heads(4, 8, 16, 16), conv_width=1, itemsize=4)

    def program(way):
        return str(jax.make_jaxpr(lambda *x: gated_delta_rule(*x, context=context, strategy=way))(*arrays))

    assert program("auto") == program(choose_strategy(shape, 4, "zigzag")[0])
    assert program("state") != program("head")
