"""`initialize`: one process of several joins the others, whoever started it."""

import atexit
import logging
import os
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any

import jax

from ring_jax._checks import check_count, check_instance, check_number, describe
from ring_jax.distributed import cluster
from ring_jax.distributed.cluster import Found

_FOREVER = 10**6  # seconds; JAX ends the whole process at its own timeout, so ours must come first
_WHAT_TO_DO = (
    "pass coordinator_address, num_processes and process_id, or set "
    f"{cluster.COORDINATOR}, {cluster.COUNT} and {cluster.INDEX} (`ring-jax launch` does, for one host)"
)
_log = logging.getLogger(__name__)


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    local_device_ids: Sequence[int] | None = None,
    timeout: float = 300,
) -> None:
    """Joins this process with the others of its job; with one process, nothing happens. Call it before all else in jax.

    What is not passed is taken from the variables that `ring-jax launch` sets (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
    JAX_PROCESS_ID), then from Slurm, Open MPI, a TPU slice or an indexed Kubernetes job, as JAX detects them. Where none of
    them is there, this is the only process. Calling it again changes nothing.

    From then on an uncaught exception ends its process at once: JAX would first wait for the others, who wait for it.

    Args:
        coordinator_address: "host:port" of process 0; the port is free there and reachable from all.
        num_processes: how many there are.
        process_id: which of them this is, from 0.
        local_device_ids: GPUs of this process, as numbers among those that it sees. Default: all that it sees; under
            Slurm and Open MPI its share of those of the host.
        timeout: seconds to wait for the others.

    Raises:
        ValueError: the sources contradict each other or are incomplete; all that was found is listed.
        RuntimeError: jax uses its devices already, or the coordinator cannot start (its port is taken, say).
        TimeoutError: the others have not come.

    Example:
        >>> import ring_jax
        >>> ring_jax.distributed.initialize()  # the only process: nothing to do

    Source: jax.distributed.initialize, https://docs.jax.dev/en/latest/multi_process.html.
    """
    given = _arguments(coordinator_address, num_processes, process_id)
    local_device_ids = _device_ids(local_device_ids)
    timeout = check_number("timeout", timeout, above=0)
    if jax.distributed.is_initialized():
        return
    found = _resolve(given)
    if found is None or found.count == 1:
        return
    _log.info("joining as process %s of %s, by %s", found.index, found.count, found)
    whole = None not in (found.coordinator, found.count, found.index)
    devices = local_device_ids if local_device_ids is not None else found.devices
    options: dict[str, Any] = {"cluster_detection_method": "deactivate" if whole else found.method}
    if devices is not None:
        options["local_device_ids"] = list(devices)
    _join(found, options, timeout)
    _leave_at_once_on_error()


def _arguments(address: Any, count: Any, index: Any) -> Found:
    check_instance("coordinator_address", address, str, 'a text "host:port"', optional=True)
    if address is not None and not _is_address(address):
        raise ValueError(f'coordinator_address must be "host:port", got {address!r}')
    count = None if count is None else check_count("num_processes", count, 1)
    index = None if index is None else check_count("process_id", index, 0, None if count is None else count - 1)
    named = {"coordinator_address": address, "num_processes": count, "process_id": index}
    return Found("arguments", {k: str(v) for k, v in named.items() if v is not None}, address, count, index)


def _device_ids(ids: Any) -> list[int] | None:
    if ids is None:
        return None
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise TypeError(f"local_device_ids must be a sequence of integers or None, got {describe(ids)}")
    return [check_count("local_device_ids", i) for i in ids]


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 2**16


