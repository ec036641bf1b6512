"""Sharding: which axis a dimension lies over, and what it refuses."""

import jax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ring_jax
from ring_jax.models.qwen3_5 import Config, Qwen3_5, Sharding
from tests.models.qwen3_5 import tiny


def over(*sizes, **options):
    names = ("data", "context", "tensor")
    mesh = jax.make_mesh(
        sizes, names, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[: sizes[0] * sizes[1] * sizes[2]]
    )
    context = ring_jax.ContextParallel("context", batch_axis="data", head_axis="tensor", mesh=mesh)
    return Sharding(context, **options), mesh


@pytest.mark.parametrize(
    ("shape", "axes", "options", "expected"),
    [
        ((64, 32), ("reduced", "heads"), {}, P(None, "tensor")),
        ((64, 32), ("reduced", "heads"), {"weights": "context"}, P("context", "tensor")),
        ((64, 32), ("reduced", "heads"), {"weights": ("data", "context")}, P(("data", "context"), "tensor")),
        ((32, 64), ("reduced_heads", None), {"weights": "context"}, P(("tensor", "context"), None)),
        ((63, 32), ("reduced", "heads"), {"weights": "context"}, P(None, "tensor")),  # stays whole along it
        ((8, 64, 2, 6), ("experts", "reduced", None, "features"), {"expert": "context", "weights": "context"},
         P("context", None, None, "tensor")),
        ((257, 64), ("vocab", "reduced"), {"weights": "context"}, P(None, "context")),  # an odd vocabulary stays whole
    ],
)  # fmt: skip
def test_spec(shape, axes, options, expected):
    sharding, mesh = over(2, 2, 2, **options)
    assert sharding.spec(shape, axes, mesh) == expected


@pytest.mark.parametrize(
    ("name", "match"), [("head256", "1 key-value heads over 'tensor' of size 2"), ("moe", "8 experts over")]
)
def test_heads_and_experts_that_do_not_divide(name, match):
    sharding, _ = over(1, 3, 2, expert="context") if name == "moe" else over(1, 2, 2)
    with pytest.raises(ValueError, match=match):
        Qwen3_5(Config.from_hf(tiny.config(name)), rngs=nnx.Rngs(0), sharding=sharding)


def test_axes_that_are_not_there_or_taken():
    sharding, _ = over(1, 2, 1)
    with pytest.raises(ValueError, match="no 'experts'"):
        Sharding(sharding.context, expert="experts").resolve_mesh()
    with pytest.raises(ValueError, match="is the tensor axis too"):
        Sharding(sharding.context, weights="tensor")
    with pytest.raises(ValueError, match="unknown gdn_strategy"):
        Sharding(sharding.context, gdn_strategy="rows")
