"""`ring-jax bench model`: prefill, decode and training of a whole Qwen3.5, with random weights or a checkpoint's.

Decode is first compared with prefill, in float32 on one group of the model's layers with random weights: a token decoded
after a prompt must have the logits that a prefill of one token more gives. Then every length is timed, calls queued
behind each other, and set beside what the GPU could do: prefill and training as a share of its bfloat16 peak, decode as a
share of the time that reading weights and cache once takes.

Model FLOPs are 2 x (parameters that a token meets, embedding and head left out) x tokens, causal attention
(2 S^2 N H a layer), and 1.7e11 for 32 heads of 128 x 128 and 32768 tokens of a gated delta rule. Training counts three
times that, the head included, and no recomputation.

--peer transformers times prefill and decode of the same sizes by transformers first, in a process of its own; with
XLA_PYTHON_CLIENT_PREALLOCATE=false this one leaves it memory.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType

import ring_jax
from ring_jax._hardware import BY_NAME
from ring_jax.bench import torch_peers, trace
from ring_jax.bench.attention import environment, write_json
from ring_jax.models.qwen3_5 import COMPILER_OPTIONS, Config, Qwen3_5, Sharding
from ring_jax.models.qwen3_5.config import FULL, LINEAR, PRESETS

GDN_FLOPS = 1.7e11 / (32768 * 32 * 128 * 128)  # of one token, value head, and entry of its state


def peaks() -> tuple[float, float] | None:
    """Dense bfloat16 FLOP/s and bytes a second of this GPU's memory; None where it is not in the table of hardware facts."""
    kind = jax.devices()[0].device_kind
    return next(((g.peak_flops, g.memory_bytes_per_s) for g in BY_NAME.values() if g.name in kind), None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="qwen3.5-9b", choices=sorted(PRESETS), help="sizes; weights are random")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="a Hugging Face checkpoint instead of a preset")
    parser.add_argument("--layers", type=int, help="only so many layers of a preset")
    parser.add_argument("--prefill", type=int, nargs="*", default=[8192, 32768], metavar="S", help="prompt lengths")
    parser.add_argument(
        "--decode", type=int, nargs="*", default=[1024, 32768], metavar="S", help="prompt lengths before"
    )
    parser.add_argument("--train", type=int, nargs="*", default=[], metavar="S", help="lengths of loss + gradient")
    parser.add_argument("--remat", default="attention", choices=["none", "full", "attention"], help="of --train")
    parser.add_argument("--batch", type=int, default=1, help="rows of the batch (default: 1)")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs to spread the sequence over")
    parser.add_argument("--steps", type=int, default=32, help="tokens decoded in one timing")
    parser.add_argument("--repeats", type=int, default=3, help="measurements, of which the median counts (default: 3)")
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="do not compare decode with prefill first"
    )
    parser.add_argument("--profile", action="store_true", help="trace one run of each: time by kind of kernel")
    parser.add_argument(
        "--peer", choices=["transformers"], help="time this package's model, too, where it is installed"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    parser.add_argument("--png", metavar="FILE", help="draw the last timeline of --profile here")


def unavailable(args: argparse.Namespace) -> str | None:
    """Why this host cannot run the benchmark, or None."""
    devices = jax.devices()
    if devices[0].platform != "gpu" or len(devices) < args.ranks:
        return f"needs {args.ranks} GPU(s), found {len(devices)} x {devices[0].device_kind}"
    return None


def run(args: argparse.Namespace) -> int:
    config = Config.from_hf(args.checkpoint) if args.checkpoint else Config.preset(args.preset)
    if args.layers:
        config = dataclasses.replace(config, num_layers=args.layers, layer_types=())
    if args.check:
        error = check(config, sharding(args.ranks))
        print(f"check: decode against prefill, relative error of the logits {error:.1e}", flush=True)
        if not error < 1e-3:
            print("decode disagrees with prefill: nothing is timed")
            return 1
    report: dict[str, Any] = {"environment": environment(), "arguments": vars(args), "rows": []}
    if args.peer:
        report["peer"] = peer(config, args)
        write_json(args.json, report)
    programs = Programs(make_model(config, args))
    measures = [(prefill, args.prefill), (decode, args.decode), (training, args.train)]
    for measure, lengths in measures:
        for length in lengths:
            row, activities = measure(programs, args, length)
            row |= {"gpus": args.ranks, "profile": [profile(activity) for activity in activities]}
            report["rows"].append(row)
            show(row)
            for other in report.get("peer", []):
                if (other.get("what"), other.get("length")) == (row["what"], length) and "ms" in other:
                    print(f"    {other['ms'] / row['ms']:.2f} times as fast as {other['name']}", flush=True)
            if args.png and activities:
                title = f"{row['what']}, {length} tokens, {args.ranks} GPU(s)"
                trace.draw([activity for activity, _ in activities], args.png, title)
            write_json(args.json, report)
    return 0


def peer(config: Config, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Prefill and decode of another package's model of the same sizes, on one GPU."""
    lengths = {"prefill": args.prefill, "decode": args.decode}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config.to_hf()))
        shapes = [f"{args.batch}x{what}x{length}x{path}" for what, found in lengths.items() for length in found]
        rows = torch_peers.run(args.peer, "bfloat16", shapes)
    for row in rows:
        if "shape" not in row:  # none ran
            print(f"{row['name']}: {row['failure']}", flush=True)
            continue
        row["length"] = int(row.pop("shape").split("x")[2])
        if "kernels_ms" in row:
            row["ms"] = row.pop("kernels_ms")
        outcome = row.get("failure") or f"{row['ms']:10.3f} ms"
        print(f"{row['what']:16s} {args.batch} x {row['length']:7d} tokens, {row['name']}: {outcome}", flush=True)
    return rows


