"""The command line as a user runs it: in a process of its own, with devices of its own choice."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ring_jax.cli import main

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


def check_demo(tmp_path, *args, tokens):
    result = ring_jax("demo", *args, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    text = result.stdout
    assert "devices   8 x" in text and f"long pass {tokens:,} bytes" in text
    before, after = map(float, re.search(r"loss ([\d.]+) before, ([\d.]+) after", text).groups())
    assert after < 0.8 * before
    assert float(re.search(r"differs by at most ([\d.e+-]+)", text)[1]) < 1e-3
    assert float(re.search(r"([\d,.]+) tokens/s", text)[1].replace(",", "")) > 0
    # Two layers, one ring each: 7 permutes of packed KV; the layouts move in programs of their own.
    assert re.search(r"compiled program: .*\b14 collective-permute", text)
    assert "all-gather" not in text
    for layout in ("contiguous", "striped", "zigzag"):
        shares = re.search(rf"^ +{layout} +([\d. ]+)  +ring", text, re.MULTILINE)[1].split()
        assert len(shares) == 8 and sum(map(float, shares)) == pytest.approx(8, abs=0.1)
    return text


def test_demo_on_a_file(tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    check_demo(tmp_path, "text.txt", "--max-tokens", 1000, "--plot", "work.png", tokens=1000)
    assert (tmp_path / "work.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_demo_as_the_readme_says(tmp_path):
    check_demo(tmp_path, tokens=16_384)
    assert (tmp_path / "ring-jax-demo.png").read_bytes().startswith(b"\x89PNG")


def test_doctor():
    result = ring_jax("doctor", "--seq-len", "160")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"versions  Python [\d.]+, .*jax [\d.]+", result.stdout)
    assert "8 x cpu on cpu (emulated on one CPU)" in result.stdout
    for name in ("reference", "xla", "ring", "pass_q", "all_gather", "ulysses"):
        assert re.search(rf"^  {name} .*agrees", result.stdout, re.MULTILINE), result.stdout
    assert "DISAGREES" not in result.stdout


@pytest.mark.parametrize(
    ("content", "args", "message"),
    [
        (None, [], r"cannot read .*text.txt: No such file"),
        (b"", [], "has 0 bytes; the demo needs at least 256"),
        (b"short", [], "has 5 bytes"),
        (b"x" * 1000, ["--max-tokens", "10"], "--max-tokens must be at least 256, got 10"),
        (b"x" * 1000, ["--plot", "nowhere/at/all.png"], "cannot write .*nowhere"),
    ],
)
def test_demo_errors(tmp_path, capsys, content, args, message):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    assert main(["demo", str(file), *args]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_demo_names_a_folder(tmp_path, capsys):
    assert main(["demo", str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err


def test_missing_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert "pip install 'ring-jax[cli]'" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["abacus"], ["demo", "--max-tokens", "many"]])
def test_wrong_command_lines(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: ring-jax" in capsys.readouterr().err


def test_help_shows_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--help"])
    assert stop.value.code == 0 and "--max-tokens" in capsys.readouterr().out
