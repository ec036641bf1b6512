"""`ring-jax bench ring`: context-parallel attention in a jitted stack of layers.

Checks every strategy against the float32 reference first. Then times causal zigzag attention, forward and forward +
backward, in a scan over layers with keys and values of their own (dispatch is amortised, nothing is merged across
layers), on one GPU and on all of them, and reports the speed-up over one GPU with the same block. With --alone one GPU
suffices: it does what one rank would, without the transfer (so its results are wrong, and not checked), which is how fast the
ranks could be at best.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ring_jax
from ring_jax._arrays import on_host
from ring_jax.bench import trace
from ring_jax.bench.attention import environment, write_json
from ring_jax.bench.flash_forward import relative_error
from ring_jax.context.shard import Shard
from ring_jax.context.strategies import STRATEGIES
from ring_jax.flash import reference
from ring_jax.flash.kv import pack
from ring_jax.flash.operands import BlockOptions, Bounds

T = TypeVar("T")


def stack(context, is_causal: bool, layers: int, gradients: bool, implementation: str | None = None):
    """f(query, keys [L, ...], values [L, ...]): `layers` attention layers, each reading the last one's output."""

    def forward(query, keys, values):
        def layer(query, kv):
            out = ring_jax.ring_attention(
                query, *kv, is_causal=is_causal, context=context, implementation=implementation
            )
            return out, None

        return jax.lax.scan(layer, query, (keys, values), length=layers)[0]

    if not gradients:
        return jax.jit(forward)
    # The sum of squares has a cotangent that is data, not a constant.
    return jax.jit(jax.grad(lambda *args: jnp.sum(forward(*args).astype(jnp.float32) ** 2), argnums=(0, 1, 2)))


def make_context(ranks: int, strategy: str) -> ring_jax.ContextParallel:
    devices = jax.devices() if ranks > 1 else jax.local_devices()  # of several processes each times its own one
    mesh = jax.make_mesh((ranks,), ("context",), axis_types=(AxisType.Auto,), devices=devices[:ranks])
    return ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh, strategy=strategy)


def draw(context, length, heads, kv_heads, head_size, layers, dtype=jnp.bfloat16):
    """Random inputs, made where they live."""
    seq = NamedSharding(context.mesh, P(None, "context"))
    stacked = NamedSharding(context.mesh, P(None, None, "context"))
    shapes = [((1, length, heads, head_size), seq)] + [((layers, 1, length, kv_heads, head_size), stacked)] * 2
    keys = jax.random.split(jax.random.key(length), 3)
    return tuple(
        jax.jit(lambda k, shape=shape: jax.random.normal(k, shape, dtype), out_shardings=sharding)(key)
        for key, (shape, sharding) in zip(keys, shapes, strict=True)
    )


def check(
    ranks: int,
    strategy: str,
    heads: int,
    kv_heads: int,
    head_size: int,
    length: int = 1000,
    implementation: str | None = None,
) -> float:
    """Relative L2 error of out and all gradients (the worst) against the float32 reference; length does not divide."""
    context = make_context(ranks, strategy)
    rng = jax.random.split(jax.random.key(7), 4)
    shapes = [(1, length, n, head_size) for n in (heads, kv_heads, kv_heads, heads)]
    query, key, value, dout = (jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(rng, shapes, strict=True))

    def ours(query, key, value):
        laid = (context.to_layout(x) for x in (query, key, value))
        out = ring_jax.ring_attention(
            *laid, is_causal=True, context=context, seq_len=length, implementation=implementation
        )
        return context.from_layout(out, length)

    def theirs(query, key, value):
        start, end = ring_jax.causal().interval(q_len=length, kv_len=length)
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
        options = BlockOptions(head_size**-0.5)
        return reference.forward(query, pack(key, value), Bounds(start, end), None, options)[0]

    @functools.partial(jax.jit, static_argnums=0)
    def everything(f, query, key, value, dout):
        out, pull = jax.vjp(f, query, key, value)
        return out, *pull(dout.astype(out.dtype))

    pairs = zip(*(everything(f, query, key, value, dout) for f in (ours, theirs)), strict=True)
    return max(relative_error(on_host(a), on_host(b)) for a, b in pairs)


def milliseconds(f, args, layers: int, repeats: int, queued: int = 3) -> float:
    """Median time per layer of calls queued behind each other, so that their dispatch does not count."""
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready([f(*args) for _ in range(queued)][-1])
        times.append((time.perf_counter() - begin) / layers / queued)
    return 1e3 * statistics.median(times)


class NoTransfer(Shard):
    """A rank that keeps what it should send on: results are wrong, times are those of the blocks alone."""

    def shift(self, tree: T) -> T:
        return tree


