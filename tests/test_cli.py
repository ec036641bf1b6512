"""The command line as a user runs it: in a process of its own, with devices of its own choice."""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import ring_jax.cli
from ring_jax.cli import CommandError, main, parser_of
from ring_jax.commands import generate
from ring_jax.commands.progress import Progress
from tests.inference.checkpoint import tiny_checkpoint
from tests.support.strategies import SINGLE_AXIS

ROOT = Path(__file__).parents[1]


# Jobs in the background of a shell ignore Ctrl-C, and so do their children, these tests for one.
IN_FRONT = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("ring_jax", run_name="__main__", alter_sys=True)
"""


def start(*args, cwd=ROOT, flags="--xla_backend_optimization_level=0", how=("-m", "ring_jax")):
    """The command in a process; `flags` are quick to compile and say nothing of the devices."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    command = [sys.executable, *how, *map(str, args)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, cwd=cwd, env=environment, **pipes)


def run(*args, **options):
    with start(*args, **options) as process:
        out, err = process.communicate(timeout=400)
    return subprocess.CompletedProcess(args, process.returncode, out, err)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_generate_from_a_checkpoint(checkpoint, tmp_path):
    (tmp_path / "prompt.txt").write_text("To be, or not to be")
    args = "--model", checkpoint, "--prompt-file", "prompt.txt", "--context-ranks", 2, "--max-new-tokens", 5
    result = run("generate", *args, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"compile   prefill over 2 ranks ... [\d.]+ s", result.stdout)
    assert re.search(r"prefill   19 tokens over 2 ranks ... [\d.]+ s, [\d,]+ tokens/s", result.stdout)
    assert re.search(r"compile   decode over 2 ranks ... [\d.]+ s", result.stdout)
    assert re.search(r"decode    5 tokens, [\d.]+ tokens/s", result.stdout)
    assert re.search(r"memory    arrays now \d+, \d+ MiB", result.stdout)


@pytest.mark.slow
def test_generate_as_the_readme_says(tmp_path):
    result = run("generate", cwd=tmp_path, flags="")
    assert result.returncode == 0, result.stdout + result.stderr
    for where in ("on one rank", "over 8 ranks"):
        for step in ("compile   prefill", "prefill   16,384 tokens", "compile   decode", "decode    tokens"):
            assert re.search(rf"^{step} {where} ... [\d.]+ s", result.stdout, re.MULTILINE), result.stdout
    assert re.search(r"^pass key +found +found    hidden was", result.stdout, re.MULTILINE)
    difference = re.search(r"differ by at most ([\d.e-]+) between 1 rank and 8", result.stdout)
    assert float(difference[1]) < 1e-4
    one, eight = map(int, re.search(r"^sequence +(\d+) MiB +(\d+) MiB", result.stdout, re.MULTILINE).groups())
    assert eight < one / 4
    assert "The 8 ranks are emulated" in result.stdout
    assert (tmp_path / "ring-jax-ranks.png").read_bytes().startswith(b"\x89PNG")


