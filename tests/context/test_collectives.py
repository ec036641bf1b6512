"""Collectives are part of the contract: kinds, numbers and sizes, read from compiled HLO (or the jaxpr)."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ring_jax
from ring_jax import ContextParallel
from ring_jax.context.shard import Shard, axis_to_seq, seq_to_axis
from ring_jax.flash import backends
from ring_jax.flash.block import LSE_NAME, OUT_NAME
from tests.context.harness import in_shares
from tests.support.hlo import kinds, results
from tests.support.mesh import make_mesh
from tests.support.strategies import SINGLE_AXIS

B, S, N, K, H, C = 2, 64, 8, 4, 16, 4


def count(compiled) -> dict[str, int]:
    return dict(kinds(results(compiled)))


@pytest.fixture
def unrolled(monkeypatch):
    """Rings of C ranks as one hop after the other, so that every permute is an instruction of its own."""
    monkeypatch.setitem(backends.BACKENDS, "xla", dataclasses.replace(backends.BACKENDS["xla"], unroll=8))


@pytest.fixture
def in_halves(monkeypatch):
    """A backend in the place of "mosaic" that takes halves of the heads; its calls, in order."""
    jax.clear_caches()  # traces of an equal call would not call it
    asked: list[str] = []
    backend = dataclasses.replace(in_shares(backends.BACKENDS["reference"], asked), unroll=8)
    monkeypatch.setitem(backends.BACKENDS, "mosaic", backend)
    return asked


def programs(context, mesh, heads=K, implementation=None):
    """Forward and VJP, compiled apart."""
    sharding = NamedSharding(mesh, P(context.batch_axis, "context"))
    q, kv = (jax.ShapeDtypeStruct((B, S, n, H), jnp.float32, sharding=sharding) for n in (N, heads))

    def attend(q, k, v):
        return ring_jax.ring_attention(q, k, v, is_causal=True, context=context, implementation=implementation)

    forward = jax.jit(attend).lower(q, kv, kv).compile()
    # The pullback is a pytree of residuals: compile with the shardings that the forward leaves them in.
    residuals = lambda *args: jax.vjp(attend, *args)[1]  # noqa: E731
    shapes, tree = jax.tree.flatten(jax.eval_shape(residuals, q, kv, kv))
    shardings = jax.tree.leaves(jax.jit(residuals).lower(q, kv, kv).compile().output_shardings)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(shapes, shardings, strict=True)]
    pull = jax.tree.unflatten(tree, shapes)
    backward = jax.jit(lambda pull, d: pull(d)).lower(pull, q).compile()
    return forward, backward


COUNTS = {  # forward, backward
    "ring": ({"collective-permute": C - 1}, {"collective-permute": 2 * C - 2}),
    # queries, bounds and partials C - 1 each; backward (q, dO), (lse, delta), bounds and dQ C - 1 each
    "pass_q": ({"collective-permute": 3 * C - 3}, {"collective-permute": 4 * C - 4}),
    "all_gather": ({"all-gather": 1}, {"all-gather": 1, "reduce-scatter": 1}),
    # query, KV, out; the all-gather is of the int32 bounds
    "ulysses": ({"all-to-all": 3, "all-gather": 1}, {"all-to-all": 3}),
}


@pytest.mark.parametrize("data", [1, 2])
@pytest.mark.parametrize("strategy", SINGLE_AXIS)
def test_kinds_and_numbers(strategy, data, unrolled):
    mesh = make_mesh(data=data, context=C)
    context = ContextParallel("context", layout="zigzag", batch_axis="data", mesh=mesh, strategy=strategy)
    compiled = programs(context, mesh)
    assert (count(compiled[0]), count(compiled[1])) == COUNTS[strategy]
    for program in compiled:
        for kind, result in results(program):
            if kind == "all-gather" and strategy == "ulysses":
                assert result.startswith("s32[2,"), f"only bounds may be gathered, not {result}"


@pytest.mark.parametrize(
    "strategy, forward, backward",
    [
        ("ring", {"collective-permute": C - 1}, {"collective-permute": 2 * C - 2}),
        ("all_gather", {"all-gather": 2}, {"all-gather": 2, "reduce-scatter": 2}),
    ],
)
def test_halves_of_the_heads_travel_one_after_the_other(strategy, forward, backward, in_halves):
    mesh = make_mesh(context=C)
    context = ContextParallel("context", layout="zigzag", mesh=mesh, strategy=strategy)
    compiled = programs(context, mesh, implementation="mosaic")
    assert (count(compiled[0]), count(compiled[1])) == (forward, backward)


@pytest.mark.parametrize(
    "strategy, order",
    [
        # The rank's own keys at both ends.
        ("ring", ["f"] * C + ["b0"] + ["b"] * (C - 1) + ["b2"]),
        # Forward own, then the others' halves.
        ("all_gather", ["f", "f0", "f2", "b0", "b0", "b2", "b2"]),
    ],
)
def test_order_of_the_halves(strategy, order, in_halves):
    context = ContextParallel("context", layout="zigzag", mesh=make_mesh(context=C), strategy=strategy)
    q, kv = (jax.ShapeDtypeStruct((B, S, n, H), jnp.float32) for n in (N, K))

    def gradients(q, k, v, d):
        attend = functools.partial(ring_jax.ring_attention, is_causal=True, context=context, implementation="mosaic")
        return jax.vjp(attend, q, k, v)[1](d)

    in_halves.clear()
    jax.eval_shape(gradients, q, kv, kv, q)
    # custom_vjp traces its primal function for the shapes, too.
    assert in_halves[-len(order) :] == order


def test_the_ring_rotates_one_packed_array(unrolled):
    mesh = make_mesh(data=2, context=C)
    forward, backward = programs(
        ContextParallel("context", layout="zigzag", batch_axis="data", mesh=mesh, strategy="ring"), mesh
    )
    packed = f"f32[2,{B // 2},{S // C},{K},{H}]"
    assert set(results(forward)) == set(results(backward)) == {("collective-permute", packed)}


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="XLA's CPU compiler of jax 0.10 drops barriers before it merges"
)
def test_backward_rotates_again_instead_of_keeping_every_hop(unrolled):
    """In one program with the forward, barriers keep XLA from merging the two rotations of KV (and all KV alive)."""
    mesh = make_mesh(context=C)
    context = ContextParallel("context", layout="zigzag", mesh=mesh, strategy="ring")
    x = jax.ShapeDtypeStruct((B, S, K, H), jnp.float32, sharding=NamedSharding(mesh, P(None, "context")))
    loss = lambda q, k, v: jnp.sum(ring_jax.ring_attention(q, k, v, is_causal=True, context=context) ** 2)  # noqa: E731
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    assert count(compiled) == {"collective-permute": (C - 1) + (2 * C - 2)}


def test_head_axis_needs_no_further_collective():
    mesh = make_mesh(tensor=2, context=2)
    context = ContextParallel("context", layout="zigzag", head_axis="tensor", mesh=mesh, strategy="ring")
    x = jax.ShapeDtypeStruct((B, S, K, H), jnp.float32, sharding=NamedSharding(mesh, P(None, "context", "tensor")))
    attend = lambda q, k, v: ring_jax.ring_attention(q, k, v, is_causal=True, context=context)  # noqa: E731
    assert results(jax.jit(attend).lower(x, x, x).compile()) == [
        ("collective-permute", f"f32[2,{B},{S // 2},{K // 2},{H}]")
    ]


def test_long_rings_are_scanned():
    """The scan form has a few hops outside of the loop, whatever C is."""
    mesh = make_mesh(context=8)
    forward, backward = programs(ContextParallel("context", layout="zigzag", mesh=mesh, strategy="ring"), mesh)
    # Forward: own keys, body. Backward: KV in the beginning, at the first hop (no gradients arrive yet) and in the body;
    # gradients in the body, at the last hop and on the way home.
    assert count(forward) == {"collective-permute": 2} and count(backward) == {"collective-permute": 6}


def compile_seconds(ranks):
    mesh = make_mesh(context=ranks)
    context = ContextParallel("context", layout="zigzag", mesh=mesh, strategy="ring")
    x = jax.ShapeDtypeStruct((1, 1040, 2, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, "context")))
    loss = lambda q, k, v: ring_jax.ring_attention(q, k, v, is_causal=True, context=context).sum()  # noqa: E731
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x)
    begin = time.process_time()
    compiled = lowered.compile()
    return time.process_time() - begin, compiled.as_text().count("\n")


def test_compile_time_does_not_grow_with_ranks():
    compile_seconds(2)  # the first compilation also starts LLVM
    (two, _), (five, size_five), (eight, size_eight) = (compile_seconds(ranks) for ranks in (2, 5, 8))
    assert eight < 3 * two, f"{eight:.2f} s of CPU at C = 8, {two:.2f} s at C = 2"
    # The same program but for how the layout's divisions by C simplify.
    assert abs(size_eight - size_five) < 0.05 * size_five, f"{size_eight} instructions at C = 8, {size_five} at C = 5"


# -- remat ---------------------------------------------------------------------------------------------------------------


def permutes_in(jaxpr, times=1) -> int:
    """Executed ppermutes of a jaxpr; scan bodies count as often as they run."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "ppermute":
            total += times * len(eqn.invars)
        inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for param in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            if hasattr(param, "jaxpr"):
                param = param.jaxpr
            if hasattr(param, "eqns"):
                total += permutes_in(param, inner)
    return total


