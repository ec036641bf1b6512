"""The engine's programs over meshes, with their Hopper kernels, lower for CUDA on a machine without a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import ring_jax
from ring_jax.gdn import Heads
from ring_jax.inference import programs
from ring_jax.inference.pool import Geometry
from ring_jax.models.qwen3_5 import Config, Experts, Qwen3_5, Sharding
from tests.support.hopper import on_hoppers

SIZES = {
    "hidden_size": 512,
    "num_layers": 4,
    "layer_types": (),
    "num_heads": 8,
    "num_kv_heads": 2,
    "linear": Heads(8, 16, 128, 128),
    "vocab_size": 512,
}
EXPERTS = Experts(count=8, per_token=2, size=256, shared_size=256)
PASS = {"gated_delta_forward", "flash_attention_forward", "attention_heads"}
PROGRAMS = {  # as `Programs.rehearse` takes them, and kernels of each
    "decode": (("decode", 8, True), {"gdn_decode", "paged_attention", "few_rows_product", "attention_heads"}),
    "prefill": (("prefill", 1, 1024, 0, True), PASS),
    "later chunk": (("prefill", 1, 1024, 16, True), PASS),
}
run = programs._run


def lowered(what, axes, experts):
    """The text of a program of one row."""
    config = dataclasses.replace(
        Config.preset("qwen3.5-9b"), **SIZES, mlp_size=None if experts else 1024, experts=experts
    )
    calls = []
    with on_hoppers(**axes), pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "_run", lambda *arguments: calls.append(arguments) or (None, None))
        context = ring_jax.ContextParallel("context", layout="zigzag", head_axis="tensor" if "tensor" in axes else None)
        sharding = Sharding(context, expert="context" if experts else None)
        structure, params = Qwen3_5(config, rngs=None, sharding=sharding).split()
        geometry = Geometry(pages=64, page=64, rows=1, slots=2)
        programs.Programs(structure, params, geometry, 8).rehearse(geometry.shapes(structure), *what)
        (arguments,) = calls
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments[5:])
        return run.trace(*arguments[:5], *shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="kernels of the gated delta rule need jax 0.11.2 or later"
)
@pytest.mark.parametrize("experts", [None, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("decode", {"context": 2}),
        ("decode", {"context": 2, "tensor": 2}),
        pytest.param("decode", {"context": 1, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param("prefill", {"context": 2}, marks=pytest.mark.slow),
        pytest.param("prefill", {"context": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param("later chunk", {"context": 2}, marks=pytest.mark.slow),
        ("later chunk", {"context": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_over_a_mesh(name, axes, experts):
    what, kernels = PROGRAMS[name]
    text = lowered(what, axes, experts)
    assert not {kernel for kernel in kernels if kernel not in text}


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="kernels of the gated delta rule need jax 0.11.2 or later"
)
def test_prefill_with_chunks_of_projections_by_key_heads():
    """Over context ranks that pass states, the convolution reads a layer's one product, a row for each chunk."""
    config = dataclasses.replace(Config.preset("qwen3.5-9b"), **SIZES, mlp_size=1024)
    with on_hoppers(context=2):
        context = ring_jax.ContextParallel("context", layout="zigzag")
        structure, params = Qwen3_5(config, rngs=None, sharding=Sharding(context, gdn_strategy="state")).split()
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        tokens = jax.ShapeDtypeStruct((2, 2048), jnp.int32)
        traced = jax.jit(lambda params, tokens: structure(params, tokens, logits="last").logits).trace(params, tokens)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    heads = config.linear
    product = f"tensor<4x512x{heads.key_heads}x{heads.stride}xbf16>"
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line and line.count(product) == 3]
    assert len(calls) == 3
