"""Meshes that follow the links, on devices of several hosts that are only described."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from ring_jax.distributed import links, mesh


@dataclasses.dataclass(frozen=True)
class Device:
    """As a GPU of one host of several shows itself; jax's meshes ask for no more."""

    id: int
    process_index: int
    slice_index: int | None
    platform: str = "gpu"
    device_kind: str = "described"


def cluster_of(hosts, each, processes_per_host=1):
    """GPUs as jax lists them: by process, and processes here and there."""
    found = [
        Device(host * each + i, (i * processes_per_host // each) * hosts + host, host)
        for host in range(hosts)
        for i in range(each)
    ]
    return sorted(found, key=lambda d: (d.process_index, d.id))


def groups(made, axis):
    """The devices that talk along an axis."""
    at = made.axis_names.index(axis)
    return np.moveaxis(made.devices, at, -1).reshape(-1, made.devices.shape[at])


@pytest.mark.parametrize("processes", [1, 2, 8])
@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        ({"context": 8, "data": 4}, {"context": "host", "data": "network", "tensor": "none", "expert": "none"}),
        ({"context": 4, "tensor": 2}, {"context": "host", "tensor": "host", "data": "network"}),
        ({"context": 32}, {"context": "network", "data": "none"}),
        ({"context": 16, "tensor": 2}, {"context": "network", "tensor": "host"}),
        ({"context": 2, "expert": 4}, {"context": "host", "expert": "host", "data": "network"}),
    ],
)
def test_the_context_is_on_the_fastest_links(sizes, want, processes):
    devices = cluster_of(4, 8, processes)
    sizes = sizes if "data" in sizes else sizes | {"data": 32 // int(np.prod(list(sizes.values())))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = mesh(**sizes, devices=devices)
    assert made.axis_types == (AxisType.Auto,) * 4
    assert {made.shape[name] for name in sizes} == set(sizes.values())
    assert set(made.devices.flat) == set(devices)
    found = links(made)
    assert {name: found[name] for name in want} == want
    for ring in groups(made, "context"):
        crossings = sum(a.slice_index != b.slice_index for a, b in zip(ring, np.roll(ring, -1), strict=True))
        hosts = len({d.slice_index for d in ring})
        assert crossings == (hosts if hosts > 1 else 0), "a ring enters and leaves each host once"


def test_the_context_takes_what_the_others_leave():
    assert mesh(data=2, devices=cluster_of(2, 8)).shape["context"] == 8


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            {"context": 8, "data": 3},
            "data=3 x context=8 takes 24 devices, there are 32 (4 hosts of 8): data=4 would use all",
        ),
        ({"context": 5, "tensor": 2}, "there are 32 (4 hosts of 8): context=16 would use all"),
        ({"data": 3}, "data=3 does not divide 32"),
        ({"context": 64}, "context=64 takes 64 devices"),
    ],
)
def test_what_does_not_fit_is_named(sizes, words):
    with pytest.raises(ValueError) as error:
        mesh(**sizes, devices=cluster_of(4, 8))
    assert words in str(error.value)


def test_a_context_that_leaves_its_host_for_no_need_is_named():
    with pytest.warns(
        UserWarning, match="context=8 beside tensor=2 does not fit into hosts of 8 devices.*context=4 would"
    ):
        mesh(8, tensor=2, data=2, devices=cluster_of(4, 8))
    with pytest.warns(UserWarning, match="context=3 does not fit into hosts of 4 devices.*context=4 would"):
        mesh(3, data=4, devices=cluster_of(3, 4))


def test_processes_count_as_hosts_where_jax_names_none():
    devices = [Device(i, i // 4, None, "cpu") for i in range(8)]
    assert links(mesh(4, data=2, devices=devices))["data"] == "network"
    assert links(mesh(4, data=2))["data"] == "host"  # eight emulated devices of one process
    assert dict(mesh(devices=jax.devices()[:4]).shape) == {"data": 1, "expert": 1, "context": 4, "tensor": 1}
