"""The command line: ``ring-jax COMMAND`` or ``python -m ring_jax COMMAND``.

A subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> exit status``, named in `COMMANDS` with its
line of help. It is imported only when asked for: what it needs may not be installed.

Exit status: 0 for success, 1 where something failed or disagreed, 2 for a command line that cannot run, 130 after Ctrl-C,
141 where the reader of the output has gone. A traceback means an error of ours.
"""

import argparse
import contextlib
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import jax

from ring_jax import __version__, _progress, distributed

COMMANDS = {
    "generate": (
        "ring_jax.commands.generate",
        "continue a text with a Qwen3.5 checkpoint, its prompt spread over all devices; without one, find a hidden pass key",
    ),
    "serve": ("ring_jax.commands.serve", "answer OpenAI's completions and chat API with a checkpoint"),
    "launch": ("ring_jax.commands.launch", "run a script, a module or a subcommand in several processes on this host"),
    "bench": ("ring_jax.commands.bench", "time kernels, rings and whole models on this host's GPUs"),
    "plan": ("ring_jax.commands.plan", "predict time, memory and traffic of a model over a mesh of GPUs"),
    "doctor": ("ring_jax.commands.doctor", "show versions, devices and what runs here; check it against the reference"),
}
INTERRUPTED, BROKEN_PIPE = 128 + signal.SIGINT, 128 + 13  # what shells report for these signals
GRACE = 1.0  # seconds that Python has to act on Ctrl-C


class CommandError(Exception):
    """What the user can put right: printed without a traceback, exit status 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: that of the process); returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a text may hold what the terminal cannot show; a pipe's reader wants lines
            stream.reconfigure(errors="replace", line_buffering=True)
    try:
        with _ctrl_c_ends_at_once():
            try:
                return _run(argv)
            finally:
                sys.stdout.flush()
    except CommandError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _forget_output()
        return BROKEN_PIPE
    except OSError as error:  # a full disk, a directory that may not be written
        _forget_output()
        return _fail(str(error), 1)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).splitlines()[0]
        return _fail(f"out of memory: spread the sequence over more devices, or take a shorter one ({first})", 1)


def parser_of(command: str | None) -> argparse.ArgumentParser:
    """The whole parser; only `command` gets its options, because they are in its module."""
    parser = argparse.ArgumentParser(prog="ring-jax", description="Ring attention for JAX.")
    parser.add_argument("--version", action="version", version=f"ring-jax {__version__}", help="show the version")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == command:
            _module(name).add_arguments(subparser)
    return parser


def _run(argv: Sequence[str]) -> int:
    args = parser_of(argv[0] if argv else None).parse_args(argv)
    with _progress.shown(quiet=getattr(args, "quiet", False)):
        return _module(args.command).run(args)


def _module(command: str) -> ModuleType:
    return importlib.import_module(COMMANDS[command][0])


def _fail(message: str, status: int) -> int:
    print(f"ring-jax: error: {message}", file=sys.stderr)
    return status


def _forget_output() -> None:
    """Nobody reads what is still to be flushed: Python would complain about that at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _ctrl_c_ends_at_once() -> Iterator[None]:
    """Ends the process on Ctrl-C also while XLA compiles or runs: Python acts only between two of its own steps."""
    if os.name != "posix" or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGINT and not over.wait(GRACE):
                os._exit(INTERRUPTED)
        os.close(reader)

    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.close(writer)


def find_devices() -> list[Any]:
    """The devices of all processes, eight emulated ones where jax has only a CPU; `CommandError` where it cannot start.

    Of several processes only the first one is heard on standard output.
    """
    use_all_devices()
    try:
        distributed.initialize()
    except (RuntimeError, TimeoutError, ValueError) as error:
        raise CommandError(str(error)) from error
    try:
        if jax.process_index():
            sys.stdout = open(os.devnull, "w")
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where a platform's plugin is missing
        platforms = os.environ.get("JAX_PLATFORMS", "")
        asked = f" of JAX_PLATFORMS={platforms}" if platforms else ""
        raise CommandError(f"jax finds no device{asked}: {error or 'is its plugin installed?'}") from error


def use_all_devices(emulated: int = 8) -> None:
    """Makes jax show `emulated` devices where it finds only a CPU, unless the user has chosen their number.

    Must run before jax touches a device; where one was touched already, the devices stay as they are.
    """
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or jax.config.values["jax_num_cpu_devices"] > 0:
        return
    try:
        jax.config.update("jax_num_cpu_devices", emulated)
    except RuntimeError:
        pass


def need(*modules: str) -> None:
    """Raises `CommandError` naming the extra to install where one of `modules` is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"needs {', '.join(missing)}: pip install 'ring-jax[cli]'")
