"""GDN states that a kernel updates where they lie, while a decode step walks over the layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from ring_jax import gdn
from ring_jax.gdn.hopper import decode
from ring_jax.models.qwen3_5.config import LINEAR, Config
from ring_jax.models.qwen3_5.pass_ import Pass
from ring_jax.mosaic.device import hopper_reason


@dataclasses.dataclass(frozen=True)
class InPlace:
    """What a GDN layer is handed in the place of its own cache.

    Fields:
        states, tails: of all GDN layers, along the first axis.
        mixer: one with the parameters of all groups: the kernel reads the layer's own where they lie.
        at: (layer, group) of the one that is called.
    """

    states: Array
    tails: Array
    mixer: Any
    at: tuple[int, int]


class StatesInPlace:
    """The states of all layers from one layer to the next; `layers` are those of a group with the parameters of all."""

    def __init__(self, layers: Sequence[Any], cache: gdn.GDNCache):
        self.mixers = [layer.mixer for layer in layers if layer.kind == LINEAR]
        self.cache, self.left = cache, []  # type: ignore[var-annotated]
        self.states, self.tails = (x.reshape(-1, *x.shape[2:]) for x in (cache.state, cache.tail))

    @staticmethod
    def runs(config: Config, here: Pass, cache: gdn.GDNCache) -> bool:
        """Whether the kernel takes a token of each row here, or of some."""
        heads = config.linear.share(here.tensor_ranks)
        sizes = 1, heads.key_size, heads.value_size
        return (hopper_reason() or decode.unsupported_reason(*sizes, cache.tail)) is None

    def read(self, group: int, n: int) -> InPlace:
        """For the GDN layer n of a group."""
        return InPlace(self.states, self.tails, self.mixers[n], (group * len(self.mixers) + n, group))

    def write(self, group: int, n: int, left: tuple[Array, Array]) -> None:
        """Takes what that layer gave: the states of all, and its tail. Layers come in order."""
        self.states, tail = left
        self.left.append(tail)

    def result(self) -> gdn.GDNCache:
        """All states and tails after the last layer."""
        state, tail = self.states.reshape(self.cache.state.shape), jnp.stack(self.left).reshape(self.cache.tail.shape)
        return dataclasses.replace(self.cache, state=state, tail=tail)
