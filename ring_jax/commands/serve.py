"""``ring-jax serve``: a checkpoint behind OpenAI's completions and chat API, on all devices of this host.

Existing clients work: point them to http://HOST:PORT/v1 with any key.
"""

import argparse
from pathlib import Path
from typing import Any

from ring_jax.cli import CommandError, find_devices, need
from ring_jax.commands.progress import Progress
from ring_jax.data.passkey import MODEL


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint (default: the bundled model)")
    parser.add_argument("--name", metavar="NAME", help="what clients call it (default: the directory's name)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="(default: 8000)")
    parser.add_argument("--context-ranks", type=int, metavar="C", help="devices that share a text (default: all)")
    parser.add_argument("--rows", type=int, default=8, metavar="R", help="texts that run at once (default: 8)")
    parser.add_argument("--chunk", type=int, metavar="N", help="tokens of a prompt computed at a time (default: 8192)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="on each device, for keys and states")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the checkpoint's; float32 on CPUs")
    parser.add_argument("--shard-weights", action="store_true", help="spread the weights over the devices too")
    parser.add_argument("--no-warmup", dest="warmup", action="store_false", help="compile when a text first needs it")


def run(args: argparse.Namespace) -> int:
    need("tokenizers", "jinja2", "tqdm", "starlette", "uvicorn")
    import uvicorn

    app = _app(args)
    print(f"http://{args.host}:{args.port}/v1")
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
    return 0


def _app(args: argparse.Namespace) -> Any:
    devices = find_devices()
    from ring_jax.commands.session import Session, Settings
    from ring_jax.inference import Engine, Sampling
    from ring_jax.inference.server import make_app

    ranks = len(devices) if args.context_ranks is None else args.context_ranks
    if not 1 <= ranks <= len(devices):
        raise CommandError(f"--context-ranks {ranks}: this machine has {len(devices)} devices")
    settings = Settings(args.model or MODEL, args.dtype, args.shard_weights, Sampling(), 0)
    with Progress(2 if args.warmup else 1) as progress:
        session = Session.open(settings, ranks, progress)
        memory = None if args.memory is None else int(args.memory * 2**30)
        try:
            engine = Engine(session.model, rows=args.rows, chunk=args.chunk, memory=memory)
        except ValueError as error:
            raise CommandError(str(error)) from error
        if args.warmup:
            with progress.step("compile", "every program") as step:
                step.note = f"{engine.warmup()} programs"
    return make_app(engine, session.tokenizer, args.name or settings.directory.name)
