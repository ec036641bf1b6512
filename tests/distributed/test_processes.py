"""Rings, checkpoints, generation and training over several processes of one host, against the same in one process."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from ring_jax.inference import generate
from ring_jax.training import checkpoint
from tests.distributed.workers import everything, train_smallest
from tests.inference.checkpoint import tiny_checkpoint
from tests.test_cli import IN_FRONT

ROOT = Path(__file__).parents[2]
WORKERS = Path(__file__).parent / "workers"


def launched(processes, each, *args, status=0, **environment):
    """Standard output of `ring-jax launch`, line by line of each rank."""
    command = [
        sys.executable,
        "-m",
        "ring_jax",
        "launch",
        "--processes",
        processes,
        "--devices-per-process",
        each,
        "--cpu",
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    run = subprocess.run(
        [*map(str, command), *map(str, args)], env=env, capture_output=True, text=True, timeout=500, check=False
    )
    assert run.returncode == status, run.stdout[-3000:] + run.stderr[-6000:]
    return run


def reports(run):
    return [json.loads(line) for line in re.findall(r"report (.*)", run.stdout)]


def parameters(model):
    return jax.tree.leaves(nnx.state(model, nnx.Param))


def run_everything(tmp_path, first, then, *more):
    """Saved by as many processes, restored by others and by this one; (processes, devices of each)."""
    ranks = first[0] * first[1]
    saved = reports(launched(*first, WORKERS / "everything.py", tmp_path, "save", *more))
    restored = reports(launched(*then, WORKERS / "everything.py", tmp_path, "restore", *more)) if then else []
    here = everything.model_of(ranks)
    tokens = generate(here, everything.PROMPTS, max_new_tokens=3).tokens if more else None
    assert len(saved) == first[0] and len(restored) == (then or [0])[0]
    for report in (*saved, *restored):
        assert report["error"] < 2e-6
        assert report.get("tokens") == tokens
        assert report["share"] < 0.6, "every process holds the whole model: nothing was spread"
    for report in restored:
        assert (report["step"], report["by"], report["same"]) == (1, first[0], True)
    for step in (1, 2) if then else (1,):
        other = everything.model_of(ranks, seed=1)
        assert checkpoint.restore(tmp_path / "steps", other, everything.optimizer_of(other), step=step).step == step
        for x, y in zip(parameters(other), parameters(here), strict=True):
            np.testing.assert_array_equal(x, y)


def test_two_processes(tmp_path):
    run_everything(tmp_path, (2, 2), None)


@pytest.mark.slow
def test_four_processes_save_and_two_restore(tmp_path):
    run_everything(tmp_path, (4, 1), (2, 2), "generate")


@pytest.mark.slow
def test_two_processes_save_and_four_restore(tmp_path):
    run_everything(tmp_path, (2, 2), (4, 1))


@pytest.mark.slow
def test_the_command_line_generates_over_two_processes(tmp_path):
    model = tiny_checkpoint(tmp_path)
    run = launched(2, 1, "generate", "--model", model, "--prompt", "To be, or not", "--max-new-tokens", "3")
    assert re.search(r"\[0\] prefill .*over 2 ranks", run.stdout), run.stdout
    assert not re.search(r"\[1\] (load|prefill|decode|devices)", run.stdout), "only the first process is heard"


@pytest.fixture
def example(monkeypatch):
    """optax mixes dtypes. For all threads, because the script compiles in one of its own."""
    for name in ("matplotlib", "optax", "tokenizers", "tqdm"):
        pytest.importorskip(name)
    before = jax.config.jax_numpy_dtype_promotion
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield train_smallest.shrink(train_smallest.load())
    jax.config.update("jax_numpy_dtype_promotion", before)


@pytest.mark.slow
def test_a_run_of_four_that_is_killed_goes_on_with_two(example, tmp_path):
    """And ends with the losses of a run that nothing disturbed."""
    mesh = ["--data", "2", "--context", "2", "--save-every", "2"]
    whole = example.main([*mesh, "--out", str(tmp_path / "whole")])["losses"]
    assert len(whole) == 6 and whole[-1][1] < whole[0][1] - 0.2

    script, out = WORKERS / "train_smallest.py", tmp_path / "run"
    killed = launched(4, 1, script, *mesh, "--out", out, status=137, KILLED_AT="4")
    assert "process 2 of 4 was ended by SIGKILL" in killed.stderr
    assert checkpoint.latest_step(out / "checkpoints") == 2
    launched(2, 2, script, *mesh, "--out", out, "--resume")
    assert checkpoint.latest_step(out / "checkpoints") == 6
    extra = json.loads((out / "checkpoints" / "6" / "extra" / "metadata").read_text())
    np.testing.assert_allclose(extra["losses"], whole, rtol=1e-5)
    assert (out / "model" / "model.safetensors").exists() and (out / "loss.png").exists()


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_at_one_step(tmp_path):
    """Saved, and with the exit status of Ctrl-C; JAX's own notice of preemption would answer to SIGTERM alone."""
    script, mesh = WORKERS / "train_smallest.py", ["--context", "2", "--save-every", "1000", "--steps", "100000"]
    command = [sys.executable, "-c", IN_FRONT, "launch", "--processes", "2", "--cpu", script, *mesh, "--out", tmp_path]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        list(map(str, command)), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        for line in run.stdout:
            if re.search(r"step +10 ", line):
                break
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=200)
    assert run.returncode == 130, errors
    stopped = re.findall(r"\[(\d)\] stopped after step (\d+)", errors)
    assert sorted(rank for rank, _ in stopped) == ["0", "1"] and len({step for _, step in stopped}) == 1
    assert checkpoint.latest_step(tmp_path / "checkpoints") == int(stopped[0][1])
