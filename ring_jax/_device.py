"""The device that is being compiled for."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Target:
    """platform: "cpu", "gpu" or another name. kind: as the vendor calls it. compute_capability: of an NVIDIA GPU, None
    where it is not known."""

    platform: str
    kind: str
    compute_capability: float | None = None


def target() -> Target:
    """The device that the ambient mesh names, else the default device."""
    mesh = jax.sharding.get_abstract_mesh()
    abstract = None if mesh.empty else mesh.abstract_device
    if abstract is not None and abstract.platform is not None:
        return Target(_family(abstract.platform), abstract.device_kind or abstract.platform)
    device = getattr(jax.config, "jax_default_device", None) or jax.devices()[0]
    device = jax.devices(device)[0] if isinstance(device, str) else device
    capability = getattr(device, "compute_capability", None)
    return Target(_family(device.platform), device.device_kind, None if capability is None else float(capability))


def _family(platform: str) -> str:
    return "gpu" if platform in ("cuda", "rocm") else platform
