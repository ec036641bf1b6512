"""`python -m ring_jax.bench.ring`: context-parallel attention in a jitted stack of layers.

Checks every strategy against the float32 reference first. Then times causal zigzag attention, forward and forward +
backward, in a scan over layers with keys and values of their own (dispatch is amortised, nothing is merged across
layers), on one GPU and on all of them, and reports the speed-up over one GPU with the same block.
"""

import argparse
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ring_jax
from ring_jax.bench import trace
from ring_jax.bench.flash_forward import relative_error
from ring_jax.flash import reference
from ring_jax.flash.packed import pack


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
    mesh = jax.make_mesh((ranks,), ("context",), axis_types=(AxisType.Auto,), devices=jax.devices()[:ranks])
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
        return reference.forward(query, pack(key, value), start, end, None, scale=head_size**-0.5)[0]

    @functools.partial(jax.jit, static_argnums=0)
    def everything(f, query, key, value, dout):
        out, pull = jax.vjp(f, query, key, value)
        return out, *pull(dout.astype(out.dtype))

    pairs = zip(*(everything(f, query, key, value, dout) for f in (ours, theirs)), strict=True)
    return max(relative_error(a, b) for a, b in pairs)


def milliseconds(f, args, layers: int, repeats: int) -> float:
    """Median time per layer."""
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append((time.perf_counter() - begin) / layers)
    return 1e3 * statistics.median(times)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--ranks", type=int, nargs="+", default=[len(jax.devices())])
    parser.add_argument("--strategies", nargs="+", default=["ring", "all_gather"])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="bidirectional instead of causal")
    parser.add_argument("--implementation", help="block backend (default: what ring_jax picks)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no new measurement after this long")
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="do not compare with the reference first"
    )
    parser.add_argument("--gradients", choices=["no", "yes", "both"], default="both")
    parser.add_argument(
        "--profile", action="store_true", help="trace one run of each: transfer hidden, longest kernels"
    )
    parser.add_argument("--png", help="with --profile: draw the last timeline to this file")
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args(argv)
    begin, rows = time.perf_counter(), []
    shape = (args.heads, args.kv_heads, args.head_size)
    for strategy in args.strategies if args.check else ():
        error = check(max(args.ranks), strategy, *shape, implementation=args.implementation)
        print(f"check {strategy}, {max(args.ranks)} ranks, 1000 tokens: worst relative error {error:.1e}", flush=True)
        if not error < 2e-2:
            raise SystemExit(f"{strategy} disagrees with the reference: {error}")
    for gradients in {"no": (False,), "yes": (True,), "both": (False, True)}[args.gradients]:
        for length in args.lengths:
            runs = [(1, "ring")] + [(ranks, strategy) for ranks in args.ranks for strategy in args.strategies]
            base = None
            for ranks, strategy in runs:
                if time.perf_counter() - begin > args.seconds:
                    break
                context = make_context(ranks, strategy)
                f = stack(context, not args.full, args.layers, gradients, args.implementation)
                operands = draw(context, length, *shape, args.layers)
                ms = milliseconds(f, operands, args.layers, args.repeats)
                base = base or ms
                flops = (
                    4 * length**2 * args.heads * args.head_size * (1 if args.full else 0.5) * (3.5 if gradients else 1)
                )
                row = {
                    "what": "forward+backward" if gradients else "forward", "length": length, "ranks": ranks,
                    "strategy": strategy if ranks > 1 else "one GPU", "ms_per_layer": ms, "speed_up": base / ms,
                    "tflops_per_gpu": flops / ms / 1e9 / ranks,
                }  # fmt: skip
                if args.profile:
                    activities = trace.record(functools.partial(f, *operands))
                    row["profile"] = [activity.summary() for activity in activities]
                    if args.png and activities:
                        middle = activities[0].length / 2
                        title = f"{row['what']}, {length} tokens, {row['strategy']}, {ranks} GPUs"
                        trace.draw(activities, args.png, title, (middle, middle + 2 * ms))
                rows.append(row)
                shown = [v for v in row.values() if not isinstance(v, list)]
                print(" ".join(f"{v:.3f}" if isinstance(v, float) else f"{v}" for v in shown), flush=True)
                for facts in row.get("profile", [])[:1]:
                    print(
                        f"    {facts['device']}: transfer {facts['transfer_ms'] / args.layers:.3f} ms a layer, "
                        f"{facts['hidden_share']:.1%} hidden; idle {facts['idle_share']:.1%}"
                    )
                    for kernel in facts["kernels"]:
                        print(f"        {kernel['ms'] / args.layers:.4f} ms {kernel['calls']:5d} x {kernel['name']}")
                if args.json:
                    with open(args.json, "w") as file:
                        json.dump(
                            {
                                "device": jax.devices()[0].device_kind,
                                "jax": jax.__version__,
                                "args": vars(args),
                                "rows": rows,
                            },
                            file,
                        )


if __name__ == "__main__":
    main()
