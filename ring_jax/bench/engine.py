"""`ring-jax bench engine`: the engine on a whole Qwen3.5 with random weights or a checkpoint's.

Four measures. Prefill in chunks, beside one chunk that holds the whole prompt. The time to the first token of a prompt whose beginning is
cached, beside one that is not. Decode of many rows, as tokens a second of all of them. And the host's share: time in `step` that is not
spent waiting for the devices, and how much of it is hidden by them.
"""

import argparse
import dataclasses
import gc
import statistics
import time
from typing import Any

import jax
import numpy as np

from ring_jax.bench.attention import environment, write_json
from ring_jax.bench.model import make_model
from ring_jax.bench.trace import record
from ring_jax.inference import Engine
from ring_jax.models.qwen3_5 import Config
from ring_jax.models.qwen3_5.config import PRESETS

_READ = 2e-4  # seconds: reading results that are there takes less


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="qwen3.5-9b", choices=sorted(PRESETS), help="sizes; weights are random")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="a Hugging Face checkpoint instead of a preset")
    parser.add_argument("--layers", type=int, help="only so many layers of a preset")
    parser.add_argument("--prompt", type=int, default=131072, metavar="S", help="tokens of the long prompt")
    parser.add_argument("--chunk", type=int, default=16384, metavar="T", help="of it")
    parser.add_argument("--question", type=int, default=1024, metavar="S", help="new tokens after a cached prompt")
    parser.add_argument("--rows", type=int, default=32, help="of decode")
    parser.add_argument("--row-length", type=int, default=8192, metavar="S", help="tokens of each of these")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="decoded of each of these")
    parser.add_argument("--decode-steps", type=int, default=8, metavar="N", help="tokens a dispatch")
    parser.add_argument("--ranks", type=int, default=1, help="devices to spread the sequence over")
    parser.add_argument("--only", choices=("prefill", "decode"), help="one of the two parts")
    parser.add_argument("--repeats", type=int, default=3, help="measurements, of which the median counts (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")


def unavailable(args: argparse.Namespace) -> str | None:
    """Why this host cannot run the benchmark, or None."""
    devices = jax.devices()
    return None if len(devices) >= args.ranks else f"needs {args.ranks} devices, found {len(devices)}"


def run(args: argparse.Namespace) -> int:
    config = Config.from_hf(args.checkpoint) if args.checkpoint else Config.preset(args.preset)
    if args.layers:
        config = dataclasses.replace(config, num_layers=args.layers, layer_types=())
    model = make_model(config, argparse.Namespace(**vars(args) | {"remat": "none"}))
    report: dict[str, Any] = {"environment": environment(), "arguments": vars(args), "figures": {}}
    for measure in (prefill, decode):
        if args.only not in (None, measure.__name__):
            continue
        found = measure(model, args)
        report["figures"] |= found
        for name, value in found.items():
            print(f"{name:<40}{value:>14,.3f}", flush=True)
    write_json(args.json, report)
    return 0


