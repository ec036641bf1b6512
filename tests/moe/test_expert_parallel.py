"""Experts spread over a mesh axis: the same numbers as on one device, and known collectives."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from ring_jax.moe import MoEWeights, RouterStats, moe
from tests.moe.helpers import check, expected, operands, pulled
from tests.support.hlo import collectives, kinds
from tests.support.mesh import make_mesh
from tests.support.numbers import jit


def specs(expert, tensor=None):
    return MoEWeights(P(), P(expert, None, None, tensor), P(expert, tensor))


def spread(mesh, *, expert="expert", tensor=None, tokens=None, valid=None, **options):
    """`moe` over the mesh as a function of whole arrays, y only; x lies over the axes `tokens`."""
    spread_here = tokens is not None and bool(set(np.atleast_1d(expert)) & set(np.atleast_1d(tokens)))

    def local(x, weights, valid):
        axes = {"expert_axis": expert, "tensor_axis": tensor, "tokens_spread": spread_here}
        return moe(x, weights, valid=valid, **axes, **options)[0]

    in_specs = (P(tokens), specs(expert, tensor), None if valid is None else P(tokens))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=P(tokens))
    return lambda x, weights: mapped(x, weights, valid)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "ranks, experts, top_k, favoured, shunned",
    [
        (2, 8, 2, (), ()),
        slow(4, 8, 2, (0, 1), ()),  # every token to one rank
        (8, 16, 4, (2, 9, 14), (4, 5)),  # one rank with none
        slow(4, 16, 4, (), (4, 5, 6, 7)),
    ],
)
def test_equals_one_device(ranks, experts, top_k, favoured, shunned):
    arrays = operands(40, experts, favoured=favoured, shunned=shunned)
    run = pulled(spread(make_mesh(expert=ranks), tokens="expert", top_k=top_k))
    check(run(*arrays), expected(*arrays, top_k=top_k))


def test_every_token_to_one_expert():
    arrays = operands(40, 8, favoured=(5,))
    run = pulled(spread(make_mesh(expert=4), tokens="expert", top_k=1, renormalize=False))
    check(run(*arrays), expected(*arrays, top_k=1, renormalize=False))


@pytest.mark.parametrize("ranks, tokens, favoured", [(4, 1, ()), (8, 40, (0, 1))])
def test_same_tokens_everywhere(ranks, tokens, favoured):
    arrays = operands(tokens, 16, favoured=favoured)
    run = pulled(spread(make_mesh(expert=ranks), top_k=4))
    check(run(*arrays), expected(*arrays, top_k=4))


@pytest.mark.parametrize("expert, tokens", [("expert", "expert"), slow("expert", None), slow(None, None)])
def test_features_over_a_tensor_axis(expert, tokens):
    arrays = operands(40, 8)
    mesh = make_mesh(expert=2, tensor=4)
    run = pulled(spread(mesh, expert=expert, tensor="tensor", tokens=tokens, top_k=2))
    check(run(*arrays), expected(*arrays, top_k=2))


def test_experts_over_two_axes_and_data_over_a_third():
    arrays = operands(40, 8)
    mesh = make_mesh(data=2, outer=2, expert=2)
    run = pulled(spread(mesh, expert=("outer", "expert"), tokens=("data", "outer", "expert"), top_k=2))
    check(run(*arrays), expected(*arrays, top_k=2))


@pytest.mark.parametrize("tokens", ["expert", slow(None)])
def test_padding(tokens):
    x, weights, cotangent = operands(40, 8)
    valid = np.arange(40) % 20 < 13  # unlike numbers of valid tokens on the ranks
    run = pulled(spread(make_mesh(expert=4), tokens=tokens, valid=jnp.asarray(valid), top_k=2))
    poisoned = np.where(valid[:, None], x, np.nan).astype(np.float32)
    check(run(poisoned, weights, cotangent), expected(x, weights, cotangent, top_k=2, valid=valid))


def test_in_a_scan_over_rematerialised_layers():
    """As a model runs it: layers stacked, each under jax.checkpoint, in one checked shard_map."""
    x, weights, cotangent = operands(16, 8)
    other = operands(16, 8, seed=4)[1]
    stacked = jax.tree.map(lambda *a: np.stack(a), weights, other)

    def layers(run):
        def model(x, stacked):
            @jax.checkpoint
            def layer(x, weights):
                y, stats = run(x, weights)
                return x + y, stats

            y, stats = jax.lax.scan(layer, x, stacked)
            return y, jax.tree.map(lambda a: a.sum(axis=0), stats)

        return model

    def local(x, stacked):
        y, stats = layers(lambda x, w: moe(x, w, top_k=2, expert_axis="expert"))(x, stacked)
        return y, jax.lax.psum(stats, "expert")

    stacked_specs = MoEWeights(P(), P(None, "expert"), P(None, "expert"))
    mapped = jax.shard_map(
        local, mesh=make_mesh(expert=4), in_specs=(P("expert"), stacked_specs), out_specs=(P("expert"), P())
    )

    def loss(run, x, stacked):
        y, stats = run(x, stacked)
        return jnp.vdot(y, cotangent) + stats.probs @ jnp.arange(8.0), stats

    alone = layers(lambda x, w: moe(x, w, top_k=2))
    (found, stats), gradients = jit(jax.value_and_grad(functools.partial(loss, mapped), (0, 1), has_aux=True))(
        x, stacked
    )
    (wanted, total), others = jit(jax.value_and_grad(functools.partial(loss, alone), (0, 1), has_aux=True))(x, stacked)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_array_equal(stats.counts, total.counts)
    assert isinstance(stats, RouterStats) and stats.tokens == total.tokens == 32
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients, others)


def test_explicit_mesh_axes():
    arrays = operands(40, 8)
    mesh = make_mesh(expert=4)
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        put = lambda a, spec: jax.device_put(a, jax.NamedSharding(mesh, spec))  # noqa: E731
        x, weights, cotangent = arrays
        placed = put(x, P("expert")), jax.tree.map(put, weights, specs("expert")), put(cotangent, P("expert"))
        found = pulled(spread(mesh, tokens="expert", top_k=2))(*placed)
    check(found, expected(*arrays, top_k=2))


def moved(program, mesh, tokens, top_k=2, **options):
    """Collectives of the compiled program, for 64 tokens."""
    x, weights, _ = operands(64, 8)
    return collectives(jit(program(spread(mesh, tokens=tokens, top_k=top_k, **options))).lower(x, weights).compile())


def test_collectives_of_spread_tokens():
    """Tokens and routing are gathered, sums scattered: no more, and no weight moves."""
    mesh = make_mesh(expert=4)
    found = moved(lambda f: f, mesh, "expert")
    assert kinds(found) == Counter({"all-gather": 2, "reduce-scatter": 1})
    assert sorted(size for kind, size in found if kind == "all-gather") == [64 * 2 * 2 * 4, 64 * 24 * 4]
    assert [size for kind, size in found if kind == "reduce-scatter"] == [16 * 24 * 4]


def test_collectives_of_gradients_of_spread_tokens():
    """The same again the other way round, and the sum of the router's gradient."""
    gradient = lambda f: jax.grad(lambda x, w: (f(x, w) ** 2).sum(), argnums=(0, 1))  # noqa: E731
    found = moved(gradient, make_mesh(expert=4), "expert")
    assert kinds(found) == Counter({"all-gather": 3, "reduce-scatter": 3, "all-reduce": 1})
    assert [size for kind, size in found if kind == "all-reduce"] == [24 * 8 * 4]


@pytest.mark.parametrize("axes, tensor", [({"expert": 4}, None), ({"expert": 2, "tensor": 2}, "tensor")])
def test_one_collective_where_tokens_are_everywhere(axes, tensor):
    found = moved(lambda f: f, make_mesh(**axes), None, tensor=tensor)
    assert found == [("all-reduce", 64 * 24 * 4)]


def test_experts_that_do_not_fit_the_ranks():
    x, weights, _ = operands(16, 8)
    mapped = jax.shard_map(
        lambda x, w: moe(x, w, top_k=2, expert_axis="expert")[0],
        mesh=make_mesh(expert=4),
        in_specs=(P("expert"), P()),
        out_specs=P("expert"),
    )
    with pytest.raises(ValueError, match="the router knows 8 experts, but 4 ranks with 8 each hold 32"):
        jax.eval_shape(mapped, x, weights)
