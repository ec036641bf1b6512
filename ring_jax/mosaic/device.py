"""Which devices run the Hopper kernels."""

from ring_jax._device import target
from ring_jax.mosaic import compat

_HOPPER = ("H100", "H200", "H800", "H20", "GH200")


def hopper_reason() -> str | None:
    """Why the device that is being compiled for cannot run Hopper kernels, or None."""
    device = target()
    if device.platform != "gpu":
        return f"needs an NVIDIA Hopper GPU, this is {device.kind}"
    if not any(name in device.kind for name in _HOPPER):
        return f"needs an NVIDIA Hopper GPU (compute capability 9.0), this is {device.kind}"
    return None


def runs_kernels() -> bool:
    """Whether that device runs them, those that need jax 0.11 among them."""
    return compat.INTERPRET_AVAILABLE and hopper_reason() is None
