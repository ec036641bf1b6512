"""``ring-jax launch --processes N script.py ...``: N processes on this host, each a rank that `ring_jax.distributed.initialize` joins.

A module (``-m module ...``) and the other subcommands (``generate ...``, ``bench ring ...``) are launched the same way.
GPUs are shared out, as many to each process; without GPUs every process has CPU devices of its own.
"""

import argparse
import collections
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ring_jax.cli import COMMANDS, CommandError
from ring_jax.distributed import recommended_flags, use_flags
from ring_jax.distributed.cluster import COORDINATOR, COUNT, INDEX

SHOWN = 40  # last lines of the process that failed
GRACE_AFTER_FAILURE = (
    2.0  # seconds; the others wait for one that is gone, and JAX takes SIGTERM for a notice of preemption
)
_TRACEBACKS = b"Traceback (most recent call last)", b"Fatal Python error"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "ring-jax launch --processes N [options] (script.py | -m module | COMMAND) ..."
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="how many")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, whatever GPUs there are")
    parser.add_argument(
        "--devices-per-process",
        type=int,
        metavar="D",
        help="GPUs of each (default: all, shared out), or emulated CPU devices (default: 1)",
    )
    parser.add_argument(
        "--flags", action="store_true", help="set the flags that ring_jax.distributed recommends, where none is set"
    )
    parser.add_argument(
        "--grace", type=float, default=30.0, metavar="S", help="seconds to end by themselves after Ctrl-C (default: 30)"
    )
    parser.add_argument("-m", dest="module", action="store_true", help="what follows is a module")
    parser.add_argument("target", help="script, module or subcommand")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")


def run(args: argparse.Namespace) -> int:
    if args.processes < 1:
        raise CommandError(f"--processes must be positive, got {args.processes}")
    if args.devices_per_process is not None and args.devices_per_process < 1:
        raise CommandError(f"--devices-per-process must be positive, got {args.devices_per_process}")
    if not args.grace >= 0:
        raise CommandError(f"--grace must not be negative, got {args.grace}")
    command = [sys.executable, "-u", *_target(args), *args.arguments]
    environments = list(_environments(args))
    return Job(command, environments, args.grace).run()


def _target(args: argparse.Namespace) -> list[str]:
    if args.module:
        return ["-m", args.target]
    if args.target == "launch":
        raise CommandError("launch cannot launch itself")
    if args.target in COMMANDS:
        return ["-m", "ring_jax", args.target]
    if not Path(args.target).is_file():
        raise CommandError(
            f"no script {args.target}; a module needs -m before it, subcommands are {', '.join(COMMANDS)}"
        )
    return [args.target]


