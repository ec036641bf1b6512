"""Who this process is among others, as the environment says: the launcher's variables, then the scheduler's.

JAX reads the same variables (`jax._src.clusters`); here they are read to tell one process from many, to notice sources that
contradict each other, to say what was found when something is missing, and to share out GPUs where JAX takes one of several.
"""

import dataclasses
import importlib.util
import re
from collections.abc import Mapping

COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
DEVICES = "JAX_LOCAL_DEVICE_IDS"


@dataclasses.dataclass(frozen=True)
class Found:
    """What one source says; None where it says nothing.

    Fields:
        source: its name in messages. variables: what was read.
        coordinator, count, index: address of process 0, number of processes, which of them this is.
        method: how JAX is told to complete it, its `cluster_detection_method`; None: by its own order.
        devices: local GPUs of this process; None leaves that to JAX.
    """

    source: str
    variables: Mapping[str, str]
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    method: str | None = None
    devices: tuple[int, ...] | None = None

    def __str__(self) -> str:
        listed = " ".join(f"{name}={value}" for name, value in self.variables.items())
        return f"{self.source}: {listed}"


def of_launcher(env: Mapping[str, str]) -> Found | None:
    """`ring-jax launch`, or whoever sets the same three variables."""
    read = {name: env[name] for name in (COORDINATOR, COUNT, INDEX) if env.get(name)}
    if not read:
        return None
    return Found("environment", read, read.get(COORDINATOR), _number(read, COUNT), _number(read, INDEX))


def of_schedulers(env: Mapping[str, str]) -> list[Found]:
    """Every scheduler that started this process, the innermost first."""
    found = [_open_mpi(env), _slurm(env), _tpu(env), _kubernetes(env)]
    return [each for each in found if each is not None]


def _slurm(env: Mapping[str, str]) -> Found | None:
    """A step of srun; the shell of salloc and the script of sbatch run outside of one, once."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    read = {name: env[name] for name in names if name in env}
    if len(read) < len(names):
        return None
    local = _number(read, "SLURM_LOCALID") or 0
    tasks = _tasks_here(
        env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE"), env.get("SLURM_NODEID")
    )
    devices = None if tasks is None else share(env, local, tasks)
    count, index = _number(read, "SLURM_NTASKS"), _number(read, "SLURM_PROCID")
    return Found("Slurm", read, None, count, index, "slurm", devices)


def _open_mpi(env: Mapping[str, str]) -> Found | None:
    names = [f"OMPI_COMM_WORLD_{x}" for x in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")]
    read = {name: env[name] for name in names if name in env}
    if names[0] not in read or names[1] not in read:
        return None
    local, tasks = (_number(read, name) for name in names[2:])
    devices = None if local is None or tasks is None else share(env, local, tasks)
    # Open MPI 5 names no address of process 0: JAX asks mpi4py for it.
    method = "ompi" if "OMPI_MCA_orte_hnp_uri" in env else "mpi4py"
    return Found("Open MPI", read, None, _number(read, names[0]), _number(read, names[1]), method, devices)


def _kubernetes(env: Mapping[str, str]) -> Found | None:
    """A pod of an indexed Job; any other pod is one process."""
    read = {name: env[name] for name in ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX") if name in env}
    return Found("Kubernetes", read, index=_number(read, "JOB_COMPLETION_INDEX")) if len(read) == 2 else None


def _tpu(env: Mapping[str, str]) -> Found | None:
    """A TPU slice of several hosts. How many, JAX finds out by itself."""
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in env:
        return None
    from jax._src.clusters import cloud_tpu_cluster as tpu  # the one place that knows

    for cluster in (tpu.GkeTpuCluster, tpu.GceTpuCluster):
        if cluster.is_env_present():
            read = {name: env[name] for name in ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES") if name in env}
            return Found("TPU", read, method=cluster.name)
    return None


def share(env: Mapping[str, str], local: int, tasks: int) -> tuple[int, ...] | None:
    """GPUs of task `local` of `tasks` on this host, by their number among those that it sees; None if nothing tells.

    JAX gives every task one GPU by its local number. That leaves seven of eight idle where one task has a host for itself,
    and fails where the scheduler has bound each task to GPUs of its own, which then count from 0.
    """
    visible = _visible(env)
    if visible is None or tasks < 1:
        return None
    on_host = env.get("SLURM_GPUS_ON_NODE", "")
    bound = visible < tasks or (on_host.isdecimal() and visible < int(on_host))
    each = visible if bound else visible // tasks
    first = 0 if bound else local * each
    return tuple(range(first, first + each))


def _visible(env: Mapping[str, str]) -> int | None:
    listed = env.get("CUDA_VISIBLE_DEVICES")
    return len([x for x in listed.split(",") if x.strip()]) or None if listed else None


def _tasks_here(counts: str | None, node: str | None) -> int | None:
    """Of Slurm's "4(x2),3" the number that belongs to a node."""
    each: list[int] = []
    for part in (counts or "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            return None
        each += [int(match[1])] * int(match[2] or 1)
    if node is not None and node.isdecimal() and int(node) < len(each):
        return each[int(node)]
    return each[0] if len(set(each)) == 1 else None


def _number(read: Mapping[str, str], name: str) -> int | None:
    text = read.get(name)
    if text is None:
        return None
    if not text.strip().isdecimal():
        raise ValueError(f"{name}={text!r} is no number of processes or of a process: correct or unset it")
    return int(text)
