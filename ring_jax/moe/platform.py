"""The platform that is being compiled for."""

import jax


def target_platform() -> str:
    """ "cpu", "gpu" or another name: that of the mesh, else of the default device."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is not None and device.platform is not None:
        platform = device.platform
    else:
        default = getattr(jax.config, "jax_default_device", None) or jax.devices()[0]
        platform = default if isinstance(default, str) else default.platform
    return "gpu" if platform in ("cuda", "rocm") else platform
