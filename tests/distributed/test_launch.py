"""`ring-jax launch` as a user of torchrun expects it. The launched scripts do not import jax: these tests take a second each."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from ring_jax import cli
from ring_jax.commands import launch
from tests.test_cli import IN_FRONT, ROOT

RANK = "import os, sys, time; rank = int(os.environ['JAX_PROCESS_ID'])\n"


@pytest.fixture
def script(tmp_path):
    def write(code):
        path = tmp_path / "script.py"
        path.write_text(RANK + textwrap.dedent(code))
        return str(path)

    return write


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_output_has_its_rank_and_arguments_pass(script, capfd):
    path = script(
        """
        print("out", sys.argv[1:], os.environ["JAX_NUM_PROCESSES"], os.environ["JAX_NUM_CPU_DEVICES"])
        print("no end of line", end="", file=sys.stderr)
        """
    )
    assert cli.main(["launch", "--processes", "3", "--devices-per-process", "2", path, "--steps", "3", "-m"]) == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == [f"[{i}] out ['--steps', '3', '-m'] 3 2" for i in range(3)]
    assert sorted(err.splitlines()) == [f"[{i}] no end of line" for i in range(3)]


def test_one_failure_ends_all_with_its_traceback_first(script, capfd):
    """The others fail because of it, a moment later; one does not end by itself at all."""
    path = script(
        f"""
        if rank == 1:
            print("about to fail", flush=True)
            raise ValueError("the cause")
        if rank == 2:
            time.sleep(0.3)
            raise RuntimeError("the connection is closed")
        {"time.sleep(600)"}
        """
    )
    begin = time.monotonic()
    assert cli.main(["launch", "--processes", "4", path]) == 1
    assert time.monotonic() - begin < 20
    out, err = capfd.readouterr()
    assert "[1] about to fail" in out
    assert err.index("[1] ValueError: the cause") < err.index("ring-jax: process 1 of 4 failed with exit status 1")
    summary = err[err.index("ring-jax: process 1") :]
    assert "    Traceback (most recent call last):" in summary and summary.rstrip().endswith("ValueError: the cause")
    assert "connection is closed" not in err[: err.index("the cause")] + summary


@pytest.mark.parametrize(("code", "status", "words"), [
    ("os.kill(os.getpid(), 9) if rank == 2 else time.sleep(600)", 137, "process 2 of 3 was ended by SIGKILL"),
    ("sys.exit('no such file') if rank == 0 else time.sleep(600)", 1, "    no such file"),
    ("os.kill(os.getpid(), 11) if rank == 1 else time.sleep(600)", 139, "    Fatal Python error: Segmentation fault"),
    ("sys.exit(7) if rank == 0 else time.sleep(600)", 7, "process 0 of 3 failed with exit status 7"),
])  # fmt: skip
def test_the_exit_status_is_that_of_the_cause(script, capfd, code, status, words):
    assert cli.main(["launch", "--processes", "3", script(code)]) == status
    assert words in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_cleanly(script, number):
    """Every process gets it once and may finish what it does, longer than the second that Python itself is given."""
    path = script(
        """
        import signal
        def last(number, frame):
            time.sleep(1.5)
            print("saved", number, flush=True)
            os._exit(0)
        signal.signal(signal.SIGINT, last), signal.signal(signal.SIGTERM, last)
        print("ready", flush=True)
        time.sleep(600)
        """
    )
    command = [sys.executable, "-c", IN_FRONT, "launch", "--processes", "2", path]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        ready = [process.stdout.readline() for _ in range(2)]
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert sorted(ready) == ["[0] ready\n", "[1] ready\n"]
    assert sorted(out.splitlines()) == [f"[{i}] saved {number.value}" for i in range(2)]
    assert process.returncode == 128 + number and err == ""


def test_who_does_not_end_is_ended(script):
    path = script(
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('ready', flush=True)\ntime.sleep(600)"
    )
    command = [sys.executable, "-c", IN_FRONT, "launch", "--processes", "2", "--grace", "0.5", path]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(2):
            process.stdout.readline()
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - begin < 10


def test_who_dies_at_once_when_killed(monkeypatch):
    """All between two looks of the launcher."""
    send = launch.Job._signal

    def and_wait(job, number):
        send(job, number)
        if number == signal.SIGKILL:
            for process in job.processes:
                process.wait()

    monkeypatch.setattr(launch.Job, "_signal", and_wait)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    job = launch.Job([sys.executable, "-c", code], [dict(os.environ)] * 2, 0.2)
    threading.Timer(1, job.signals.append, [signal.SIGINT]).start()
    assert job.run() == 130


def test_modules_and_subcommands(capfd):
    assert cli.main(["launch", "--processes", "2", "-m", "platform", "--terse"]) == 0
    assert len(re.findall(r"^\[[01]\] \S", capfd.readouterr().out, re.MULTILINE)) == 2
    assert cli.main(["launch", "--processes", "1", "generate", "--max-new-tokens", "0"]) == 2
    assert "[0] ring-jax: error: --max-new-tokens must be positive" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--processes", "0", __file__], "--processes must be positive"),
        (["--processes", "2", "nowhere.py"], "no script nowhere.py; a module needs -m before it"),
        (["--processes", "2", "launch"], "launch cannot launch itself"),
        (["--processes", "2", "--devices-per-process", "0", __file__], "--devices-per-process must be positive"),
        (["--processes", "2", "--grace", "-1", __file__], "--grace must not be negative"),
    ],
)
def test_refuses(args, message, capsys):
    assert cli.main(["launch", *args]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpus", "processes", "each", "want"),
    [
        ("0123", 2, None, [["0", "1"], ["2", "3"]]),
        ("0123", 4, 1, [["0"], ["1"], ["2"], ["3"]]),
        ("0123", 2, 1, [["0"], ["1"]]),
        ("", 2, None, [[], []]),
    ],
)
def test_gpus_are_shared_out(gpus, processes, each, want):
    assert launch._shares(list(gpus), processes, each) == want


@pytest.mark.parametrize(("processes", "each"), [(3, None), (8, None), (2, 3)])
def test_gpus_that_cannot_be_shared_are_named(processes, each):
    with pytest.raises(cli.CommandError, match=rf"{processes} processes.* do not share 4 GPUs"):
        launch._shares(list("0123"), processes, each)


def test_what_each_process_finds(monkeypatch):
    parse = cli.parser_of("launch").parse_args
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_dump_to=x")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    one, two = launch._environments(parse(["launch", "--processes", "2", "--flags", "x.py"]))
    assert (one["CUDA_VISIBLE_DEVICES"], two["CUDA_VISIBLE_DEVICES"]) == ("4", "6")
    assert one["NCCL_NVLS_ENABLE"] == "0" and "JAX_NUM_CPU_DEVICES" not in one
    assert one["JAX_COORDINATOR_ADDRESS"] == two["JAX_COORDINATOR_ADDRESS"] == two["JAX_COORDINATOR_BIND_ADDRESS"]
    one, two = launch._environments(parse(["launch", "--processes", "2", "--cpu", "x.py"]))
    assert (one["JAX_PLATFORMS"], one["JAX_NUM_CPU_DEVICES"], one["XLA_FLAGS"]) == ("cpu", "1", "--xla_dump_to=x")
    assert (one["JAX_PROCESS_ID"], two["JAX_PROCESS_ID"]) == ("0", "1")
