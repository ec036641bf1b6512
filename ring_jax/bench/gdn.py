"""`ring-jax bench gdn`: the gated delta rule, the convolution before it and the decode step on one GPU, or the rule over ranks.

Every part is first compared with float64 on fresh random inputs. Times are of the device, from a profiler's trace: the kernels
of a call together, and in brackets from the first one's begin to the last one's end. The roofline beside them is the larger of
the FLOPs of chunks of 64 over the card's peak and of the bytes, each input and output moved once, over its bandwidth.

With --ranks the rule runs in a jitted stack of layers on the zigzag layout, on one GPU and by each way over so many, transfers
included. With --tune every config that fits is timed. --peer fla times the Triton kernels of flash-linear-attention on the
same shapes in a process of their own.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ring_jax
from ring_jax.bench import gdn_cases, torch_peers, trace
from ring_jax.bench.attention import environment, write_json
from ring_jax.bench.gdn_cases import Case, Part
from ring_jax.bench.model import peaks
from ring_jax.bench.ring import milliseconds
from ring_jax.gdn import gated_delta_rule
from ring_jax.gdn.cost import STRATEGIES
from ring_jax.mosaic.device import hopper_reason

SHAPES = ["1x32768x32", "1x32768x64", "1x8192x32", "4x8192x32"]
PARTS = ("forward", "backward", "convolution", "decode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="BxTxN", help="batch x length x value heads")
    parser.add_argument("--key-heads", type=int, default=16, metavar="K", help="key heads (default: 16)")
    parser.add_argument("--head-size", type=int, default=128, metavar="H", help="of keys and values (default: 128)")
    parser.add_argument(
        "--decode", type=int, nargs="+", default=[1, 32, 128], metavar="B", help="batches of a decode step"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="of keys and values")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--implementation", help="of the rule (default: what ring_jax picks)")
    parser.add_argument("--tune", action="store_true", help="time every config of the kernels")
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="C", help="GPUs to spread a sequence over, instead of the parts"
    )
    parser.add_argument(
        "--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES, help="over ranks (default: all)"
    )
    parser.add_argument("--layers", type=int, default=8, metavar="L", help="of the stack over ranks (default: 8)")
    parser.add_argument("--peer", choices=["fla"], help="time this package's forward, too")
    parser.add_argument("--no-check", dest="check", action="store_false", help="do not compare with float64 first")
    parser.add_argument("--repeats", type=int, default=10, help="calls in one timing (default: 10)")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")


def unavailable(args: argparse.Namespace) -> str | None:
    """Why this host cannot run the benchmark, or None."""
    if reason := hopper_reason():
        return f"times the Hopper kernels, and {reason.replace('needs', 'that needs', 1)}"
    if len(jax.devices()) < args.ranks:
        return f"--ranks {args.ranks} needs as many GPUs, found {len(jax.devices())}"
    return None


def run(args: argparse.Namespace) -> int:
    report: dict[str, Any] = {"environment": environment(), "arguments": vars(args), "rows": []}
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    cases = [Case.parse(text, args.key_heads, args.head_size) for text in args.shapes]
    rows = over_ranks(cases, args) if args.ranks > 1 else (measure(part, args) for part in parts(cases, args))
    for row in rows:
        report["rows"].append(row)
        print(line(row), flush=True)
        write_json(args.json, report)
    if args.peer:
        shapes = [f"{text}x{args.key_heads}x{args.head_size}" for text in args.shapes]
        report["peer"] = torch_peers.run(args.peer, args.dtype, shapes)
        for row in report["peer"]:
            print(line(row) if "kernels_ms" in row else f"{row['name']}: {row['failure']}", flush=True)
        write_json(args.json, report)
    return 1 if any("error" in row.get("failure", "") for row in report["rows"]) else 0


def parts(cases: list[Case], args: argparse.Namespace):
    """All that is to be timed on one GPU."""
    forward, backward, convolution, decode = (part in args.only for part in PARTS)
    for case in cases:
        if forward:
            yield gdn_cases.rule(case, args.implementation)
            yield from gdn_cases.tuned_rules(case) if args.tune else ()
        if backward:
            yield gdn_cases.rule_gradient(case, args.implementation)
    if convolution:
        for gradient in (False, True):
            yield gdn_cases.convolution(cases[0], gradient)
            yield from gdn_cases.tuned_convolutions(cases[0], gradient) if args.tune else ()
    if decode:
        for batch in args.decode:
            case = Case(batch, 1, cases[0].heads)
            yield gdn_cases.decode_step(case)
            yield from gdn_cases.tuned_decode_steps(case) if args.tune else ()


def measure(part: Part, args: argparse.Namespace) -> dict[str, Any]:
    """One row; a config that fails must not end the others."""
    row: dict[str, Any] = {"what": part.what, "name": part.name, "shape": part.case.text}
    dtype = jnp.dtype(args.dtype)
    try:
        if args.check:
            row["error"] = gdn_cases.check(part, dtype)
        operands = list(part.operands(part.case, dtype))
        donated = (len(operands) - 1,) if part.donates else ()
        compiled = jax.jit(part.run, donate_argnums=donated).lower(*operands).compile()

        def call():
            found = compiled(*operands)
            if part.donates:
                operands[-1] = found[-1]
                return found[0]
            return found

        times = trace.device_times(call, args.repeats)
        row |= {"kernels_ms": times["kernels_ms"] / part.calls, "span_ms": times["span_ms"] / part.calls}
        row["each_ms"] = {name: ms / part.calls for name, ms in times["each_ms"].items()}
        peak = peaks()
        row["roofline_ms"] = 1e3 * part.seconds_at_peak(*peak) if peak else None
    except Exception as failure:
        row["failure"] = f"{type(failure).__name__}: {failure}"[:600]
    return row


def over_ranks(cases: list[Case], args: argparse.Namespace):
    """A layer's time on one GPU, then by each way over the ranks."""
    for case in cases:
        single = None
        for ranks, way in [(1, "batch"), *((args.ranks, way) for way in args.strategies)]:
            row: dict[str, Any] = {"what": "forward", "shape": case.text, "ranks": ranks}
            row["name"] = "one GPU" if ranks == 1 else f"{way} over {ranks} GPUs"
            try:
                if args.check and ranks > 1:
                    row["error"] = check_way(case, ranks, way, jnp.dtype(args.dtype))
                ms, traced = time_way(case, ranks, way, args)
                single = single or ms
                row |= {"kernels_ms": ms, "speed_up": single / ms, "profile": traced}
            except Exception as failure:
                row["failure"] = f"{type(failure).__name__}: {failure}"[:600]
            yield row


