"""The command line: ``ring-jax COMMAND`` or ``python -m ring_jax COMMAND``.

A subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> exit status``, named in `COMMANDS` with its
line of help. It is imported only when asked for: what it needs may not be installed.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence

import jax

COMMANDS = {
    "generate": (
        "ring_jax.commands.generate",
        "continue a text with a Qwen3.5 checkpoint, its prompt spread over all devices; without one, find a hidden pass key",
    ),
    "bench": ("ring_jax.commands.bench", "time attention on this host's GPUs, beside cuDNN and over ranks"),
    "doctor": ("ring_jax.commands.doctor", "show versions, devices and what runs here; check it against the reference"),
}


class CommandError(Exception):
    """What the user can put right: printed without a traceback, exit status 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: that of the process); returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="ring-jax", description="Ring attention for JAX.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, summary) in COMMANDS.items():
        # The full parser of a command needs its module, so only the command that was asked for gets one.
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name in argv[:1]:
            _module(name).add_arguments(subparser)
    args = parser.parse_args(argv)
    try:
        return _module(args.command).run(args)
    except CommandError as error:
        print(f"ring-jax {args.command}: {error}", file=sys.stderr)
        return 2


def _module(command: str):
    return importlib.import_module(COMMANDS[command][0])


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
