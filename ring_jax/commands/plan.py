"""``ring-jax plan``: what a model takes over a mesh of GPUs, and with ``--check`` how right that is on this machine."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import jax

from ring_jax.cli import CommandError, find_devices, need

CHECKED = 32768  # tokens, unless said otherwise
_UNITS = {"": 1, "K": 2**10, "M": 2**20}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="qwen3.5-9b",
        metavar="NAME",
        help="a preset, or a checkpoint's directory (default: qwen3.5-9b)",
    )
    parser.add_argument(
        "--tokens", type=tokens_of, metavar="S", help="length of a row, such as 32768, 128K or 1M (default: 128K)"
    )
    parser.add_argument(
        "--mesh",
        type=mesh_of,
        metavar="AXIS=N,...",
        help="such as context=8,data=8; axes: context, data, tensor, expert (default: one GPU)",
    )
    parser.add_argument("--gpu", choices=("h100", "h200"), help="default: this machine's with --check, else h100")
    parser.add_argument("--batch", type=int, metavar="B", help="rows in all (default: one for each data rank)")
    parser.add_argument("--strategy", default="auto", help="of attention (default: auto)")
    parser.add_argument("--gdn-strategy", default="auto", help="of the gated delta rule (default: auto)")
    parser.add_argument(
        "--weights",
        default="auto",
        help="axes that weights lie over besides: none, context, data, context,data (default: what fits)",
    )
    parser.add_argument("--png", metavar="FILE", help="draw the timeline of a group of layers here")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    parser.add_argument(
        "--check",
        action="store_true",
        help="measure every term and pass on this machine's GPUs, and print the errors (two to three minutes)",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="measurements of --check, of which the median counts (default: 3)"
    )


def tokens_of(text: str) -> int:
    """A number with K or M, of 1024 each."""
    found = re.fullmatch(r"(\d+)([KM]?)", text.strip().upper())
    if not found or int(found[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no length: write 32768, 128K or 1M")
    return int(found[1]) * _UNITS[found[2]]


def mesh_of(text: str) -> dict[str, int]:
    """``context=8,data=8`` as a dict."""
    mesh: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", part)
        if not found or found[1] in mesh:
            raise argparse.ArgumentTypeError(f"{text!r} is no mesh: write axes once each, such as context=8,data=8")
        mesh[found[1]] = int(found[2])
    return mesh


def run(args: argparse.Namespace) -> int:
    if args.png:
        need("matplotlib")
    if args.check:
        return _check(args)
    found = _predict(args, args.tokens or 2**17, args.gpu or "h100")
    print(found)
    missing = {name: memory for name, memory in found.memory.items() if not memory.fits}
    for what in missing:
        print(f"{what} does not fit: {_smallest(args, found, what)}")
    if args.png:
        from ring_jax import plot

        plot.timeline(found.prefill, path=args.png)
        print(f"picture: {args.png}")
    if args.json:
        Path(args.json).write_text(json.dumps(as_dict(found), indent=1))
    return 0


def _predict(args: argparse.Namespace, tokens: int, gpu: Any, **changes: Any) -> Any:
    from ring_jax import plan

    weights = args.weights if args.weights in ("auto", "none") else tuple(args.weights.split(","))
    options = {
        "mesh": args.mesh,
        "batch": args.batch,
        "strategy": args.strategy,
        "gdn_strategy": args.gdn_strategy,
        "weights": weights,
    }
    try:
        return plan.predict(args.model, tokens=tokens, gpu=gpu, **(options | changes))
    except (OSError, TypeError, ValueError, NotImplementedError) as error:
        raise CommandError(str(error)) from error


def _smallest(args: argparse.Namespace, found: Any, what: str) -> str:
    from ring_jax import plan

    mesh = plan.smallest_mesh(args.model, tokens=found.tokens, gpu=found.machine.gpu, what=what)
    if mesh is None:
        return "nor on any mesh of up to 4096 GPUs"
    return f"the smallest mesh over which it does, for one row: context={mesh['context']}"


def as_dict(found: Any) -> dict[str, Any]:
    """A plan as JSON takes it."""
    passes = {
        one.name: {"seconds": one.seconds, "terms": one.terms, "traffic": one.traffic, "hidden": one.hidden_share}
        for one in found.passes
    }
    about = {"model": found.model, "tokens": found.tokens, "batch": found.batch, "gpu": found.machine.gpu.name}
    memory = {name: memory.kinds | {"limit": memory.limit} for name, memory in found.memory.items()}
    return about | {"mesh": found.machine.mesh, "passes": passes, "memory": memory, "choices": found.choices}


def _check(args: argparse.Namespace) -> int:
    """Terms and passes on the GPUs here."""
    from ring_jax._hardware import BY_NAME
    from ring_jax.bench import terms
    from ring_jax.plan.machine import Machine

    devices = find_devices()
    kind = devices[0].device_kind
    name = args.gpu or next((name for name, gpu in BY_NAME.items() if gpu.name in kind), None)
    if devices[0].platform != "gpu" or name is None:
        raise CommandError(f"--check needs GPUs of {' or '.join(BY_NAME)}, found {len(devices)} x {kind}")
    ranks = (args.mesh or {"context": len(devices)}).get("context", 1)
    if ranks > len(devices) or set(args.mesh or {}) - {"context"}:
        raise CommandError(f"--check spreads one row over --mesh context=N, N up to {len(devices)} here")
    tokens = args.tokens or CHECKED
    said = _predict(args, tokens, name, mesh={"context": ranks}, weights="none")
    print(f"{said.model}, {tokens} tokens, {ranks} x {kind}, jax {jax.__version__}\n")
    print(f"{'':52s} {'plan':>10s} {'measured':>10s} {'error':>7s}", flush=True)
    rows = []
    from ring_jax.models.qwen3_5 import Config

    config = Config.preset(args.model) if not Path(args.model).is_dir() else Config.from_hf(args.model)
    for term in terms.compare(config, said.model, tokens, Machine.of({"context": ranks}, name), args.repeats):
        print(term, flush=True)
        rows.append(term._asdict() | {"error": term.error})
        if args.json:
            Path(args.json).write_text(
                json.dumps({"device": kind, "ranks": ranks, "tokens": tokens, "terms": rows}, indent=1)
            )
    return 0
