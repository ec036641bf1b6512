"""Programs of many ranks, compiled for as many emulated devices and not run: what grows with C, and what must not."""

import json
import math
import os
import subprocess
import sys

import pytest

from tests.distributed.test_processes import ROOT, WORKERS
from tests.distributed.workers import compile_ranks


def compiled(ranks, *programs):
    command = [sys.executable, WORKERS / "compile_ranks.py", ranks, *programs]
    run = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=600, check=False, cwd=ROOT, env=environment()
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return {row["program"]: row for row in map(json.loads, run.stdout.splitlines())}


def environment():
    flags = "--xla_backend_optimization_level=0"
    return os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def check(rows, few, ranks):
    """`few`: the same programs on eight ranks."""
    for name, row in rows.items():
        before = few[name]
        # Tokens a rank are equal, so a rank holds as much and its program is as long. all_gather has the keys of all.
        gathered = name == "all_gather"
        assert row["arguments"] == before["arguments"]
        # The model's tokens are given whole: some numbers for each of a rank's 64 tokens are on all ranks.
        whole = 512 * ranks if name == "model, gradient" else 0
        assert row["temporaries"] < before["temporaries"] * (ranks / 8 if gathered else 1.05) + 2**16 + whole
        assert row["instructions"] < before["instructions"] * 1.25 + 200
        kinds = row["collectives"]
        if name == "ring":
            assert kinds == {"collective-permute": ranks - 1}
        elif name == "ring, gradient":
            # Keys and values in both passes, their gradients in one. XLA may share the first permute of the two passes.
            assert kinds in ({"collective-permute": 3 * ranks - 3}, {"collective-permute": 3 * ranks - 4})
        elif gathered:
            assert kinds == {"all-gather": 1}
        else:  # a ring, and scans over ranks of log2 C steps: one layer of each kind
            gradient = name == "model, gradient"
            steps = kinds["collective-permute"] - (3 * ranks - 3 if gradient else ranks - 1)
            assert 0 < steps <= (24 + 4 * math.log2(ranks) if gradient else 16 + 2 * math.log2(ranks))
            assert sum(kinds.values()) - kinds["collective-permute"] <= 24, "a fixed number of the others"


def test_64_ranks():
    programs = "ring, gradient", "all_gather"
    check(compiled(64, *programs), {name: compile_ranks.measure(8, name) for name in programs}, 64)


@pytest.mark.slow
def test_1024_ranks():
    rows, few = compiled(1024), compiled(8)
    check(rows, few, 1024)
    for name, row in rows.items():
        assert row["trace"] + row["compile"] < 4 * (few[name]["trace"] + few[name]["compile"]) + 20, "compiles as fast"
