"""The command line as a user runs it: in a process of its own, with devices of its own choice."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ring_jax.cli import main
from tests.inference.checkpoint import tiny_checkpoint

ROOT = Path(__file__).parents[1]


def ring_jax(*args, cwd=ROOT):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # quicker to compile; says nothing of the devices
    }
    command = [sys.executable, "-m", "ring_jax", *map(str, args)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_generate_from_a_checkpoint(checkpoint, tmp_path):
    (tmp_path / "prompt.txt").write_text("To be, or not to be")
    args = "--model", checkpoint, "--prompt-file", "prompt.txt", "--context-ranks", 2, "--max-new-tokens", 5
    result = ring_jax("generate", *args, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "prefill   19 tokens over 2 ranks ... done" in result.stdout
    assert re.search(r"first     token after [\d.]+ s", result.stdout)
    assert re.search(r"decode    5 tokens, [\d.]+ tokens/s", result.stdout)
    assert re.search(r"memory    arrays now \d+, \d+ MiB", result.stdout)


@pytest.mark.slow
def test_generate_as_the_readme_says(tmp_path):
    result = ring_jax("generate", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "prefill   16,384 tokens on one rank ... done" in result.stdout
    assert "prefill   16,384 tokens over 8 ranks ... done" in result.stdout
    assert result.stdout.count(": found, '") == 2


def test_doctor():
    result = ring_jax("doctor", "--seq-len", "160")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"versions  Python [\d.]+, .*jax [\d.]+", result.stdout)
    assert "8 x cpu on cpu (emulated on one CPU)" in result.stdout
    for name in ("reference", "xla", "ring", "pass_q", "all_gather", "ulysses"):
        assert re.search(rf"^  {name} .*agrees", result.stdout, re.MULTILINE), result.stdout
    assert "DISAGREES" not in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "nowhere", "--prompt", "x"], "no config.json at nowhere"),
        (["--prompt-file", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--context-ranks", "9", "--prompt", "x"], "--context-ranks 9: this machine has 8 devices"),
        (["--temperature", "-1"], "temperature must be 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be positive, got 0"),
        (["--model", "nowhere"], "give --prompt TEXT"),
    ],
)
def test_generate_errors(args, message, capsys):
    assert main(["generate", *args]) == 2
    assert message in capsys.readouterr().err


def test_generate_refuses_a_prompt_that_is_too_long(checkpoint, capsys):
    args = ["generate", "--model", str(checkpoint), "--prompt", "x" * 600, "--context-ranks", "1"]
    assert main(args) == 2
    assert "600 tokens and 128 new ones exceed the model's 512 positions" in capsys.readouterr().err


def test_missing_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["generate"]) == 2
    assert "pip install 'ring-jax[cli]'" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["abacus"], ["generate", "--max-new-tokens", "many"]])
def test_wrong_command_lines(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: ring-jax" in capsys.readouterr().err


def test_help_shows_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--help"])
    assert stop.value.code == 0 and "--context-ranks" in capsys.readouterr().out
