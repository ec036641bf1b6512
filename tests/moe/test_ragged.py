"""The ragged exchange: its arithmetic on CPUs, with the collective emulated by its documentation, and its lowering for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P, lax
from jax.sharding import AxisType

from ring_jax.moe import layer, moe, ragged
from ring_jax.moe.exchange import choose_strategy
from tests.moe.helpers import check, dense, expected, margin, operands, pulled
from tests.moe.test_expert_parallel import slow, specs, spread
from tests.support.hopper import on_hopper
from tests.support.mesh import make_mesh
from tests.support.numbers import jit


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`lax.ragged_all_to_all` by its documentation; rows that senders and receivers do not agree on become NaN."""
    everywhere = lambda a: lax.all_gather(a, axis_name)  # noqa: E731
    here, row = lax.axis_index(axis_name), jnp.arange(operand.shape[0])
    sources = (everywhere(a) for a in (operand, input_offsets, send_sizes, output_offsets))
    for rank, (rows, starts, sizes, lands) in enumerate(zip(*sources, strict=True)):
        offset = row - starts[here]
        sent = (offset >= 0) & (offset < sizes[here])
        rows = jnp.where(recv_sizes[rank] == sizes[here], rows, jnp.full_like(rows, jnp.nan))
        output = output.at[jnp.where(sent, lands[here] + offset, output.shape[0])].set(rows, mode="drop")
    return output


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(ragged.lax, "ragged_all_to_all", emulated)
    monkeypatch.setattr(layer, "choose_strategy", lambda *_: "ragged")


@pytest.mark.parametrize(
    "ranks, experts, top_k, favoured, shunned",
    [
        slow(2, 16, 4, (), ()),  # several experts of a token on one rank
        (4, 16, 4, (2, 9, 14), (4, 5, 6, 7)),  # one rank with none
        slow(8, 16, 4, (), (0,)),
        slow(4, 8, 2, (0, 1), ()),  # every token to one rank
    ],
)
def test_equals_one_device(on_cpu, ranks, experts, top_k, favoured, shunned):
    arrays = operands(40, experts, favoured=favoured, shunned=shunned)
    run = pulled(spread(make_mesh(expert=ranks), tokens="expert", top_k=top_k))
    check(run(*arrays), expected(*arrays, top_k=top_k))


def test_with_padding_data_and_tensor_axes(on_cpu):
    x, weights, cotangent = operands(40, 8)
    valid = np.arange(40) % 20 < 13
    mesh = make_mesh(data=2, expert=2, tensor=2)
    run = pulled(spread(mesh, tensor="tensor", tokens=("data", "expert"), valid=jnp.asarray(valid), top_k=2))
    check(run(x, weights, cotangent), expected(x, weights, cotangent, top_k=2, valid=valid))


@pytest.mark.parametrize("way", ["gather", slow("ragged")])
def test_slice_by_slice(on_cpu, monkeypatch, way):
    """Three slices, which do not divide the tokens of a rank."""
    monkeypatch.setattr(layer, "choose_strategy", lambda *_: way)
    monkeypatch.setattr("ring_jax.moe.exchange._ROWS", 16)
    arrays = operands(40, 8)
    run = pulled(spread(make_mesh(expert=4), tokens="expert", top_k=2))
    check(run(*arrays), expected(*arrays, top_k=2))


def test_sends_a_token_once_to_a_rank():
    """The rows sent: one for each rank that holds an expert of the token, in the order of ranks, then of tokens."""
    ranks_of = np.array([[0, 0, 1], [1, 1, 1], [2, 2, 2], [1, 0, 2]])  # of two ranks; 2 is none
    mapped = jax.shard_map(
        lambda a: jax.tree.map(lambda b: b[None], ragged.Route.of(a, 2, "expert")),
        mesh=make_mesh(expert=2),
        in_specs=P("expert"),
        out_specs=P("expert"),
    )
    route = jit(mapped)(jnp.asarray(np.concatenate([ranks_of, ranks_of[::-1]]), jnp.int32))
    first = jax.tree.map(lambda a: np.asarray(a[0]).tolist(), route)
    assert first.size == [2, 3] and first.start == [0, 2]
    assert first.tokens == [0, 3, 0, 1, 3, 4, 4, 4]
    assert first.rows == [[0, 8, 2], [3, 8, 8], [8, 8, 8], [4, 1, 8]]


def test_way_with_fewer_bytes():
    assert choose_strategy("auto", 8, 8, "gpu") == choose_strategy("auto", 64, 8, "cpu") == "gather"
    assert choose_strategy("auto", 16, 8, "gpu") == choose_strategy("ragged", 2, 8, "gpu") == "ragged"
    with pytest.raises(ValueError, match="unknown strategy 'dense': expected one of"):
        choose_strategy("dense", 8, 8, "gpu")
    with pytest.raises(
        NotImplementedError, match="strategy='ragged' cannot run here: XLA has no ragged_all_to_all on CPUs"
    ):
        choose_strategy("ragged", 8, 8, "cpu")


@pytest.mark.parametrize("ranks, exchange, sent", [(4, "auto", 1), (2, "ragged", 1), (2, "auto", 0)])
def test_lowers_for_cuda(ranks, exchange, sent):
    """On GPUs the ragged collective is used where C > k: twice out and once back, and as often for the gradient."""
    x, weights = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), operands(64, 8)[:2])

    def loss(x, weights):
        local = lambda x, w: moe(x, w, top_k=2, expert_axis="expert", strategy=exchange)[0]  # noqa: E731
        y = jax.shard_map(local, in_specs=(P("expert"), specs("expert")), out_specs=P("expert"))(x, weights)
        return (y.astype(jnp.float32) ** 2).sum()

    def count(f):
        text = jax.jit(f).trace(x, weights).lower(lowering_platforms=("cuda",)).as_text()
        return text.count("@ragged_all_to_all")

    with on_hopper(ranks, "expert"):
        assert count(loss) == 3 * sent
        assert exchange != "auto" or not sent or count(jax.grad(loss, argnums=(0, 1))) == 6


@pytest.mark.multi_gpu
@pytest.mark.parametrize("exchange", ["gather", "ragged"])
@pytest.mark.parametrize("favoured", [(), (0, 1)])
def test_on_gpus(exchange, favoured):
    """Forward and gradients over all GPUs of this host, in float32 with float32 products."""
    ranks = len(jax.devices("gpu"))
    arrays = operands(ranks * 96, 8 * ranks, favoured=favoured, width=64, features=32)
    mesh = jax.make_mesh((ranks,), ("expert",), axis_types=(AxisType.Auto,))
    local = lambda x, w: moe(x, w, top_k=2, expert_axis="expert", strategy=exchange)[0]  # noqa: E731
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("expert"), specs("expert")), out_specs=P("expert"))

    def run(x, weights, cotangent):
        y, pull = jax.vjp(mapped, x, weights)
        return y, pull(cotangent)

    with jax.default_matmul_precision("highest"):
        found = jax.jit(run)(*arrays)
    check(found, expected(*arrays, top_k=2))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4, 700])
def test_on_one_gpu(tokens):
    """Several blocks a step, with more steps than one."""
    choices = (operands(tokens, 64, width=64, features=32, seed=seed) for seed in range(100))
    x, weights, cotangent = next(c for c in choices if margin(*c[:2], 4) > 2e-4)
    with jax.default_matmul_precision("highest"):
        found = pulled(dense(top_k=4))(x, weights, cotangent)
    check(found, expected(x, weights, cotangent, top_k=4))