class Alone(NoTransfer):
    """Rank 1 without the others; a gather is a copy, and so costs a little."""

    def rank(self) -> jax.Array:
        return jax.lax.optimization_barrier(jnp.int32(1))  # not a constant, or XLA would know the bounds

    def gather(self, x: jax.Array, along: int | None = None) -> jax.Array:
        copies = [x] * self.ranks
        return jax.lax.optimization_barrier(jnp.stack(copies) if along is None else jnp.concatenate(copies, along))

    def sum_scatter(self, x: jax.Array, along: int | None = None) -> jax.Array:
        return x[1] if along is None else jnp.split(x, self.ranks, along)[1]


@dataclasses.dataclass(frozen=True)
class WithoutTransfer(ring_jax.ContextParallel):
    """A context whose ranks rotate nothing. With `alone`, one device does what rank 1 of so many would."""

    alone: int | None = None

    def ranks(self, like: jax.Array | None = None) -> int:
        return self.alone or super().ranks(like)

    def shard(self, length: int, like: jax.Array | None = None) -> Shard:
        return (Alone if self.alone else NoTransfer)(self.axis, self.ranks(like), self.layout, length)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[8192, 16384, 32768],
        metavar="S",
        help="tokens in all (default: 8192 16384 32768)",
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=None, help="GPUs to spread over (default: all)")
    parser.add_argument(
        "--strategies", nargs="+", default=["ring", "auto"], choices=["auto", *STRATEGIES], help="default: ring auto"
    )
    parser.add_argument("--heads", type=int, default=32, metavar="N", help="query heads (default: 32)")
    parser.add_argument("--kv-heads", type=int, default=8, metavar="K", help="key-value heads (default: 8)")
    parser.add_argument("--head-size", type=int, default=128, metavar="H", help="size of a head (default: 128)")
    parser.add_argument("--layers", type=int, default=8, metavar="L", help="of the stack (default: 8)")
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="runs of each, the median counts (default: 5)"
    )
    parser.add_argument("--full", action="store_true", help="bidirectional instead of causal")
    parser.add_argument(
        "--gradients", choices=["no", "yes", "both"], default="both", help="with the backward? (default: both)"
    )
    parser.add_argument("--implementation", help="block backend (default: what ring_jax picks)")
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="do not compare with the reference first"
    )
    parser.add_argument("--no-transfer", action="store_true", help="time the ring with its transfer left out, too")
    parser.add_argument(
        "--alone",
        action="store_true",
        help="on one GPU, time what one of --ranks does without transfer (ring and all_gather; nothing is checked)",
    )
    parser.add_argument(
        "--profile", action="store_true", help="trace one run of each: transfer hidden, longest kernels"
    )
    parser.add_argument(
        "--table", choices=["pr39875"], help="the shapes of vLLM pull request 39875, its figures beside ours"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no new measurement after this long")
    parser.add_argument("--png", metavar="FILE", help="draw the last timeline of --profile here")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")


def unavailable(args: argparse.Namespace) -> str | None:
    """Why this host cannot run the benchmark, or None."""
    devices = jax.devices()
    found = f"found {len(devices)} x {devices[0].device_kind}"
    if devices[0].platform != "gpu":
        return f"needs GPUs, {found}"
    if args.alone:
        if not args.ranks or args.table or not {*args.strategies} <= {"ring", "all_gather", "auto"}:
            return "--alone needs --ranks, of how many to time one, no --table, and of --strategies ring, all_gather or auto"
    elif len(devices) < 2:
        return f"needs at least two GPUs (one suffices for --alone), {found}"
    return None


def run(args: argparse.Namespace) -> int:
    args.ranks = args.ranks or [len(jax.devices())]
    if args.table:
        vars(args).update(lengths=[4096, 8192, 16384, 32768], heads=32, kv_heads=8, head_size=128, gradients="no")
        args.ranks = [ranks for ranks in (2, 4, 8) if ranks <= len(jax.devices())]
    for strategy in args.strategies if args.check and not args.alone else ():
        shape = (args.heads, args.kv_heads, args.head_size)
        error = check(max(args.ranks), strategy, *shape, implementation=args.implementation)
        print(f"check {strategy}, {max(args.ranks)} ranks, 1000 tokens: worst relative error {error:.1e}", flush=True)
        if not error < 2e-2:
            print(f"{strategy} disagrees with the reference: nothing is timed")
            return 1
    report: dict[str, Any] = {"environment": environment(), "arguments": vars(args), "rows": []}
    deadline = time.perf_counter() + args.seconds
    masks = (True, False) if args.table else (args.full,)
    for full in masks:
        for gradients in {"no": (False,), "yes": (True,), "both": (False, True)}[args.gradients]:
            for length in args.lengths:
                base = None
                for ranks, strategy, transfer in _runs(args):
                    if time.perf_counter() > deadline:
                        break
                    row = measure(args, full, gradients, length, ranks, strategy, transfer)
                    base = base or row["ms_per_layer"]
                    row["speed_up"] = base / row["ms_per_layer"]
                    report["rows"].append(row)
                    show(row, args.layers)
                    if jax.process_index() == 0:
                        write_json(args.json, report)
    if args.table:
        print_table(report["rows"])
    return 0


def _runs(args) -> list[tuple[int, str, bool]]:
    runs = [(1, "ring", True)]
    for ranks in args.ranks:
        runs += [(ranks, strategy, not args.alone) for strategy in args.strategies]
        runs += [(ranks, "ring", False)] if args.no_transfer and not args.alone else []
    return runs


def measure(
    args, full: bool, gradients: bool, length: int, ranks: int, strategy: str, transfer: bool
) -> dict[str, Any]:
    """One row: time per layer, and with --profile what the trace says."""
    alone = ranks if args.alone and ranks > 1 else None
    context = make_context(1 if alone else ranks, strategy)
    mesh = context.mesh
    shape = length // (alone or 1), args.heads, args.kv_heads, args.head_size, args.layers
    operands = draw(context, *shape)
    if not transfer:
        context = WithoutTransfer(
            "context", layout="zigzag", mesh=None if alone else mesh, strategy=strategy, alone=alone
        )
    f = stack(context, not full, args.layers, gradients, args.implementation)
    if alone:
        f = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    ms = milliseconds(f, operands, args.layers, args.repeats)
    activities = trace.record(functools.partial(f, *operands)) if args.profile else []
    flops = 4 * length**2 * args.heads * args.head_size * (1 if full else 0.5) * (3.5 if gradients else 1)
    row = {
        "what": "forward+backward" if gradients else "forward",
        "mask": "full" if full else "causal",
        "length": length,
        "ranks": ranks,
        "strategy": ("one GPU" if ranks == 1 else strategy) + ("" if transfer else ", no transfer"),
        "alone": alone is not None,
        "ms_per_layer": ms,
        "tflops_per_gpu": flops / ms / 1e9 / ranks,
    }
    if activities:
        row["profile"] = [activity.summary() for activity in activities]
        if args.png and ranks > 1 and jax.process_index() == 0:
            middle = activities[0].length / 2
            title = f"{row['what']}, {row['mask']}, {length} tokens, {row['strategy']} over {ranks} GPUs: two layers"
            trace.draw(activities, args.png, title, (middle, middle + 2 * ms))
    return row


def show(row: dict[str, Any], layers: int) -> None:
    print(
        f"{row['what']:17s} {row['mask']:6s} {row['length']:7d} tokens, "
        f"{'one of ' * row['alone']}{row['ranks']} GPU(s), {row['strategy']:18s}"
        f"{row['ms_per_layer']:9.3f} ms a layer, {row['speed_up']:5.2f}x, {row['tflops_per_gpu']:4.0f} TFLOP/s each",
        flush=True,
    )
    for facts in row.get("profile", [])[:1]:
        print(
            f"    {facts['device']}: transfer {facts['transfer_ms'] / layers:.3f} ms a layer, {facts['hidden_share']:.1%} hidden; "
            f"idle {facts['idle_share']:.1%}"
        )
        for kernel in facts["kernels"]:
            print(f"        {kernel['ms'] / layers:.4f} ms {kernel['calls']:5d} x {kernel['name']}")


# Speed-up over one GPU (MI300X) at 2, 4 and 8 ranks: vLLM pull request 39875.
PR39875 = {
    ("full", 8192): (1.44, 1.71, 1.32), ("full", 16384): (1.85, 2.82, 3.51), ("full", 32768): (1.94, 3.69, 5.22),
    ("causal", 8192): (0.94, 1.02, 0.78), ("causal", 16384): (1.19, 1.54, 1.92), ("causal", 32768): (1.21, 2.03, 2.91),
}  # fmt: skip


def print_table(rows: list[dict[str, Any]]) -> None:
    """Ours beside the pull request's: each the speed-up over one GPU of its own kind with its own block."""
    best: dict[tuple[str, int, int], float] = {}
    for row in rows:
        if row["ranks"] > 1:
            key = row["mask"], row["length"], row["ranks"]
            best[key] = max(best.get(key, 0.0), row["speed_up"])
    print("\n| mask | length | ranks | pull request 39875, MI300X | ring_jax |\n| --- | --- | --- | --- | --- |")
    for (mask, length, ranks), ours in best.items():
        theirs = dict(zip((2, 4, 8), PR39875.get((mask, length), ()), strict=False)).get(ranks)
        print(f"| {mask} | {length} | {ranks} | {f'{theirs:.2f}x' if theirs else '-'} | {ours:.2f}x |")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    raise SystemExit(run(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