def make_context(ranks: int) -> ring_jax.ContextParallel:
    kinds, devices = (AxisType.Auto,), jax.devices()[:ranks]
    mesh = jax.make_mesh((ranks,), ("context",), axis_types=kinds, devices=devices)
    return ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh)


def time_way(case: Case, ranks: int, way: str, args: argparse.Namespace) -> tuple[float, list[dict[str, Any]]]:
    """Milliseconds a layer of a stack whose values are the last layer's outputs; what a trace of it says."""
    context = make_context(ranks)
    spread = NamedSharding(context.mesh, P(None, "context"))
    q, k, v, g, b = (jax.device_put(x, spread) for x in gdn_cases.rule_operands(case, jnp.dtype(args.dtype)))

    @jax.jit
    def stack(q, k, v, g, b):
        def layer(v, _):
            rule = gated_delta_rule(q, k, v, g, b, context=context, strategy=way, implementation=args.implementation)
            return rule[0], None

        return jax.lax.scan(layer, v, length=args.layers)[0]

    ms = milliseconds(stack, (q, k, v, g, b), args.layers, max(3, args.repeats // 2))
    return ms, [activity.summary() for activity in trace.record(lambda: stack(q, k, v, g, b))]


def check_way(case: Case, ranks: int, way: str, dtype: Any) -> float:
    """Relative error of a way over ranks, at a length that does not divide, against float64 on one device."""
    context, part = make_context(ranks), gdn_cases.rule(case, None)

    def spread(*operands):
        length = operands[0].shape[1]
        laid = (context.to_layout(x) for x in operands)
        out, state = gated_delta_rule(*laid, context=context, strategy=way, seq_len=length)
        return context.from_layout(out, length), state

    heads = ring_jax.gdn.Heads(2 * ranks, 4 * ranks, case.heads.key_size, case.heads.value_size)
    changed = {"run": spread, "checked": Case(ranks, 777, heads), "name": way}
    return gdn_cases.check(gdn_cases.dataclasses.replace(part, **changed), dtype)


def line(row: dict[str, Any]) -> str:
    head = f"{row['what']:23s} {row['shape']:12s} {row['name']:48s}"
    if "kernels_ms" not in row:
        return f"{head} {row.get('failure', 'not measured')}"
    span = f" ({row['span_ms']:.4f})" if "span_ms" in row else ""
    roofline = f", roofline {row['roofline_ms']:.4f}" if row.get("roofline_ms") else ""
    speed_up = f", {row['speed_up']:.2f}x" if "speed_up" in row else ""
    error = f", error {row['error']:.1e}" if "error" in row else ""
    return f"{head} {row['kernels_ms']:9.4f}{span} ms{roofline}{speed_up}{error}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    raise SystemExit(run(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