def sharding(ranks: int) -> Sharding | None:
    """The sequence over so many GPUs."""
    if ranks == 1:
        return None
    kinds, devices = (AxisType.Auto,), jax.devices()[:ranks]
    mesh = jax.make_mesh((ranks,), ("context",), axis_types=kinds, devices=devices)
    return Sharding(ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh))


def make_model(config: Config, args: argparse.Namespace) -> Qwen3_5:
    options: dict[str, Any] = {"sharding": sharding(args.ranks), "remat": None if args.remat == "none" else args.remat}
    if args.checkpoint:
        return Qwen3_5.from_pretrained(args.checkpoint, dtype=jnp.bfloat16, **options)
    return Qwen3_5(config, rngs=nnx.Rngs(0), **options)


# -- what is run ---------------------------------------------------------------------------------------------------


class Programs:
    """The model's calls, jitted once; parameters are arguments."""

    def __init__(self, model: Qwen3_5):
        self.model = model
        program, self.params = model.split()  # plain dicts: calls with them cost the host least
        prefill = lambda p, tokens: _first(program(p, tokens, logits="last", cache_room=ROOM))  # noqa: E731
        self.prefill = jax.jit(prefill, compiler_options=COMPILER_OPTIONS)
        self.decode = jax.jit(lambda p, token, cache: _greedy(program.decode(p, token, cache)), donate_argnums=2)
        gradient = jax.value_and_grad(lambda p, tokens: program.loss(p, tokens))
        self.gradient = jax.jit(gradient, compiler_options=COMPILER_OPTIONS)


ROOM = 1024


def _first(out):
    return out.logits, jnp.argmax(out.logits, -1).astype(jnp.int32), out.cache


def _greedy(found):
    logits, cache = found
    return logits, jnp.argmax(logits, -1).astype(jnp.int32), cache


def draw_tokens(model: Qwen3_5, batch: int, length: int):
    return jax.random.randint(jax.random.key(length), (batch, length), 0, model.config.vocab_size, jnp.int32)


def check(config: Config, over: Sharding | None, length: int = 200) -> float:
    """Relative error of a decoded token's logits against those of a prefill that holds the token already."""
    kinds = config.layer_types[: config.period]
    config = dataclasses.replace(config, num_layers=len(kinds), layer_types=kinds, vocab_size=1024)
    with jax.default_matmul_precision("highest"):
        programs = Programs(Qwen3_5(config, rngs=nnx.Rngs(0), dtype=jnp.float32, sharding=over))
        tokens = draw_tokens(programs.model, 1, length + 1)
        _, _, cache = programs.prefill(programs.params, tokens[:, :length])
        found, _, _ = programs.decode(programs.params, tokens[:, length], cache)
        wanted, _, _ = programs.prefill(programs.params, tokens)
    return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))


def prefill(programs: Programs, args: argparse.Namespace, length: int):
    tokens = draw_tokens(programs.model, args.batch, length)
    call = lambda: programs.prefill(programs.params, tokens)[:2]  # noqa: E731
    seconds, compiled = timed(call, args.repeats)
    flops = args.batch * model_flops(programs.model.config, length)
    return _row("prefill", args, length, seconds, compiled, flops=flops), _traced(args, call)


def decode(programs: Programs, args: argparse.Namespace, length: int):
    tokens = draw_tokens(programs.model, args.batch, length)
    state = programs.prefill(programs.params, tokens)[1:]

    def call():
        nonlocal state
        for _ in range(args.steps):
            state = programs.decode(programs.params, *state)[1:]
        return state[0]

    if ROOM < (args.repeats + 2) * args.steps:
        raise ValueError(
            f"--steps {args.steps} x --repeats {args.repeats} decode more than {ROOM} tokens: fewer of them"
        )
    seconds, compiled = timed(call, args.repeats)
    read = bytes_read(programs.model, state[1], args.batch, args.ranks)
    row = _row("decode", args, length, seconds / args.steps, compiled, read=read)
    return row, _traced(args, call, args.steps)


def training(programs: Programs, args: argparse.Namespace, length: int):
    tokens = draw_tokens(programs.model, args.batch, length)
    call = lambda: programs.gradient(programs.params, tokens)  # noqa: E731
    seconds, compiled = timed(call, args.repeats)
    flops = 3 * args.batch * model_flops(programs.model.config, length, head=True)
    return _row("loss + gradient", args, length, seconds, compiled, flops=flops), _traced(args, call)


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median seconds of a call, and seconds of the first, which compiles."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    compiled, times = time.perf_counter() - begin, []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return statistics.median(times), compiled


