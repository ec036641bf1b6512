"""`ring-jax bench paged`: decode attention to paged keys on one GPU, against the bytes of the keys.

Every case is first compared with float32 on fresh random inputs. Times are of the device, from a
profiler's trace: all kernels of a call together, and in brackets the largest. A call reads one layer of a pool of several, each in
its turn, so that nothing is left in the GPU's cache. Bandwidth counts the visible keys and values once, against the card's peak;
sharing out the work and merging partial results are in the time. --peer times jax's own Triton kernel on the same pages.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ring_jax.bench import trace
from ring_jax.bench.attention import environment, write_json
from ring_jax.bench.model import peaks
from ring_jax.flash.hopper import paged_launch
from ring_jax.flash.operands import BlockOptions
from ring_jax.flash.paged import paged_attention
from ring_jax.mosaic.device import hopper_reason

BATCHES = ["32x16384", "32x16384r", "32x1024", "1x16384", "1x131072", "128x2048r"]
LEAST = 1 << 29  # bytes of a pool: several times the GPU's cache
# What --tune tries: keys of a block, stages, compute warpgroups.
CONFIGS = [(b, s, w) for b in (16, 32, 64, 128) for s in (2, 3, 4, 5, 6) for w in (1, 2)]


@dataclasses.dataclass(frozen=True)
class Case:
    """rows x length; `ragged` lengths lie anywhere up to it."""

    rows: int
    length: int
    ragged: bool
    heads: int
    kv_heads: int
    head_size: int
    page: int
    tokens: int

    @property
    def text(self) -> str:
        name = f"{self.rows} x {'up to ' if self.ragged else ''}{self.length}"
        return f"{name}, {self.heads}/{self.kv_heads} x {self.head_size}"

    @property
    def layers(self) -> int:
        of_layer = 4 * self.rows * self.length * self.kv_heads * self.head_size
        return max(2, math.ceil(LEAST / of_layer))

    def operands(self, dtype: Any, seed: int) -> tuple[jax.Array, ...]:
        """query, pages, table and lengths; pages of the rows in random order."""
        rng = np.random.default_rng(seed)
        width = -(-self.length // self.page)
        count = self.rows * width + 1
        table = rng.permutation(np.arange(1, count, dtype=np.int32)).reshape(self.rows, width)
        lengths = rng.integers(1, self.length + 1, self.rows) if self.ragged else np.full(self.rows, self.length)
        keys = jax.random.split(jax.random.key(seed), 2)
        shape = self.layers, 2, count, self.page, self.kv_heads, self.head_size
        pages = jax.jit(lambda key: jax.random.normal(key, shape, dtype))(keys[0])
        query = jax.random.normal(keys[1], (self.rows, self.tokens, self.heads, self.head_size), dtype)
        return query, pages, jnp.asarray(table), jnp.asarray(lengths, jnp.int32)

    def bytes(self, lengths: jax.Array, itemsize: int) -> int:
        return 2 * int(np.sum(np.asarray(lengths, np.int64))) * self.kv_heads * self.head_size * itemsize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batches",
        type=batch,
        nargs="+",
        default=[batch(text) for text in BATCHES],
        metavar="RxS",
        help="rows x keys; with r behind them rows have any length up to it",
    )
    parser.add_argument("--heads", type=int, default=16, metavar="N", help="query heads (default: 16)")
    parser.add_argument("--kv-heads", type=int, default=4, metavar="K", help="key-value heads (default: 4)")
    parser.add_argument("--head-size", type=int, default=256, metavar="H", help="size of a head (default: 256)")
    parser.add_argument("--page", type=int, default=64, metavar="p", help="slots of a page (default: 64)")
    parser.add_argument("--tokens", type=int, default=1, metavar="T", help="new tokens of a row (default: 1)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="of all arrays")
    parser.add_argument("--implementations", nargs="+", default=["mosaic", "xla"], help="default: mosaic xla")
    parser.add_argument("--tune", action="store_true", help="time every config of the kernel")
    parser.add_argument("--peer", action="store_true", help="time jax's Triton kernel, too (one token)")
    parser.add_argument("--no-check", dest="check", action="store_false", help="do not compare with float32 first")
    parser.add_argument("--repeats", type=int, default=10, help="calls in one timing (default: 10)")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")


def batch(text: str) -> tuple[int, int, bool]:
    """rows, length, whether they are ragged."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(r?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be like 32x16384 or 32x16384r, got {text}")
    return int(match[1]), int(match[2]), match[3] == "r"


def unavailable(_: argparse.Namespace) -> str | None:
    """Why this host cannot run the benchmark, or None."""
    reason = hopper_reason()
    return f"times the Hopper kernel, and {reason.replace('needs', 'that needs', 1)}" if reason else None


