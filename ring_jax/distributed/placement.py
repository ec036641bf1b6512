"""Meshes whose axes follow the links: ranks that talk most are neighbours on one host."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ring_jax._checks import check_count, check_instance, describe

# From the slowest links to the fastest. The sums of the tensor axis wait for each other at every layer, the hops of the
# context axis hide behind blocks, the tokens of experts travel twice a layer, gradients of the data axis once a step.
AXES = ("data", "expert", "context", "tensor")


def mesh(
    context: int | None = None,
    *,
    data: int = 1,
    tensor: int = 1,
    expert: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with the axes "data", "expert", "context" and "tensor" (Auto), over the devices of all processes.

    Ranks of the context, and of the tensor axis inside it, are neighbours on one host (one NVLink domain) as long as they
    fit; the data axis crosses hosts first. `links` says what each axis uses.

    Args:
        context: ranks that share a sequence. Default: all that the other axes leave.
        data, tensor, expert: ranks of the other axes; 1 where an axis is not used.
        devices: default: all, `jax.devices()`.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.

    Warns:
        UserWarning: a context that would fit on one host lies across hosts all the same; how to avoid it.

    Example:
        >>> import jax, ring_jax
        >>> mesh = ring_jax.distributed.mesh(devices=jax.devices()[:1])
        >>> cp = ring_jax.ContextParallel("context", batch_axis="data", head_axis="tensor", mesh=mesh)
        >>> dict(mesh.shape)
        {'data': 1, 'expert': 1, 'context': 1, 'tensor': 1}
    """
    others = {
        name: check_count(name, size, 1) for name, size in (("data", data), ("tensor", tensor), ("expert", expert))
    }
    context = None if context is None else check_count("context", context, 1)
    found = _ordered(jax.devices() if devices is None else devices)
    rest, product = len(found), math.prod(others.values())
    if context is None:
        context = max(1, rest // product)
    sizes = {**others, "context": context}
    if product * context != rest:
        asked = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "context=1"
        raise ValueError(
            f"{asked} takes {product * context} devices, there are {rest}"
            f" ({_hosts(found)}): {_what_fits(rest, others, context)}"
        )
    grid = np.empty(rest, object)
    grid[:] = found
    made = Mesh(grid.reshape([sizes[name] for name in AXES]), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    _warn_of_crossing(made, math.gcd(*_counts(found)))
    return made


def links(mesh: Mesh) -> dict[str, str]:
    """What the ranks of each axis of a mesh have between them.

    Args:
        mesh: any mesh of devices.

    Returns:
        For each axis "none" (one rank), "host" (all ranks that talk with each other share a host, or an NVLink domain or
        a TPU slice) or "network".

    Example:
        >>> import jax, ring_jax
        >>> ring_jax.distributed.links(ring_jax.distributed.mesh(devices=jax.devices()[:1]))["context"]
        'none'
    """
    check_instance("mesh", mesh, Mesh, "a jax.sharding.Mesh")
    found = {}
    for axis, name in enumerate(mesh.axis_names):
        rows = np.moveaxis(mesh.devices, axis, -1).reshape(-1, mesh.devices.shape[axis])
        inside = all(len({_host(d) for d in row}) == 1 for row in rows)
        found[name] = "none" if mesh.devices.shape[axis] == 1 else "host" if inside else "network"
    return found


def _host(device: Any) -> int:
    """The domain of fast links that a device lies in. JAX counts hosts (NVLink domains, TPU slices) as slices; where it
    does not, as on CPUs, a process is one."""
    found = getattr(device, "slice_index", None)
    return device.process_index if found is None else found


def _ordered(devices: Any) -> list[Any]:
    if isinstance(devices, (str, bytes)) or not isinstance(devices, (Sequence, np.ndarray)) or not len(devices):
        raise TypeError(f"devices must be a sequence of devices, got {describe(devices)}")
    for device in devices:
        if not hasattr(device, "process_index") or not hasattr(device, "id"):
            raise TypeError(f"devices must hold jax devices, got {describe(device)}")
    return sorted(devices, key=lambda d: (_host(d), d.process_index, d.id))


def _counts(devices: list[Any]) -> list[int]:
    hosts = [_host(d) for d in devices]
    return [hosts.count(host) for host in dict.fromkeys(hosts)]


def _hosts(devices: list[Any]) -> str:
    counts = _counts(devices)
    return f"{len(counts)} host{'s' * (len(counts) > 1)} of {' and '.join(map(str, sorted(set(counts))))}"


def _what_fits(rest: int, others: dict[str, int], context: int) -> str:
    product = math.prod(others.values())
    if rest % product == 0:
        return f"context={rest // product} would use all"
    if rest % (product // others["data"] * context) == 0:
        return f"data={rest // (product // others['data'] * context)} would use all"
    blocking = [f"{name}={size}" for name, size in others.items() if rest % size]
    return f"{' and '.join(blocking) or 'their product'} does not divide {rest}; pass devices= to use some of them only"


def _warn_of_crossing(mesh: Mesh, here: int) -> None:
    context, tensor = mesh.shape["context"], mesh.shape["tensor"]
    block = context * tensor
    if context > here or links(mesh)["context"] != "network":
        return
    why = f" beside tensor={tensor}" if block > here else ""
    fitting = [size for size in range(1, here + 1) if here % (size * tensor) == 0]
    advice = f"context={fitting[-1]}" if fitting else "tensor=1"
    warnings.warn(
        f"context={context}{why} does not fit into hosts of {here} devices, so its hops cross the network; {advice} would stay inside",
        stacklevel=3,
    )