def _traced(args, call, steps: int = 1) -> list[tuple[trace.Activity, int]]:
    return [(activity, steps) for activity in trace.record(call)] if args.profile else []


# -- what it is set beside -----------------------------------------------------------------------------------------


def model_flops(config: Config, length: int, *, head: bool = False) -> float:
    """FLOPs of a forward pass over one sequence."""
    layers = {kind: config.layer_types.count(kind) for kind in (FULL, LINEAR)}
    attention = layers[FULL] * 2 * length**2 * config.num_heads * config.head_dim
    state = config.linear.value_heads * config.linear.key_size * config.linear.value_size
    linear = layers[LINEAR] * GDN_FLOPS * length * state
    products = sum(size for name, size in sizes(config).items() if name not in ("embed", "lm_head"))
    products += config.vocab_size * config.hidden_size if head else 0
    return 2 * products * length + attention + linear


def sizes(config: Config) -> dict[str, float]:
    """Parameters that one token meets, by name."""
    found = nnx.to_flat_state(nnx.state(Qwen3_5(config, rngs=None), nnx.Param))
    return {
        ".".join(map(str, path)): x.get_value().size * _used(config, path) * _filled(config, path) for path, x in found
    }


def _used(config: Config, path: tuple) -> float:
    """The part of a parameter that one token meets: of routed experts its own, of everything else all."""
    routed = config.experts is not None and path[-2:] in (("mlp", "gate_up"), ("mlp", "down"))
    return config.experts.per_token / config.experts.count if routed else 1.0


def _filled(config: Config, path: tuple) -> float:
    """The part of a parameter that is no zeros behind the columns of a key head."""
    heads = config.linear
    by_head = path[-2:] == ("mixer", "in_proj") and config.layer_types[path[2]] != FULL
    return sum(heads.of_key_head) / heads.stride if by_head else 1.0


def bytes_read(model: Qwen3_5, cache: Any, batch: int, ranks: int) -> int:
    """Bytes that a GPU has to read in one step: all weights (of experts those that `batch` tokens are likely to meet, of an
    embedding that is not the head none) and states, and its share of the keys."""
    config, total = model.config, 0.0
    for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path != ("embed",) or config.tie_embeddings:
            part = _used(config, path)
            total += x.get_value().nbytes * (1 - (1 - part) ** batch if part < 1 else 1)
    return int(total + cache.prompt_kv.nbytes / ranks + cache.gdn.state.nbytes)


def _row(what: str, args, length: int, seconds: float, compiled: float, *, flops=None, read=None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "what": what,
        "length": length,
        "batch": args.batch,
        "ms": 1e3 * seconds,
        "first_s": compiled,
    }
    peak = peaks()
    if flops is not None:
        row |= {"tflops_per_gpu": flops / seconds / args.ranks / 1e12}
        row |= {"share_of_peak": flops / seconds / args.ranks / peak[0] if peak else None}
    if read is not None:
        row |= {"gigabytes_read": read / 1e9, "share_of_bandwidth": read / seconds / peak[1] if peak else None}
    memory = jax.devices()[0].memory_stats() or {}
    return row | {"peak_memory_gib": memory.get("peak_bytes_in_use", 0) / 2**30}


def profile(traced: tuple[trace.Activity, int]) -> dict[str, Any]:
    """What the trace of one GPU says, in milliseconds a call or a token."""
    activity, steps = traced
    facts = activity.summary()
    kinds = {kind: {key: x / steps for key, x in found.items()} for kind, found in activity.by_kind().items()}
    return facts | {"kinds": kinds, "steps": steps}


def show(row: dict[str, Any]) -> None:
    peak, bandwidth = row.get("share_of_peak"), row.get("share_of_bandwidth")
    beside = (
        f"{row['tflops_per_gpu']:.0f} TFLOP/s a GPU"
        if "tflops_per_gpu" in row
        else f"{row['gigabytes_read']:.2f} GB read"
    )
    beside += f", {peak:.1%} of peak" if peak else ""
    beside += f", {bandwidth:.1%} of the memory's bandwidth" if bandwidth else ""
    print(
        f"{row['what']:16s} {row['batch']} x {row['length']:7d} tokens, {row['gpus']} GPU(s): {row['ms']:10.3f} ms  {beside}; "
        f"first call {row['first_s']:.1f} s, at most {row['peak_memory_gib']:.1f} GiB",
        flush=True,
    )
    for facts in row["profile"][:1]:
        print(f"    {facts['device']}: idle {facts['idle_share']:.1%}, transfers {facts['hidden_share']:.1%} hidden")
        for kind, found in facts["kinds"].items():
            print(
                f"        {found['ms']:10.4f} ms, {found['alone_ms']:10.4f} alone, {found['calls']:9.1f} kernels  {kind}"
            )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    raise SystemExit(run(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