def run(args: argparse.Namespace) -> int:
    report: dict[str, Any] = {"environment": environment(), "rows": []}
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    for sizes in args.batches:
        case = Case(*sizes, args.heads, args.kv_heads, args.head_size, args.page, args.tokens)
        for row in measure(case, args):
            report["rows"].append(row)
            print(line(row), flush=True)
            write_json(args.json, report)
    return 1 if any("error" in row.get("failure", "") for row in report["rows"]) else 0


def forms(case: Case, args: argparse.Namespace) -> dict[str, Callable]:
    """name -> function of (query, pages, table, lengths, layer)."""
    found: dict[str, Callable] = {}
    for name in args.implementations:
        found[name] = lambda *x, name=name: paged_attention(*x[:4], layer=x[4], implementation=name)
    options = BlockOptions(case.head_size**-0.5)
    for sizes in CONFIGS if args.tune else ():
        config = paged_launch.PagedConfig(**dict(zip(("block_kv", "stages", "warpgroups"), sizes, strict=True)))
        fits = case.page % config.block_kv == 0 or config.block_kv % case.page == 0
        if fits and config.shared_memory_bytes(case.head_size) <= paged_launch.HOPPER.shared_memory_bytes:
            found["{} keys, {} stages, {} warpgroups".format(*sizes)] = functools.partial(_tuned, options, config)
    if args.peer:
        found["jax (Triton)"] = triton
    return found


def _tuned(options, config, *operands):
    return paged_launch.forward(*operands, options, config=config)


def triton(query, pages, table, lengths, layer):
    """jax's own kernel, which wants the pages of each head together: given pages of one head where a copy would cost."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as peer
    key, value = pages  # already [K, P, p, H]
    scaled = query[:, 0] * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    blocks = max(1, 128 // key.shape[2])
    return peer(scaled, key, value, table, lengths, pages_per_compute_block=blocks)[:, None], None


def measure(case: Case, args: argparse.Namespace):
    """A row a form; one that fails must not end the others."""
    dtype = jnp.dtype(args.dtype)
    operands = case.operands(dtype, time.time_ns() % 2**31)
    moved = case.bytes(operands[3], dtype.itemsize)
    wanted = exact(case, *operands) if args.check else None
    peak = peaks()
    for name, form in forms(case, args).items():
        row: dict[str, Any] = {"shape": case.text, "name": name, "bytes": moved}
        try:
            query, pages, table, lengths = operands
            if name == "jax (Triton)":
                pages = jax.block_until_ready(tuple(jnp.moveaxis(x, 2, 0) for x in pages[0]))
            run = jax.jit(form)
            if wanted is not None:
                row["error"] = _distance(run(query, pages, table, lengths, jnp.int32(0))[0], wanted)
                if not row["error"] < 5e-3:  # probabilities are rounded to bfloat16
                    raise AssertionError(f"relative error {row['error']}")
            layers = itertools.cycle([jnp.int32(i) for i in range(case.layers)])
            times = trace.device_times(lambda: run(query, pages, table, lengths, next(layers)), args.repeats)  # noqa: B023
            row |= {"kernels_ms": times["kernels_ms"], "span_ms": times["span_ms"], "each_ms": times["each_ms"]}
            row["bytes_per_s"] = moved / times["kernels_ms"] * 1e3
            row["share_of_peak"] = row["bytes_per_s"] / peak[1] if peak else None
        except Exception as failure:
            row["failure"] = f"{type(failure).__name__}: {failure}"[:600]
        yield row


def exact(case: Case, query, pages, table, lengths):
    """Layer 0 in float32, a row at a time."""

    @jax.jit
    def rows(query, layer, table, lengths):
        def one(operands):
            query, ids, length = (x[None] for x in operands)
            wide = layer[:, ids[0]].astype(jnp.float32)[None]
            places = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
            return paged_attention(query.astype(jnp.float32), wide, places, length, implementation="xla")[0][0]

        return jax.lax.map(one, (query, table, lengths))

    return rows(query, pages[0], table, lengths)


def _distance(found, wanted) -> float:
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def line(row: dict[str, Any]) -> str:
    head = f"{row['shape']:34s} {row['name']:36s}"
    if "kernels_ms" not in row:
        return f"{head} {row.get('failure', 'not measured')}"
    share = f", {row['share_of_peak']:.0%} of the memory's peak" if row["share_of_peak"] else ""
    largest = max(row["each_ms"].values())
    error = f", error {row['error']:.1e}" if "error" in row else ""
    return f"{head} {1e3 * row['kernels_ms']:9.1f} us ({1e3 * largest:.1f}) {row['bytes_per_s'] / 1e12:5.2f} TB/s{share}{error}"