@pytest.mark.parametrize("layers", [1, 3])
def test_remat_with_saved_names_does_not_rerun_the_ring(layers):
    mesh = make_mesh(context=8)
    context = ContextParallel("context", layout="zigzag", mesh=mesh, strategy="ring")

    def rotations(policy):
        def layer(h, _):
            return h + ring_jax.ring_attention(jnp.sin(h), h, h, is_causal=True, context=context), None

        def loss(h):
            return jax.lax.scan(jax.checkpoint(layer, policy=policy), h, None, length=layers)[0].sum()

        jaxpr = jax.make_jaxpr(jax.grad(loss))(jnp.ones((1, 64, 2, 8))).jaxpr
        return permutes_in(jaxpr)

    saved = rotations(jax.checkpoint_policies.save_only_these_names(OUT_NAME, LSE_NAME))
    nothing = rotations(jax.checkpoint_policies.nothing_saveable)
    assert saved == layers * (7 + 14), "forward C - 1, backward 2C - 2, and no more"
    assert nothing == saved + layers * 7, "the control: without the names the forward rotation runs again"


# -- layouts as resharding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [1, 2])
@pytest.mark.parametrize("direction", ["to_layout", "from_layout"])
def test_contiguous_to_zigzag_is_two_half_shard_permutes(direction, data):
    mesh = make_mesh(data=data, context=C)
    context = ContextParallel("context", layout="zigzag", batch_axis="data", mesh=mesh)
    x = jax.ShapeDtypeStruct((B, S, 24), jnp.float32, sharding=NamedSharding(mesh, P("data", "context")))
    compiled = jax.jit(getattr(context, direction)).lower(x).compile()
    half = f"f32[{B // data},{S // C // 2},24]"
    assert results(compiled) == [("collective-permute", half)] * 2


