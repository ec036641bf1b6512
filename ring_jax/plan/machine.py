"""The GPUs of a plan: a mesh, which of its axes NVLink joins, and what travels over which link."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ring_jax._checks import check_choice, check_count, check_instance
from ring_jax._hardware import BY_NAME, Hardware
from ring_jax.distributed.placement import AXES

NVLINK, NETWORK = "NVLink", "network"


@dataclass(frozen=True)
class Machine:
    """So many GPUs of one kind along each mesh axis.

    Fields:
        gpu: what one computes, moves and holds.
        sizes: of the axes in `distributed.mesh`'s order, slowest links first; 1 where there is none.
    """

    gpu: Hardware
    sizes: tuple[int, int, int, int]

    @classmethod
    def of(cls, mesh: Mapping[str, int] | None, gpu: "str | Hardware") -> "Machine":
        """From a dict of axis sizes, and a GPU's name or facts."""
        if not isinstance(gpu, Hardware):
            check_choice("gpu", gpu.lower() if isinstance(gpu, str) else gpu, BY_NAME)
            gpu = BY_NAME[gpu.lower()]
        mesh = {"context": 1} if mesh is None else mesh
        check_instance("mesh", mesh, Mapping, "a dict such as {'context': 8, 'data': 8}")
        for name, size in mesh.items():
            check_choice("mesh", name, AXES)
            check_count(f"mesh[{name!r}]", size, 1)
        return cls(gpu, tuple(mesh.get(name, 1) for name in AXES))  # type: ignore[arg-type]

    def size(self, *axes: str | None) -> int:
        """GPUs along some axes together."""
        return math.prod(self.sizes[AXES.index(name)] for name in axes if name is not None)

    @property
    def gpus(self) -> int:
        return math.prod(self.sizes)

    @property
    def hosts(self) -> int:
        return -(-self.gpus // self.gpu.host_gpus)

    @property
    def mesh(self) -> dict[str, int]:
        """Axes that there are."""
        found = {name: n for name, n in zip(AXES, self.sizes, strict=True) if n > 1}
        return found or {"context": 1}

    def link(self, *axes: str) -> str:
        """What joins the ranks of some axes: the network as soon as one hop leaves the host, for all wait for it."""
        outermost = min((AXES.index(name) for name in axes if self.size(name) > 1), default=len(AXES) - 1)
        return NVLINK if math.prod(self.sizes[outermost:]) <= self.gpu.host_gpus else NETWORK

    def rate(self, link: str) -> float:
        """Bytes a second that a rank receives."""
        return self.gpu.gather_bytes_per_s if link == NVLINK else self.gpu.network_bytes_per_s

    def wait(self, received: float, collectives: float, link: str) -> float:
        """Seconds of so many bytes and collectives."""
        return received / self.rate(link) + collectives * self.gpu.seconds_per_collective
