"""`ring-jax bench attention`: the Hopper flash-attention kernels beside cuDNN on one GPU, and with --peer fa4 beside FlashAttention-4.

Every case is first compared with the float32 reference on fresh random inputs. Times are of the device: many calls are
queued behind each other, and ours and cuDNN's take turns, so that heat hits both. TFLOP/s count the work that the mask
leaves: 4 H multiply-adds per query-key pair forward, 14 H forward and backward.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import time
import types
from typing import Any

import jax
import jax.numpy as jnp

from ring_jax.bench import flash_backward, flash_forward, torch_peers
from ring_jax.flash.hopper.backward_common import default_config
from ring_jax.flash.hopper.config import SHARED_MEMORY_BYTES, forward_config
from ring_jax.mosaic.device import hopper_reason

# What --tune tries, as changes of the checked-in config; what does not fit shared memory is left out.
FORWARD_CHANGES = [
    f"block_kv={block}/overlap={overlap}/tiles_per_block={tiles}"
    for block in (64, 80, 96, 128, 144, 160, 176, 192)
    for overlap in (True, False)
    for tiles in (1, 4)
]
FUSED_CHANGES = [
    f"block_q_dkv={rows}/pipeline_dkv={pipeline}/stages={stages}"
    for rows in (64, 128)
    for pipeline in (0, 1)
    for stages in (2, 3, 4)
] + [f"feed_registers={registers}" for registers in (64, 72, 80, 88, 96)]
# Of the two kernels that repeat: those for dK and dV, then for dQ.
TWO_KERNELS_CHANGES = [
    f"block_q_dkv={rows}/overlap={overlap}/stages={stages}"
    for rows in (32, 64, 128)
    for overlap in (0, 1)
    for stages in (1, 2)
] + [
    f"block_kv_dq={block}/slots={slots}/warpgroups_dq={warpgroups}"
    for block in (64, 96, 128)
    for slots in (3, 4, 8)
    for warpgroups in (2, 3)
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[8192, 32768], metavar="S", help="tokens (default: 8192 32768)"
    )
    parser.add_argument(
        "--masks",
        nargs="+",
        default=["full", "causal"],
        metavar="MASK",
        help="full, causal, window:W, documents:N, documents-full:N, hop:earlier, hop:later",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="rows (default: 1)")
    parser.add_argument("--heads", type=int, default=32, metavar="N", help="query heads (default: 32)")
    parser.add_argument("--kv-heads", type=int, default=8, metavar="K", help="key-value heads (default: 8)")
    parser.add_argument("--head-size", type=int, default=128, metavar="H", help="size of a head (default: 128)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="of all arrays")
    parser.add_argument("--only", choices=["forward", "backward"], help="default: forward, then forward + backward")
    parser.add_argument(
        "--forms",
        nargs="+",
        choices=flash_backward.FORMS,
        default=["default"],
        help="of the backward, as deterministic= asks for",
    )
    parser.add_argument(
        "--tune", action="store_true", help="search block sizes and stages around the checked-in config"
    )
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="do not compare with the reference first"
    )
    parser.add_argument(
        "--peer", choices=["fa4"], help="time FlashAttention-4, too, on full and causal masks, in its own process"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.05, help="device time of each of three rounds (default: 0.05)"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    parser.add_argument("--png", metavar="FILE", help="draw them here")


def unavailable(_: argparse.Namespace) -> str | None:
    """Why this host cannot run the benchmark, or None."""
    reason = hopper_reason()
    return f"times the Hopper kernels, and {reason.replace('needs', 'that needs', 1)}" if reason else None


def run(args: argparse.Namespace) -> int:
    peak = matmul_tflops(args.dtype)
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; 8192^3 {args.dtype} matrix product: {peak:.0f} TFLOP/s"
    )
    report: dict[str, Any] = {"environment": environment(), "matmul_tflops": peak, "rows": []}
    for length in args.lengths:
        for mask in args.masks:
            case = flash_forward.Case(args.batch, length, args.heads, args.kv_heads, args.head_size, mask)
            for what, rows in measure(case, args):
                best = max((row.get("tflops", 0) for row in rows if row["name"] != "cudnn"), default=0)
                for row in rows:
                    row |= {"what": what, "share_of_matmul": row.get("tflops", 0) / peak}
                    mark = " <- best" if args.tune and row.get("tflops") == best else ""
                    print(line(row) + mark, flush=True)
                report["rows"] += rows
                save(args, report)
            if args.peer and mask in ("full", "causal"):
                report["rows"] += peer(case, args, report)
                save(args, report)
    return 1 if any("error" in row.get("failure", "") for row in report["rows"]) else 0


def measure(case: flash_forward.Case, args: argparse.Namespace):
    """("forward", rows) and ("forward+backward", rows) of one case."""
    dtype, size = jnp.dtype(args.dtype), case.head_size
    if args.only != "backward":
        configs = {"ours": forward_config(size, size)} | (tuned_forward(size) if args.tune else {})
        yield "forward", flash_forward.measure(case, dtype, configs, dtype, args.seconds, args.check)
    if args.only != "forward":
        rows: list[dict[str, Any]] = []
        for form in args.forms:
            names = ["base"] + (tuned_backward(size, form) if args.tune else [])
            options = types.SimpleNamespace(
                configs=names, check=args.check, form=form, parts=False, seconds=args.seconds, peer=None
            )
            for row in flash_backward.measure(case, dtype, options):
                if row["name"] == "cudnn" and rows:
                    continue
                if form != "default" and row["name"] != "cudnn":
                    row["name"] = f"{form} {row['name']}"
                rows.append(row)
        yield "forward+backward", rows


def peer(case: flash_forward.Case, args: argparse.Namespace, report: dict[str, Any]) -> list[dict[str, Any]]:
    """FlashAttention-4 on the same case, printed with what our best one reaches of it."""
    rows = torch_peers.run(args.peer, args.dtype, [case.peer_shape])
    about = dataclasses.asdict(case)
    for row in rows:
        row["case"] = about
        if "kernels_ms" not in row:
            print(f"{row['name']}: {row['failure']}", flush=True)
            continue
        seconds, work = row["kernels_ms"] / 1e3, 1.0 if row["what"] == "forward" else 3.5
        row |= {"seconds": seconds, "tflops": work * case.flops() / seconds / 1e12}
        row["share_of_matmul"] = row["tflops"] / report["matmul_tflops"]
        own = [x for x in report["rows"] if (x["case"], x["what"]) == (about, row["what"]) and x["name"] != "cudnn"]
        best = max((x.get("tflops", 0.0) for x in own), default=0.0)
        print(f"{line(row)}; ours {best / row['tflops']:.2f} of it", flush=True)
    return rows


def tuned_forward(size: int) -> dict[str, Any]:
    found = flash_forward.candidates(size, FORWARD_CHANGES)
    return {name: c for name, c in found.items() if c.shared_memory_bytes(size, size) <= SHARED_MEMORY_BYTES}


def tuned_backward(size: int, form: str) -> list[str]:
    deterministic = flash_backward.FORMS[form]
    base = default_config(size, size, deterministic=deterministic)

    def fits(name: str) -> bool:
        try:
            config = flash_backward.candidates(size, [name], deterministic)[name]
            config.check(size, size)
        except ValueError:
            return False
        return config != base

    return [name for name in (FUSED_CHANGES if base.fused else TWO_KERNELS_CHANGES) if fits(name)]


def line(row: dict[str, Any]) -> str:
    case = row["case"]
    shape = (
        f"{case['heads']}/{case['kv_heads']} x {case['head_size']}, {case['batch']} x {case['length']} {case['mask']}"
    )
    head = f"{row['what']:17s} {shape:36s} {row['name']:44s}"
    if "tflops" not in row:
        return f"{head} {row.get('failure', 'not measured')}"
    ratio = f", {row['ratio_to_cudnn']:.2f} of cuDNN" if "ratio_to_cudnn" in row else ""
    return f"{head} {1e3 * row['seconds']:9.3f} ms {row['tflops']:6.0f} TFLOP/s, {row['share_of_matmul']:.0%} of matmul{ratio}"


def matmul_tflops(dtype: str, size: int = 8192) -> float:
    """What a plain matrix product of random values reaches: the ceiling to compare with."""
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, b))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready([product(a, b) for _ in range(20)])
        times.append((time.perf_counter() - begin) / 20)
    return 2 * size**3 / statistics.median(times) / 1e12


def environment() -> dict[str, Any]:
    """What a figure must be quoted with."""
    devices = jax.devices()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "platform": getattr(devices[0].client, "platform_version", ""),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def save(args: argparse.Namespace, report: dict[str, Any]) -> None:
    write_json(args.json, report)
    if args.png:
        draw(report, args.png)


def write_json(path: str | None, report: dict[str, Any]) -> None:
    """All figures so far, where a file was asked for."""
    if path:
        with open(path, "w") as file:
            json.dump(report, file, indent=1, default=str)


def draw(report: dict[str, Any], path: str) -> None:
    """Bars of ours and cuDNN's TFLOP/s for every case, and the matrix product as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = {"cuDNN": ("cudnn",), "ring_jax": ("ours", "base")}
    if others := {row["name"] for row in report["rows"] if row["name"].startswith("fa4")}:
        kinds["FlashAttention-4"] = tuple(others)
    labels = list(dict.fromkeys((row["what"], row["case"]["length"], row["case"]["mask"]) for row in report["rows"]))
    figure, axes = plt.subplots(figsize=(2 + 1.3 * len(labels), 4), layout="constrained")
    width = 0.8 / len(kinds)
    for i, (label, names) in enumerate(kinds.items()):
        found = {
            (row["what"], row["case"]["length"], row["case"]["mask"]): row.get("tflops", 0)
            for row in report["rows"]
            if row["name"] in names
        }
        axes.bar(
            [x + width * i for x in range(len(labels))],
            [found.get(key, 0) for key in labels],
            0.95 * width,
            label=label,
        )
    axes.axhline(report["matmul_tflops"], color="gray", linestyle="--", label="matrix product")
    texts = [f"{what.replace('forward', 'fwd').replace('backward', 'bwd')}\n{n} {mask}" for what, n, mask in labels]
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(labels))], texts)
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"attention, {report['environment']['device']}")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