def _resolve(given: Found) -> Found | None:
    """One answer from all sources, None for a process that is alone; raises ValueError where there is no one answer."""
    launched, schedulers = cluster.of_launcher(os.environ), cluster.of_schedulers(os.environ)
    sources = [each for each in (given, launched) if each is not None and each.variables]
    if not sources and not schedulers:
        return None
    if given.count == 1:
        return given
    parts = {name: _first(name, sources) for name in ("coordinator", "count", "index")}
    missing = [name for name, value in parts.items() if value is None]
    scheduler = _one_of(schedulers) if missing else None
    found = " | ".join(map(str, [*sources, *schedulers]))
    if scheduler is not None:
        sources.append(scheduler)
        parts = {name: _first(name, sources) for name in parts}
        missing = [] if parts["count"] == 1 else _not_completed(scheduler, parts)
    if missing:
        names = {
            "coordinator": "the address of process 0",
            "count": "the number of processes",
            "index": "which one this is",
        }
        raise ValueError(f"cannot tell {' and '.join(names[name] for name in missing)}, found {found}: {_WHAT_TO_DO}")
    count, index, address = parts["count"], parts["index"], parts["coordinator"]
    if count is not None and index is not None and index >= count:
        raise ValueError(f"process {index} of {count} cannot be, found {found}: they count from 0")
    if address is not None and not _is_address(address):
        raise ValueError(f'{cluster.COORDINATOR}={address!r} must be "host:port"')
    devices = None if scheduler is None else scheduler.devices
    method = None if scheduler is None else scheduler.method
    return Found(found, {}, address, count, index, method, devices)


def _first(name: str, sources: list[Found]) -> Any:
    return next((x for each in sources if (x := getattr(each, name)) is not None), None)


def _one_of(schedulers: list[Found]) -> Found | None:
    """The scheduler to believe; several may have started this process, if they agree."""
    ranks = {(each.count, each.index) for each in schedulers}
    if len(ranks) > 1:
        raise ValueError(
            "schedulers contradict each other about which process this is, found "
            f"{' | '.join(map(str, schedulers))}: {_WHAT_TO_DO}"
        )
    return schedulers[0] if schedulers else None


def _not_completed(scheduler: Found, parts: dict[str, Any]) -> list[str]:
    """What JAX could not find out by itself under this scheduler."""
    needs = {"Kubernetes": "kubernetes", "Open MPI": "mpi4py" if scheduler.method == "mpi4py" else ""}
    package = needs.get(scheduler.source, "")
    if not package or _is_installed(package):
        return []
    return [name for name, value in parts.items() if value is None]


def _is_installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def _join(found: Found, options: dict[str, Any], timeout: float) -> None:
    """`jax.distributed.initialize` in a thread, because it never comes back from a timeout of its own."""
    result: list[BaseException | None] = []

    def run() -> None:
        try:
            jax.distributed.initialize(
                found.coordinator, found.count, found.index, initialization_timeout=_FOREVER, **options
            )
            result.append(None)
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True, name="ring_jax.distributed.initialize")
    thread.start()
    thread.join(timeout)
    who = f"process {found.index} of {found.count}" if found.index is not None else "this process"
    if not result:
        atexit.register(_abandon)
        raise TimeoutError(f"{who} waited {timeout:g} s for the others. {_what_answers(found)} Found {found.source}")
    error = result[0]
    if error is None:
        return
    if isinstance(error, RuntimeError) and "before any JAX calls" in str(error):
        raise RuntimeError(
            f"{who} came too late: jax uses its devices already. Call ring_jax.distributed.initialize() before "
            f"jax.devices(), arrays and everything else that starts them. Found {found.source}"
        ) from error
    if isinstance(error, RuntimeError):
        raise RuntimeError(f"{who} cannot join the others: {error}. Found {found.source}") from error
    raise error


def _what_answers(found: Found) -> str:
    """Whether process 0 can be reached from here, which tells a wrong address from a process that never started."""
    if found.coordinator is None:
        return "Is every one of them running?"
    host, _, port = found.coordinator.rpartition(":")
    if found.index == 0:
        return f"It listens at {found.coordinator}; is every other process running, and can each reach that address?"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return f"Nobody answers at {found.coordinator}, the address of process 0 ({error}): is it running, is the address right?"
    return (
        f"Process 0 answers at {found.coordinator}: is every other process running, with the same number of processes?"
    )


def _abandon() -> None:
    """Leaves without JAX's farewell: it would wait for processes that never came."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _leave_at_once_on_error() -> None:
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        before(kind, error, trace)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130 if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = hook
