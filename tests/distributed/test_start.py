"""Who a process is, from what its environment says; errors that name what was found."""

import os
import subprocess
import sys

import jax
import pytest

from ring_jax.distributed import cluster, start
from ring_jax.distributed.start import initialize

LAUNCHER = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.9", "JOB_COMPLETION_INDEX": "1"}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables in an environment without any scheduler."""
    for name in os.environ:
        if name.startswith(
            ("SLURM_", "OMPI_", "JAX_COORD", "JAX_NUM_P", "JAX_PROC", "KUBERNETES_", "JOB_", "TPU_", "CUDA_V")
        ):
            monkeypatch.delenv(name)

    def set_all(*groups, **more):
        for name, value in {k: v for group in (*groups, more) for k, v in group.items()}.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.fixture
def joined(monkeypatch):
    """What reaches jax, instead of joining anybody."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(start, "_leave_at_once_on_error", lambda: None)
    return calls


def reached(calls):
    ((args, kwargs),) = calls
    assert kwargs.pop("initialization_timeout") > 10**5, "jax would end the process before we say why"
    return args, kwargs


def test_alone_nothing_happens(environment, joined):
    environment()
    initialize()
    environment(KUBERNETES_SERVICE_HOST="10.0.0.9")  # a pod of no job, a notebook say
    initialize()
    environment(LAUNCHER, JAX_NUM_PROCESSES="1", JAX_PROCESS_ID="0")
    initialize()
    initialize("10.0.0.1:1234", 1, 0)
    assert not joined


def test_the_shell_of_a_slurm_job_is_alone(environment, joined):
    """`salloc` and `sbatch` set some of the variables outside of a step."""
    environment({k: v for k, v in SLURM.items() if "STEP" not in k})
    initialize()
    environment(SLURM, SLURM_NTASKS="1", SLURM_PROCID="0")
    initialize()
    assert not joined


def test_the_launcher_wins_over_the_scheduler_that_it_runs_in(environment, joined):
    environment(SLURM, LAUNCHER)
    initialize()
    assert reached(joined) == (("10.0.0.1:1234", 4, 2), {"cluster_detection_method": "deactivate"})


def test_arguments_win(environment, joined):
    environment(SLURM, LAUNCHER)
    initialize("host:1", 8, 7, local_device_ids=[2, 3])
    assert reached(joined) == (
        ("host:1", 8, 7),
        {"cluster_detection_method": "deactivate", "local_device_ids": [2, 3]},
    )


def test_a_part_is_taken_from_each_source(environment, joined):
    environment(KUBERNETES, JAX_COORDINATOR_ADDRESS="job-0.job:1234")
    initialize(num_processes=2)
    assert reached(joined)[0] == ("job-0.job:1234", 2, 1)


def test_slurm_and_open_mpi_go_to_jax(environment, joined):
    environment(SLURM)
    initialize()
    assert reached(joined) == ((None, 4, 3), {"cluster_detection_method": "slurm"})
    joined.clear()
    for name in SLURM:
        os.environ.pop(name)
    environment(OPEN_MPI, CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")
    initialize()
    assert reached(joined) == ((None, 8, 5), {"cluster_detection_method": "ompi", "local_device_ids": [2, 3]})


@pytest.mark.parametrize(
    ("tasks", "node", "visible", "on_host", "want"),
    [
        ("1(x2)", "1", "0,1,2,3", "4", (0, 1, 2, 3)),  # a process for each host: JAX would take one GPU of four
        ("4(x2)", "1", "0,1,2,3", "4", (1,)),
        ("2", "0", "0,1,2,3", "4", (2, 3)),
        ("4(x2)", "1", "3", "4", (0,)),  # bound by the scheduler: JAX would look for the second of one
        ("2(x2)", "1", "2,3", "4", (0, 1)),
        ("2,3", "1", "0,1,2", "", (1,)),
        ("2,3", "7", "0,1,2", "", None),
        ("2(x2)", "1", None, "4", None),
    ],
)
def test_gpus_of_a_slurm_task(tasks, node, visible, on_host, want):
    env = SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node, "SLURM_GPUS_ON_NODE": on_host}
    env |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    env["SLURM_LOCALID"] = "0" if tasks.startswith("1(") else "1"
    assert cluster.of_schedulers(env)[0].devices == want


@pytest.mark.parametrize(
    ("variables", "arguments", "words"),
    [
        (
            {**SLURM, **OPEN_MPI},
            {},
            ["contradict", "Slurm: SLURM_JOB_ID=77", "SLURM_PROCID=3", "OMPI_COMM_WORLD_RANK=5"],
        ),
        (
            {"JAX_PROCESS_ID": "2"},
            {},
            ["address of process 0 and the number of processes", "JAX_PROCESS_ID=2", "ring-jax launch"],
        ),
        ({}, {"num_processes": 2}, ["address of process 0 and which one this is", "arguments: num_processes=2"]),
        (LAUNCHER | {"JAX_PROCESS_ID": "4"}, {}, ["process 4 of 4 cannot be"]),
        (LAUNCHER | {"JAX_NUM_PROCESSES": "four"}, {}, ["JAX_NUM_PROCESSES='four' is no number"]),
        (LAUNCHER | {"JAX_COORDINATOR_ADDRESS": "host"}, {}, ["JAX_COORDINATOR_ADDRESS='host' must be"]),
        (KUBERNETES, {}, ["address of process 0 and the number of processes", "JOB_COMPLETION_INDEX=1"]),
        (
            {k: v for k, v in OPEN_MPI.items() if "orte" not in k},
            {},
            ["address of process 0", "Open MPI: OMPI_COMM_WORLD_SIZE=8"],
        ),
    ],
)
def test_what_is_ambiguous_is_an_error_that_lists_what_was_found(
    environment, joined, monkeypatch, variables, arguments, words
):
    monkeypatch.setattr(start, "_is_installed", lambda package: False)
    environment(variables)
    with pytest.raises(ValueError) as error:
        initialize(**arguments)
    assert all(word in str(error.value) for word in words), error.value
    assert not joined


def test_too_late(environment):
    """Found where there is something to join; alone it does not matter."""
    jax.devices()
    environment()
    initialize()
    environment(LAUNCHER)
    with pytest.raises(RuntimeError, match=r"process 2 of 4 came too late: .*before\s.*JAX_PROCESS_ID=2"):
        initialize()


def test_nobody_answers():
    """In a process of its own, which has to end by itself, at once."""
    code = """
        import ring_jax
        ring_jax.distributed.initialize("127.0.0.1:9", 2, 1, timeout=0.5)
    """
    command = [sys.executable, "-c", "\n".join(map(str.strip, code.splitlines()))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "TimeoutError: process 1 of 2 waited 0.5 s for the others. Nobody answers at 127.0.0.1:9" in result.stderr
    assert "coordinator_address=127.0.0.1:9 num_processes=2" in result.stderr