def prefill(model: Any, args: argparse.Namespace) -> dict[str, float]:
    """Seconds to the first token of a long prompt: in one chunk, in several, and with all but the question cached."""
    tokens = _tokens(model, args.prompt + args.question)
    rounded = -(-args.prompt // args.chunk) * args.chunk
    whole = _first_token(_engine(model, args, rows=1, tokens=2 * rounded, chunk=rounded), tokens[: args.prompt], args)
    engine = _engine(model, args, rows=1, tokens=4 * rounded, chunk=args.chunk)
    chunked = _first_token(engine, tokens[: args.prompt], args)
    cold = _first_token(engine, tokens, args, salt="with the question")
    list(engine.submit(tokens[: args.prompt], max_new_tokens=1, stop_ids=()))
    hits = []
    for number in range(args.repeats + 1):  # the first compiles
        question = [*tokens[: args.prompt], *_tokens(model, args.question, seed=number + 1)]
        seconds, request = _timed(engine, question)
        assert request.hit_tokens >= args.prompt - 1, request
        hits.append(seconds)
    hit = statistics.median(hits[1:])
    return {
        "prefill in one chunk, s": whole,
        "prefill in chunks, s": chunked,
        "chunked over one chunk": chunked / whole,
        "first token, nothing cached, s": cold,
        "first token, all but the question, s": hit,
        "hit over cold": hit / cold,
    }


def decode(model: Any, args: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of rows of equal length, the first decode left out. All rows must be there to the end, so the first ones
    may have as many tokens more as they decode while the last ones are prefilled.

    The host's work of a step is hidden if it then has to wait for the decode before: the next one was queued behind that already.
    """
    most = (args.rows + 4) * args.decode_steps + 2 * args.new_tokens
    room = args.row_length + most
    engine = _engine(model, args, rows=args.rows, tokens=args.rows * room, chunk=min(args.chunk, 8192))
    options: dict[str, Any] = {"max_new_tokens": most, "stop_ids": ()}
    requests = [engine.submit(_tokens(model, args.row_length, seed=n), **options) for n in range(args.rows)]
    while not all(request.tokens for request in requests):
        engine.step()
    decoded = lambda: sum(len(request.tokens) for request in requests)  # noqa: E731
    counted, seconds, host, hidden = decoded(), 0.0, 0.0, 0.0
    while decoded() - counted < args.rows * args.new_tokens:
        before, begin = engine.stats().seconds_waiting, time.perf_counter()
        engine.step()
        step, waiting = time.perf_counter() - begin, engine.stats().seconds_waiting - before
        seconds, host = seconds + step, host + step - waiting
        hidden += (step - waiting) * (waiting > _READ)
    assert not any(request.done for request in requests), "rows ended early"
    new = decoded() - counted
    devices = jax.devices()[: args.ranks]
    found = _merging(engine, devices) if args.ranks > 1 and devices[0].platform == "gpu" else {}
    for request in requests:
        request.cancel()
    engine.run()
    return {
        f"decode, tokens/s of {args.rows} rows": new / seconds,
        "a step of all rows, ms": 1e3 * seconds / max(new / args.rows, 1e-9),
        "host's share of the time": host / seconds,
        "of it hidden behind the devices": hidden / host,
    } | found


def _merging(engine: Engine, devices: list[Any]) -> dict[str, float]:
    """Of two traced dispatches, the largest part of a GPU's time in which data travels, all of it to merge the ranks' partial
    results; what one GPU waits for another counts too."""

    def dispatches() -> list[jax.Array]:
        for _ in range(2):
            engine.step()
        return [jax.device_put(0, device) + 1 for device in devices]  # done when all before it is

    return {"merging over ranks, share of the time": max(activity.transfer_share for activity in record(dispatches))}


def _engine(model: Any, args: argparse.Namespace, *, rows: int, tokens: int, chunk: int) -> Engine:
    gc.collect()  # the pool of the engine before this one: handles and engine hold each other
    page = 64 * args.ranks
    return Engine(
        model,
        rows=rows,
        chunk=chunk,
        pages=-(-tokens // page) + rows,
        page=64,
        snapshots=16,
        decode_steps=args.decode_steps,
    )


def _tokens(model: Any, length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, length).tolist()


def _first_token(engine: Engine, tokens: list[int], args: argparse.Namespace, salt: str = "") -> float:
    """The median of several; each under a salt of its own, so that nothing is cached, and the first, which compiles, not counted."""
    times = []
    for number in range(args.repeats + 1):
        seconds, request = _timed(engine, tokens, salt=f"cold {salt}{number}")
        assert not request.hit_tokens, request
        times.append(seconds)
    return statistics.median(times[1:])


def _timed(engine: Engine, tokens: list[int], salt: str = ""):
    begin = time.perf_counter()
    request = engine.submit(tokens, max_new_tokens=1, stop_ids=(), salt=salt)
    engine.run()
    return time.perf_counter() - begin, request
