"""Which devices run the Hopper kernels."""

from ring_jax._device import target

_HOPPER = ("H100", "H200", "H800", "H20", "GH200")


def hopper_reason() -> str | None:
    """Why the device that is being compiled for cannot run Hopper kernels, or None."""
    device = target()
    if device.platform != "gpu":
        return f"needs an NVIDIA Hopper GPU, this is {device.kind}"
    if not any(name in device.kind for name in _HOPPER):
        return f"needs an NVIDIA Hopper GPU (compute capability 9.0), this is {device.kind}"
    return None
