"""What each way moves, read off the compiled program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.context import ContextParallel
from ring_jax.gdn import run
from ring_jax.gdn.cost import GDNShape, costs
from ring_jax.gdn.heads import Heads
from ring_jax.gdn.mixer import GDNCache, MixerWeights, mix
from tests.gdn.helpers import collectives, jit, kinds

HEADS, WIDTH, CONV, RANKS = Heads(8, 16, 16, 8), 128, 4, 4
LAYERS = 2


@functools.cache
def moved(way, *, time=512, batch=4, layout="zigzag", data_axis=False, gradient=False, width=WIDTH, ranks=RANKS):
    """The collectives of a run of two mixers with a residual and an MLP each; `batch` rows on each context group."""
    names, sizes = (("data", "context"), (2, ranks)) if data_axis else (("context",), (ranks,))
    types = (jax.sharding.AxisType.Auto,) * len(names)
    mesh = jax.make_mesh(sizes, names, axis_types=types, devices=jax.devices("cpu")[: int(np.prod(sizes))])
    context = ContextParallel("context", layout=layout, mesh=mesh, batch_axis="data" if data_axis else None)
    rows = batch * (2 if data_axis else 1)
    place = lambda spec: jax.sharding.NamedSharding(mesh, spec)  # noqa: E731
    tokens, row = place(jax.P(context.batch_axis, "context")), place(jax.P(context.batch_axis))
    n, values = HEADS.value_heads, HEADS.parts[2]

    def array(sharding, *shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    weight = functools.partial(array, place(jax.P()))
    mixers = MixerWeights(
        (weight(width, HEADS.features),),
        (weight(width, 2 * n),),
        weight(CONV, HEADS.features),
        weight(n),
        weight(n),
        HEADS,
    )
    params = [(mixers, weight(values, width), weight(width, width))] * LAYERS
    cache = GDNCache(
        array(row, rows, n, HEADS.key_size, HEADS.value_size),
        array(row, rows, CONV - 1, HEADS.features),
        array(row, rows, dtype=jnp.int32),
    )

    def layers(params, x, caches, partition):
        leaving = []
        for (mixer, out, mlp), cache in zip(params, caches, strict=True):
            y, cache = mix(mixer, x, cache, partition)
            x = x + y.reshape(*y.shape[:2], -1) @ out
            x = x + jax.nn.silu(x) @ mlp
            leaving.append(cache)
        return x, leaving

    def forward(params, x, caches):
        return run(layers, params, x, caches=caches, context=context, strategy=way)

    def loss(params, x, caches):
        return (forward(params, x, caches)[0] ** 2).sum()

    program = jax.grad(loss, argnums=(0, 1)) if gradient else forward
    return collectives(jit(program).lower(params, array(tokens, rows, time, width), [cache] * LAYERS).compile())


def test_training_drops_the_caches():
    """Without caches in the result, their collectives are gone: what is left sums gradients of parameters."""
    found = moved("batch", gradient=True)
    assert set(kinds(found)) == {"all-to-all", "all-reduce"}
    n, values = HEADS.value_heads, HEADS.parts[2]
    parameters = WIDTH * (HEADS.features + 2 * n + values + WIDTH) + CONV * HEADS.features + 2 * n
    assert sum(size for kind, size in found if kind == "all-reduce") == LAYERS * parameters * 4


def of_sequence_length(found, time, width=WIDTH):
    """Collectives with at least as many bytes as one row of the layer input on one rank."""
    return [c for c in found if c[1] >= time // RANKS * width * 4]


@pytest.mark.parametrize("data_axis, gradient", [(False, False), (False, True), (True, True)])
def test_batch_moves_activations_twice_per_run(data_axis, gradient):
    found = moved("batch", data_axis=data_axis, gradient=gradient)
    assert kinds(found)["all-to-all"] == (4 if gradient else 2)
    others = [c for c in found if c[0] not in ("all-to-all", "all-reduce")]
    assert gradient or kinds(found)["all-reduce"] == 0  # with gradients: those of parameters, see below
    assert of_sequence_length(others, 512) == []
    for kind, size in found:
        if kind == "all-to-all":
            assert size == 512 * WIDTH * 4, "one row of four, whole"


@pytest.mark.parametrize("data_axis, layout", [(False, "zigzag"), (True, "contiguous")])
def test_state_moves_nothing_of_sequence_length(data_axis, layout):
    short, long = (moved("state", time=time, layout=layout, data_axis=data_axis) for time in (512, 1024))
    assert sorted(short) == sorted(long)
    folds, batch = (1 if layout == "contiguous" else 2), 4
    pair = batch * HEADS.value_heads * HEADS.key_size * (HEADS.key_size + HEADS.value_size) * 4
    # One gather of all ranks' pairs for each layer; else halos, and the final state and tail to all ranks.
    gathers = [size for kind, size in short if kind == "all-gather"]
    assert gathers == [RANKS * folds * pair] * LAYERS
    assert kinds(short)["all-to-all"] == 0
    state, halo = (
        batch * n * 4 for n in (HEADS.value_heads * HEADS.key_size * HEADS.value_size, (CONV - 1) * HEADS.features)
    )
    assert sum(size for kind, size in short if kind == "all-reduce") == LAYERS * (state + halo)
    assert [size for kind, size in short if kind == "collective-permute"] == [halo] * folds * LAYERS


@pytest.mark.parametrize("gradient", [False, True])
def test_state_by_scan_moves_one_pair_per_step(gradient):
    """Eight ranks: log2(8) steps and a hand-over, each at most one pair, and no gather at all."""
    found = moved("state", time=512, ranks=8, batch=1, gradient=gradient)
    pair = HEADS.value_heads * HEADS.key_size * (HEADS.key_size + HEADS.value_size) * 4
    assert kinds(found)["all-gather"] == kinds(found)["all-to-all"] == 0
    permutes = [size for kind, size in found if kind == "collective-permute"]
    assert max(permutes) == pair
    if not gradient:
        assert len(permutes) == LAYERS * 2 * (4 + 1)  # two walks of 3 + 1, and a halo each way


@pytest.mark.parametrize("width, kind", [(64, "all-gather"), (1024, "all-to-all")])
def test_head_moves_what_is_smaller(width, kind):
    """The layer input is gathered where it is narrow, projections are split where it is wide."""
    found = of_sequence_length(moved("head", width=width, batch=1), 512, 64)
    split = (HEADS.features + 2 * HEADS.value_heads) // RANKS * 512 * 4
    outputs = HEADS.parts[2] // RANKS * 512 * 4
    inputs = ("all-gather", width * 512 * 4) if kind == "all-gather" else ("all-to-all", split)
    assert sorted(found) == sorted([inputs, ("all-to-all", outputs)] * LAYERS)


@pytest.mark.parametrize("way", ["batch", "head", "state"])
def test_cost_function_counts_the_bytes_of_the_program(way):
    """`costs` counts what a rank receives of what the program's collectives deliver (its own part stays)."""
    found = moved(way, batch=4)
    shape = GDNShape(4, 512, HEADS, WIDTH, CONV, LAYERS, itemsize=4)
    activations = sum(size for kind, size in found if kind == "all-to-all" or size >= 512 * WIDTH * 4 or way == "state")
    remote = (RANKS - 1) / RANKS
    if way == "state":
        gathered = sum(size for kind, size in found if kind == "all-gather")
        activations = activations - gathered + gathered * remote
        tails = LAYERS * 4 * (CONV - 1) * HEADS.features * 4  # `costs` leaves the final tails out
        expected = costs(shape, RANKS, "zigzag")[way].bytes + tails
    else:
        activations, expected = activations * remote, costs(shape, RANKS, "zigzag")[way].bytes
    assert activations == pytest.approx(expected, rel=0.02)