def _environments(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """The environment of each process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    common = dict(os.environ)
    common |= {COORDINATOR: address, "JAX_COORDINATOR_BIND_ADDRESS": address, COUNT: str(args.processes)}
    common.pop("JAX_LOCAL_DEVICE_IDS", None)
    common.setdefault("PYTHONFAULTHANDLER", "1")  # a crash in compiled code says where in the script it was
    if args.flags:
        use_flags(recommended_flags(args.processes), common)
    gpus = [] if args.cpu or common.get("JAX_PLATFORMS", "").startswith("cpu") else _gpus(common)
    for index, own in enumerate(_shares(gpus, args.processes, args.devices_per_process)):
        devices = {"CUDA_VISIBLE_DEVICES": ",".join(own)} if gpus else _cpus(common, args)
        yield common | devices | {INDEX: str(index)}


def _gpus(environment: dict[str, str]) -> list[str]:
    """GPUs that CUDA would show, without starting it."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [x for x in map(str.strip, listed.split(",")) if x and x != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i, line in enumerate(x for x in found.splitlines() if x.startswith("GPU "))]


def _shares(gpus: list[str], processes: int, each: int | None) -> list[list[str]]:
    if not gpus:
        return [[]] * processes
    each = each or len(gpus) // processes
    if not each or each * processes > len(gpus) or (each * processes < len(gpus) and len(gpus) % processes):
        raise CommandError(
            f"{processes} processes{f' of {each} GPUs' if each else ''} do not share {len(gpus)} GPUs: choose --processes "
            "that divides them, --devices-per-process, CUDA_VISIBLE_DEVICES, or --cpu"
        )
    return [gpus[i * each : (i + 1) * each] for i in range(processes)]


def _cpus(common: dict[str, str], args: argparse.Namespace) -> dict[str, str]:
    flags = [x for x in common.get("XLA_FLAGS", "").split() if "xla_force_host_platform_device_count" not in x]
    count = str(args.devices_per_process or 1)
    return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": count, "XLA_FLAGS": " ".join(flags)}


class Job:
    """Processes that live and end together.

    Each is the head of a process group of its own, so that Ctrl-C reaches it once, through us.
    """

    def __init__(self, command: list[str], environments: list[dict[str, str]], grace: float):
        self.command, self.environments, self.grace = command, environments, grace
        self.processes: list[subprocess.Popen[bytes]] = []
        self.selector = selectors.DefaultSelector()
        self.partial: dict[Any, bytes] = {}
        self.last: list[collections.deque[bytes]] = []  # of each process, of its errors
        self.traced: dict[int, float] = {}  # when a process printed its first traceback
        self.ended: dict[int, float] = {}  # when a process was seen to have ended
        self.signals: list[int] = []

    def run(self) -> int:
        """Exit status: 0 where all ended with 0, else that of the process that failed first, 128 + n for a signal n."""
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, lambda n, _: self.signals.append(n)) for number in handled}
        # Ctrl-C is for us alone to act on: the command line would end this process a second after it.
        wakeup = signal.set_wakeup_fd(-1)
        try:
            for index, environment in enumerate(self.environments):
                self._start(index, environment)
            return self._watch()
        finally:
            self._signal(signal.SIGKILL)
            for process in self.processes:
                process.wait()
                for pipe in (process.stdout, process.stderr):
                    assert pipe is not None
                    pipe.close()
            self.selector.close()
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start(self, index: int, environment: dict[str, str]) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(self.command, env=environment, start_new_session=True, **pipes)
        self.processes.append(process)
        self.last.append(collections.deque(maxlen=400))
        for pipe, out in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            self.selector.register(pipe, selectors.EVENT_READ, (index, out))

    def _watch(self) -> int:
        deadline, sent, failed = float("inf"), 0, None
        while self.selector.get_map() or any(p.poll() is None for p in self.processes):
            self._read(0.1)
            now = time.monotonic()
            for index, process in enumerate(self.processes):
                if process.poll() is not None:
                    self.ended.setdefault(index, now)
            if failed is None and not sent and any(p.returncode not in (None, 0) for p in self.processes):
                self._read(0.2)  # what it said last, before others are heard
                failed = self._first_failure()
                self._signal(signal.SIGTERM)
                deadline = now + min(self.grace, GRACE_AFTER_FAILURE)
            if len(self.signals) > sent:
                sent = len(self.signals)
                self._signal(self.signals[-1] if sent == 1 else signal.SIGKILL)
                deadline = now + self.grace
            if now > deadline:
                self._signal(signal.SIGKILL)
                deadline = float("inf")
            # Who was just ended was not seen to end yet.
            if len(self.ended) == len(self.processes) and now - max(self.ended.values()) > 1:
                break  # a grandchild holds the pipes
        if sent:
            return 128 + self.signals[0]
        return 0 if failed is None else self._report(failed)

    def _read(self, seconds: float) -> None:
        for key, _ in self.selector.select(seconds):
            index, out = key.data
            pipe: IO[bytes] = key.fileobj  # type: ignore[assignment]
            data = pipe.read(1 << 16)
            if data is None:  # nothing after all
                continue
            lines = (self.partial.pop(pipe, b"") + data).split(b"\n")
            rest = lines.pop()
            if not data:
                self.selector.unregister(pipe)
                lines, rest = lines + [rest] * bool(rest), b""
            if rest:
                self.partial[pipe] = rest
            for line in lines:
                if out is sys.stderr:
                    self.last[index].append(line)
                    if line.startswith(_TRACEBACKS):
                        self.traced.setdefault(index, time.monotonic())
                out.write(f"[{index}] {line.decode(errors='replace')}\n")
            out.flush()

    def _signal(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, number)

    def _first_failure(self) -> int:
        """The others fail because of it, after it: whose traceback came first, or who ended first without one."""
        failed = [i for i, p in enumerate(self.processes) if p.returncode not in (None, 0)]
        return min(failed, key=lambda i: (self.traced.get(i, self.ended.get(i, 0.0)), i))

    def _report(self, index: int) -> int:
        status = self.processes[index].returncode
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with exit status {status}"
        print(f"ring-jax: process {index} of {len(self.processes)} {how}; the others were ended", file=sys.stderr)
        lines = list(self.last[index])
        begins = [i for i, line in enumerate(lines) if line.startswith(_TRACEBACKS)]
        for line in lines[begins[0] :] if begins else lines[-SHOWN:]:
            print(f"    {line.decode(errors='replace')}", file=sys.stderr)
        return 128 - status if status < 0 else status
