"""The scripts of examples/multi_host, run with their scheduler's environment imitated on this host."""

import json
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.test_processes import ROOT, WORKERS

SCRIPTS = ROOT / "examples" / "multi_host"


@pytest.fixture
def environment():
    """What a scheduler's process finds: no launcher, one CPU device, this package."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_", "XLA_", "KUBERNETES_"))}
    return kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}


def reports(output, count):
    found = sorted((json.loads(x) for x in re.findall(r"report (.*)", output)), key=lambda r: r["rank"])
    assert [r["rank"] for r in found] == list(range(count)), output
    assert {r["sum"] for r in found} == {count * (count + 1) // 2}
    assert {r["devices"] for r in found} == {r["context"] for r in found} == {count}
    return found


def test_slurm(environment):
    port = 2**12  # JAX takes the last 4096 ports, by the number of the job
    job = {"SLURM_JOB_ID": str(random.randrange(port)), "SLURM_NTASKS": "2", "SLURM_RESTART_COUNT": "1"}
    env = environment | job | {"PATH": f"{WORKERS}:{os.environ['PATH']}", "PYTHON": sys.executable}
    command = [SCRIPTS / "slurm.sh", WORKERS / "hello.py", "--data", "2"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "srun --kill-on-bad-exit=1 --label" in run.stdout
    assert [r["arguments"] for r in reports(run.stdout, 2)] == [["--data", "2", "--resume"]] * 2


def test_slurm_needs_a_program(environment):
    run = subprocess.run(
        [SCRIPTS / "slurm.sh"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 2 and "usage: sbatch" in run.stderr


@pytest.fixture(scope="module")
def manifest():
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((SCRIPTS / "kubernetes.yaml").read_text())
    return service, job


def test_kubernetes_names_agree(manifest):
    service, job = manifest
    spec, (container,) = job["spec"], job["spec"]["template"]["spec"]["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    host, port = variables["JAX_COORDINATOR_ADDRESS"].split(":")
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(variables["JAX_NUM_PROCESSES"])
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert int(port) in {each["containerPort"] for each in container["ports"]}
    data, context = (int(re.search(rf"--{name} (\d+)", container["args"][0])[1]) for name in ("data", "context"))
    assert data * context == spec["completions"] * container["resources"]["limits"]["nvidia.com/gpu"]


def test_kubernetes(manifest, environment, tmp_path):
    """The manifest's own command and variables, the name of pod 0 resolved and the folder of its volume moved."""
    _, job = manifest
    (container,) = job["spec"]["template"]["spec"]["containers"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {each["name"]: each["value"] for each in container["env"]}
    variables["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
    variables |= {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    (script,) = container["args"]
    script = script.replace("examples/train_qwen3_5.py", str(WORKERS / "hello.py"))
    script = script.replace("python3", sys.executable).replace("/runs", str(tmp_path))
    (tmp_path / "kubernetes" / "checkpoints").mkdir(parents=True)
    pods = [
        subprocess.Popen(
            [*container["command"], script],
            env=environment | variables | {"JOB_COMPLETION_INDEX": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(job["spec"]["completions"])
    ]
    output = "".join(pod.communicate(timeout=120)[0] for pod in pods)
    assert [pod.returncode for pod in pods] == [0, 0], output
    found = reports(output, 2)
    assert all(r["arguments"][-1] == "--resume" and "--context" in r["arguments"] for r in found)


def test_scripts_are_whole():
    assert {path.name for path in SCRIPTS.iterdir()} == {"slurm.sh", "kubernetes.yaml"}
    run = subprocess.run(["bash", "-n", SCRIPTS / "slurm.sh"], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert os.access(SCRIPTS / "slurm.sh", os.X_OK) and Path(SCRIPTS / "slurm.sh").read_text().startswith("#!")
