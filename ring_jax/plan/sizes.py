"""What a model's parameters are and weigh on one rank, read from the model itself and its shardings."""

import dataclasses
import functools

from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import ring_jax.context
from ring_jax._mesh import axis_names
from ring_jax.models.qwen3_5 import Config, Qwen3_5, Sharding
from ring_jax.plan.machine import AXES, Machine


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters on one rank: counts of what products there read.

    Fields:
        layers: of each layer of a group, as products see it (gathered along the weights axis): dense ones. routed: of experts.
        head: of the output product, all of the vocabulary here.
        held: of everything that the rank holds.
        layer_held: of each layer of a group, that it holds.
        spread: whether the weights axis spreads anything.
    """

    layers: tuple[float, ...]
    routed: tuple[float, ...]
    head: float
    held: float
    layer_held: tuple[float, ...]


@functools.lru_cache(maxsize=32)
def weights_of(config: Config, machine: Machine, expert: str | None, weights: tuple[str, ...]) -> Weights:
    """Of a model over a mesh.

    Raises:
        ValueError: heads or experts do not divide over their axes.
    """
    sizes = dict(zip(AXES, machine.sizes, strict=True))
    mesh = AbstractMesh(machine.sizes, AXES, (AxisType.Auto,) * len(AXES))
    context = ring_jax.context.ContextParallel(
        "context",
        layout="zigzag",
        batch_axis="data",
        head_axis="tensor",
        mesh=mesh,  # type: ignore[arg-type]
    )
    sharding = Sharding(context, expert=expert, weights=weights or None)
    sharding.check(config, mesh)
    found = nnx.to_flat_state(nnx.state(Qwen3_5(config, rngs=None), nnx.Param))
    dense, routed, held = ([0.0] * config.period for _ in range(3))
    total = head = 0.0
    for path, x in found:
        value = x.get_value()
        spec = sharding.spec(value.shape, x.get_metadata()["axes"], mesh)
        here = value.size / _ranks(spec, sizes)
        total += here
        is_routed = config.experts is not None and path[-2:] in (("mlp", "gate_up"), ("mlp", "down"))
        read = value.size / _ranks(spec, sizes, without=set(weights) - ({expert} if is_routed else set()))
        if path[0] != "groups":
            output = path[0] == "lm_head" or (path[0] == "embed" and config.tie_embeddings)
            head = read if output else head
            continue
        layer = int(str(path[2]))
        held[layer] += here / config.groups
        (routed if is_routed else dense)[layer] += read / config.groups
    return Weights(tuple(dense), tuple(routed), head, total, tuple(held))


def _ranks(spec: P, sizes: dict[str, int], without: set[str] = frozenset()) -> int:  # type: ignore[assignment]
    ranks = 1
    for entry in spec:
        for name in axis_names(entry):
            ranks *= 1 if name in without else sizes[name]
    return ranks