def test_doctor():
    result = run("doctor", "--seq-len", "160")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"versions  Python [\d.]+, .*jax [\d.]+", result.stdout)
    assert "8 x cpu on cpu (emulated on one CPU)" in result.stdout
    for name in ("reference", "xla", *SINGLE_AXIS, "chunked", "recurrent"):
        assert re.search(rf"^  {name} .*agrees", result.stdout, re.MULTILINE), result.stdout
    assert "bfloat16, gated delta rule: chunked (mosaic needs" in result.stdout
    assert "bfloat16, experts: xla (mosaic needs" in result.stdout
    assert len(re.findall(r"^  mosaic .*does not run", result.stdout, re.MULTILINE)) == 6
    assert "DISAGREES" not in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "nowhere", "--prompt", "x"], "no config.json at nowhere"),
        (["--prompt-file", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--context-ranks", "9", "--prompt", "x"], "--context-ranks 9: this machine has 8 devices"),
        (["--temperature", "-1"], "temperature must be finite and >= 0, got -1"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be positive, got 0"),
        (["--model", "nowhere"], "give --prompt TEXT"),
        (["--prompt-file", str(ROOT)], f"cannot read {ROOT}"),
    ],
)
def test_generate_errors(args, message, capsys):
    assert main(["generate", *args]) == 2
    found = capsys.readouterr().err
    assert found.startswith("ring-jax: error: ") and message in found


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "--prompt", ""], "--prompt is empty"),
        (
            ["generate", "--model", __file__, "--prompt", "x"],
            "test_cli.py is a file: give the directory of a checkpoint",
        ),
        (["generate", "--prompt", "\udcff"], "--prompt is not UTF-8"),
        (["generate", "--prompt-file", os.devnull], f"{os.devnull} is empty"),
        (["generate", "--prompt", "x", "--stop", ""], "--stop needs a text"),
        (["generate", "--prompt", "x", "--seed", "-1"], "--seed must be from 0 to 4294967295, got -1"),
        (["generate", "--prompt", "x", "--png", "x.png"], "--png goes with the bundled task"),
        (["generate", "--top-p", "nan"], "top_p"),
        (["doctor", "--seq-len", "0"], "--seq-len must be from 1 to 8192, got 0"),
        (["doctor", "--seq-len", "100000"], "--seq-len must be from 1 to 8192, got 100000"),
        (["bench", "attention", "--lengths", "0"], "--lengths must be positive, got 0"),
        (["bench", "attention", "--heads", "6", "--kv-heads", "4"], "--kv-heads must divide --heads, got 4 and 6"),
        (["bench", "attention", "--masks", "diagonal"], "--masks diagonal: mask must be full, causal"),
        (["bench", "gdn", "--shapes", "32768"], "--shapes must be like 1x32768x32"),
        (["bench", "gdn", "--shapes", "1x64x24"], "--key-heads must divide the value heads, got 16 and 24"),
        (["bench", "ring", "--repeats", "-1"], "--repeats must be positive, got -1"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(args, message, capsys, monkeypatch):
    def nothing_starts():
        raise AssertionError("looked for devices")

    for name in ("generate", "doctor", "bench"):
        monkeypatch.setattr(f"ring_jax.commands.{name}.find_devices", nothing_starts)
    assert main(args) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (CommandError("give DIR"), 2, "ring-jax: error: give DIR\n"),
        (KeyboardInterrupt(), 130, ""),
        (OSError(28, "No space left on device"), 1, "ring-jax: error: [Errno 28] No space left on device\n"),
        (ring_jax.cli.jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB"), 1, "ring-jax: error: out of memory: "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_known_errors_have_no_traceback(error, status, message, monkeypatch, capfd):
    def fail(args):
        raise error

    monkeypatch.setattr("ring_jax.commands.doctor.run", fail)
    monkeypatch.setattr("ring_jax.cli._forget_output", lambda: None)  # this process needs its output
    assert main(["doctor"]) == status
    found = capfd.readouterr().err
    assert found.startswith(message) and bool(found) == bool(message)


@pytest.mark.parametrize("error", [RuntimeError("unable to initialize backend 'cuda'"), AssertionError()])
def test_no_device(error, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr("jax.devices", fail)
    assert main(["doctor"]) == 2
    assert "ring-jax: error: jax finds no device" in capsys.readouterr().err


def test_errors_of_ours_are_not_hidden(monkeypatch):
    monkeypatch.setattr("ring_jax.commands.doctor.run", lambda args: {}["missing"])
    with pytest.raises(KeyError):
        main(["doctor"])


def test_ctrl_c_is_quiet_also_while_something_compiles(tmp_path):
    with start("generate", "--context-ranks", 1, cwd=tmp_path, flags="", how=("-c", IN_FRONT)) as process:
        try:
            found = ""
            while not found.endswith("compile   prefill on one rank ..."):
                found += process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            begin = time.monotonic()
            assert process.wait(timeout=30) == 130
            assert time.monotonic() - begin < 15
            assert process.stderr.read() == ""
        finally:
            process.kill()


@pytest.mark.parametrize("args", [["doctor", "--seq-len", "16"], ["generate", "--help"]])
def test_a_reader_that_has_gone_is_no_error(args):
    with start(*args) as process:
        if args[0] == "doctor":
            assert process.stdout.readline().startswith("versions")
        process.stdout.close()
        try:
            assert process.wait(timeout=200) in ((141,) if args[0] == "doctor" else (0, 141))  # argparse ends with 0
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"ring-jax {ring_jax.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", ring_jax.__version__)


def parsers(parser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action.choices.values():
                yield from parsers(choice)


@pytest.mark.parametrize("command", [None, *ring_jax.cli.COMMANDS])
def test_every_option_has_help(command):
    actions = [action for parser in parsers(parser_of(command)) for action in parser._actions]
    assert [a.option_strings for a in actions if a.option_strings and not a.help] == []
    assert len(actions) > 3


def test_progress_in_a_pipe(capsys):
    with Progress(2) as progress, progress.step("load", "model") as step:
        step.note = "small"
    with pytest.raises(ValueError), Progress(1) as progress, progress.step("compile", "prefill"):
        raise ValueError
    first, second, rest = capsys.readouterr().out.split("\n")
    assert re.fullmatch(r"load      model ... \d+\.\d s, small", first)
    assert (second, rest) == ("compile   prefill ...", "")


def test_progress_in_a_terminal(capsys, monkeypatch):
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    with Progress(4) as progress:
        with progress.step("load", "model"):
            pass
        with progress.step("decode", "tokens", 3) as step:
            step.advance()
            progress._bar.refresh()
    out, err = capsys.readouterr()
    assert re.search(r"load      model: \d+\.\d s\n", out)
    assert re.search(r"decode tokens +50%\|.*\| 2 of 4 steps, 00:00", err)


def test_results_side_by_side(capsys):
    answers = {
        1: generate_answer(0.0, sequence=800 * 2**20),
        8: generate_answer(3e-6, sequence=100 * 2**20),
    }
    generate._print_results(answers, {1: "12345.", 8: "54321."}, "12345.")
    out = capsys.readouterr().out
    assert re.search(r"^ +1 rank +8 ranks$", out, re.MULTILINE)
    assert re.search(r"^sequence +800 MiB +100 MiB    on each rank", out, re.MULTILINE)
    assert re.search(r"^decode +500.0 ms +500.0 ms    a token$", out, re.MULTILINE)
    assert re.search(r"^pass key +found +NOT found: '54321.'    hidden was '12345.'$", out, re.MULTILINE)
    assert "The logits of the 3 tokens differ by at most 3.0e-06 between 1 rank and 8 (the largest is 2.0)" in out
    assert "The 8 ranks are emulated: they share" in out


def generate_answer(error, **fields):
    from ring_jax.commands.session import Answer

    logits = [np.asarray([1, 2 - error], np.float64)] * 3
    return Answer([1, 2, 3], logits, compile_prefill=1.0, prefill=2.0, decode=1.0, **fields)


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
