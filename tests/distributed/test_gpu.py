"""Two processes with a GPU each, against one process with both."""

import json
import os
import subprocess
import sys

import pytest

from tests.distributed.test_processes import ROOT, WORKERS, reports

pytestmark = pytest.mark.multi_gpu


def launched(*args, processes=2):
    command = [sys.executable, "-m", "ring_jax", *(["launch", "--processes", str(processes)] if processes > 1 else [])]
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    run = subprocess.run([*command, *map(str, args)], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    return run


def test_ring_checkpoint_and_generation(tmp_path):
    first, second = reports(launched(WORKERS / "everything.py", tmp_path, "save", "generate"))
    assert first["ranks"] == second["ranks"] == 2
    assert max(first["error"], second["error"]) < 1e-2  # products of jax.nn are TF32
    assert first["tokens"] == second["tokens"]
    assert first["share"] < 0.7


def test_training_goes_on_in_one_process(tmp_path):
    script = ROOT / "examples" / "train_qwen3_5.py"
    run = launched(script, "--context", "2", "--steps", "20", "--save-every", "10", "--out", tmp_path)
    assert "x NVIDIA" in run.stdout
    losses = json.loads((tmp_path / "metrics.json").read_text())["losses"]
    assert losses[-1][1] < losses[0][1]


def test_the_ring_is_as_fast_as_in_one_process(tmp_path):
    bench = [
        "bench",
        "ring",
        "--ranks",
        "2",
        "--strategies",
        "ring",
        "--lengths",
        "8192",
        "32768",
        "--gradients",
        "no",
        "--profile",
    ]
    rows = {}
    for processes in (1, 2):
        path = tmp_path / f"{processes}.json"
        print(launched(*bench, "--json", path, processes=processes).stdout)
        found = json.loads(path.read_text())["rows"]
        rows[processes] = {row["length"]: row["ms_per_layer"] for row in found if row["ranks"] == 2}
    for length, one in rows[1].items():
        assert rows[2][length] < 1.1 * one, (length, rows)
