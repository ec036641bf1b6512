"""What a notebook shows: short reprs without values, layouts and masks drawn as text."""

import dataclasses
import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ring_jax.nn
from ring_jax import Contiguous, Striped, Zigzag, causal, documents, lengths, prefix, window
from ring_jax.gdn import Heads
from ring_jax.models.qwen3_5 import Config, Qwen3_5, Sharding
from ring_jax.models.qwen3_5.forward import Output
from ring_jax.moe import RouterStats

TINY = Config(
    "qwen3_5", 64, 16, 8, 2, 1, 16, Heads(2, 2, 8, 8), mlp_size=16, max_positions=256, eos_token_ids=(3, 4, 5, 6, 7)
)


@pytest.fixture(scope="module")
def cp(cpu_devices):
    mesh = jax.sharding.Mesh(np.asarray(cpu_devices[:2]), ("context",))
    return ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh)


def test_values_with_arrays(cp):
    shapes = jax.eval_shape(
        lambda tokens: Qwen3_5(TINY, rngs=nnx.Rngs(0))(tokens, logits="last", cache_room=4),
        jax.ShapeDtypeStruct((1, 64), jnp.int32),
    )
    out = jax.tree.map(lambda x: jnp.full(x.shape, 7, x.dtype), shapes)
    found = repr(out)
    assert found.startswith("Output(logits=float32[1,64], cache=Cache(prompt_kv=bfloat16[4,1,64,1,16], new_kv=")
    assert "gdn=GDNCache(state=float32[2,3,1,2,8,8], " in found and len(found) < 300
    assert repr(shapes) == found  # shapes instead of arrays, as eval_shape gives them
    assert repr(jax.jit(lambda x: jnp.full((), len(repr(Output(x)))))(jnp.ones((2, 3)))) == repr(
        jnp.full((), len("Output(logits=float32[2,3])"))
    )
    stats = RouterStats(jnp.ones(4), jnp.ones(4), jnp.ones(()))
    assert repr(stats) == "RouterStats(counts=float32[4], probs=float32[4], tokens=float32[])"
    resolved = "ResolvedMask(start=int32[1,16], end=int32[1,16], layout=Zigzag(block=None), q_len=16, kv_len=16)"
    assert repr(cp.resolve(causal(), 16)) == resolved


def test_settings(cp):
    context = "ContextParallel(axis='context', layout=Zigzag(block=None), mesh=Mesh(context=2))"
    assert repr(cp) == context
    explicit = jax.make_mesh(
        (2,), ("context",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2]
    )
    assert "mesh=Mesh(context=2 Explicit)" in repr(dataclasses.replace(cp, mesh=explicit))
    assert repr(Sharding(cp, weights="context")) == f"Sharding(context={context}, weights='context')"
    config = repr(TINY)
    assert config.startswith("Config(family='qwen3_5', vocab_size=64, ") and "norm_epsilon" not in config
    assert "'full_attention', ... 8 in all)" in config and "eos_token_ids=(3, 4, 5, 6, ... 5 in all)" in config


def test_modules(cp):
    context = repr(cp)
    layer = ring_jax.nn.Attention(64, 8, num_kv_heads=2, context=cp, rngs=nnx.Rngs(0))
    expected = f"Attention(num_heads=8, num_kv_heads=2, head_dim=8, context={context}, 10,240 parameters)"
    assert repr(layer) == expected
    layer = ring_jax.nn.GatedDeltaNet(64, 2, 4, 16, 16, rngs=nnx.Rngs(0))
    heads = "Heads(key_heads=2, value_heads=4, key_size=16, value_size=16)"
    assert repr(layer) == f"GatedDeltaNet(features=64, heads={heads}, 17,432 parameters)"
    model = repr(Qwen3_5(TINY, rngs=None, sharding=Sharding(cp)))
    assert model.startswith("Qwen3_5(family='qwen3_5', layers=8, dtype='bfloat16', sharding=Sharding(context=")
    assert model.endswith(" parameters)") and len(model) < 250


@pytest.mark.parametrize(
    ("mask", "shown"),
    [
        (ring_jax.Mask(), "Mask()"),
        (causal() & window(3, 0), "causal() & window(left=3, right=0)"),
        (window(None, 2), "window(right=2)"),
        (prefix(5), "prefix(n=5)"),
        (causal() & documents(segment_ids=np.zeros((2, 300), int)), "causal() & documents(segment_ids=int32[2,300])"),
        (
            documents(cu_seqlens=jnp.array([0, 3, 8])) & lengths(kv=5),
            "documents(cu_seqlens=int32[1,3]) & lengths(kv=5)",
        ),
    ],
)
def test_masks(mask, shown):
    assert repr(mask) == shown


def cells(visible, rows, columns):
    """The drawing of a matrix of booleans, cut into rows x columns cells."""
    lines = []
    for block in np.array_split(visible, rows, axis=0):
        parts = np.array_split(block, columns, axis=1)
        lines.append("".join("#" if p.all() else "+" if p.any() else "." for p in parts))
    return "\n".join(lines)


def test_a_mask_drawn():
    index = np.arange(12)
    ids = np.repeat([4, 1, 2], [3, 5, 4])
    visible = (index[:, None] >= index) & (ids[:, None] == ids)
    assert (causal() & documents(segment_ids=ids)).describe(12) == cells(visible, 12, 12)
    index = np.arange(640)
    visible = (index[:, None] >= index) & (index[:, None] - index <= 100)
    assert (causal() & window(100, 0)).describe(640) == cells(visible, 32, 64)
    by_row = lengths(kv=jnp.array([1, 2]))
    assert (by_row.describe(2, 3), by_row.describe(2, 3, row=1)) == ("#..\n#..", "##.\n##.")
    with pytest.raises(ValueError, match="row"):
        causal().describe(4, row=1)


@pytest.mark.parametrize("layout", [Contiguous(), Striped(2), Zigzag(), Zigzag(block=2)], ids=repr)
def test_a_layout_drawn(layout):
    head, *lines = layout.describe(22, 3).split("\n")
    length = layout.padded_length(22, 3)
    assert head == f"{layout} over 3 ranks, 22 positions, padded to {length}"
    for rank, line in enumerate(lines):
        name, _, runs = line.partition(": ")
        bounds = [[int(n) for n in run.split("-")] for run in runs.split()]
        held = [n for run in bounds for n in range(run[0], run[-1] + 1)]
        assert name == f"rank {rank}" and held == layout.positions(rank, length, 3).tolist()
    assert len(lines) == 3


def test_a_context_drawn(cp):
    assert cp.describe(8) == "Zigzag(block=None) over 2 ranks, 8 positions\nrank 0: 0-1 6-7\nrank 1: 2-5"
    assert "... 8 runs" in dataclasses.replace(cp, layout=Striped()).describe(16)


@pytest.mark.parametrize(
    "module", [ring_jax.mask, ring_jax.layout, ring_jax.context.parallel], ids=lambda m: m.__name__
)
def test_examples(module):
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted and not result.failed