def test_contiguous_to_fine_zigzag_is_one_all_to_all():
    mesh = make_mesh(data=2, context=C)
    context = ContextParallel("context", layout=ring_jax.Zigzag(2), batch_axis="data", mesh=mesh)
    x = jax.ShapeDtypeStruct((B, S, 24), jnp.float32, sharding=NamedSharding(mesh, P("data", "context")))
    for method in (context.to_layout, context.from_layout):
        assert count(jax.jit(method).lower(x).compile()) == {"all-to-all": 1}


@pytest.mark.parametrize("layout", [ring_jax.Contiguous(), ring_jax.Zigzag(), ring_jax.Striped()])
@pytest.mark.parametrize("split_axis", [0, 2], ids=["batch", "heads"])
def test_sequence_to_batch_and_heads_are_single_all_to_alls(split_axis, layout):
    mesh = make_mesh(data=2, context=C)
    shard = Shard("context", C, layout, S)
    x = np.random.default_rng(0).normal(size=(2 * C, S, C, 3)).astype(np.float32)
    spec = P("data", "context")
    out_spec = P(("data", "context")) if split_axis == 0 else P("data", None, "context")

    def mapped(f, in_specs, out_specs):
        local = functools.partial(f, shard=shard, split_axis=split_axis)
        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs))

    there, back = mapped(seq_to_axis, spec, out_spec), mapped(axis_to_seq, out_spec, spec)
    context = ContextParallel("context", layout=layout, batch_axis="data", mesh=mesh)
    laid = context.to_layout(x)
    moved = there(laid)
    np.testing.assert_array_equal(moved, x)  # whole sequences, natural order
    np.testing.assert_array_equal(back(moved), laid)
    for f, sharding, value in ((there, spec, laid), (back, out_spec, moved)):
        argument = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, sharding))
        assert count(f.lower(argument).compile()) == {"all-to-all": 1}
