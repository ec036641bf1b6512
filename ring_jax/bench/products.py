"""The dense products of a layer on one Hopper GPU, our kernels beside cuBLAS's products and XLA's passes around them.

    python -m ring_jax.bench.products [--rows 1 4 --tokens 8192 32768] [--presets ...] [--tune] [--json FILE]

Of few rows (a decode step) all products of a layer with norm, SwiGLU and sum, of many rows SwiGLU's. Each form is first compared with
float32 at some rows. Times are kernels summed, from a profiler's trace of many calls: weights of few rows come from memory, being those of
so many layers that a cache cannot hold them, and what many rows draw lowers the clock, within a tenth of a second.
"""

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ring_jax._hardware import H100
from ring_jax.bench.attention import environment
from ring_jax.bench.trace import device_times
from ring_jax.models.qwen3_5 import COMPILER_OPTIONS, PRESETS, Config
from ring_jax.moe.hopper import dense
from ring_jax.moe.hopper.config import GroupedConfig
from ring_jax.mosaic.device import hopper_reason
from ring_jax.nn.hopper import few_rows
from ring_jax.nn.hopper.config import FewRowsConfig
from ring_jax.nn.norm import Normed

BYTES = 400 << 20  # of weights: eight times a Hopper GPU's L2
_EPSILON = 1e-6
Form = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Case:
    """x [rows, depth] times w [depth, columns]."""

    preset: str
    name: str
    rows: int
    depth: int
    columns: int
    normed: bool = False
    swiglu: bool = False

    @property
    def few(self) -> bool:
        return self.rows <= few_rows.MAX_ROWS

    @property
    def results(self) -> int:
        return self.columns // 2 if self.swiglu else self.columns

    @property
    def layers(self) -> int:
        return -(-BYTES // (2 * self.depth * self.columns)) if self.few else 1

    def operands(self) -> tuple[jax.Array, ...]:
        """x; w of all layers; the norm's weight; what is added."""
        shapes = (
            (self.rows, self.depth),
            (self.layers, self.depth, self.columns),
            (self.depth,),
            (self.rows, self.results),
        )
        scales = 1.0, self.depth**-0.5, 0.1, 1.0
        return drawn(self.rows + self.columns, shapes, scales)


def drawn(seed: int, shapes: Sequence[tuple[int, ...]], scales: Sequence[float]) -> tuple[jax.Array, ...]:
    """Normal numbers of these scales in bfloat16."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return tuple(
        (s * jax.random.normal(k, n, jnp.bfloat16)).astype(jnp.bfloat16)
        for k, n, s in zip(keys, shapes, scales, strict=True)
    )


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for preset, rows in itertools.product(args.presets, args.rows + args.tokens):
        config = Config.preset(preset)
        width, mlp, linear = config.hidden_size, config.mlp_size or 0, config.linear
        gate_up = Case(preset, "gate, up", rows, width, 2 * mlp, normed=rows <= few_rows.MAX_ROWS, swiglu=True)
        if not gate_up.few:
            yield gate_up
            continue
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        yield Case(preset, "in, linear", rows, width, linear.key_heads * linear.stride, normed=True)
        yield Case(preset, "in, full", rows, width, 2 * (heads + kv_heads), normed=True)
        yield Case(preset, "out, linear", rows, linear.parts[2], width)
        yield gate_up
        yield Case(preset, "down", rows, mlp, width)


def in_xla(case: Case, x: jax.Array, w: jax.Array, weight: jax.Array, added: jax.Array) -> jax.Array:
    x = Normed(x, weight, _EPSILON).array() if case.normed else x
    y = jnp.matmul(x, w, precision="highest" if x.dtype == jnp.float32 else None)
    y = dense.combine(y) if case.swiglu else y
    return y + added if case.few and not case.normed else y


def in_kernel(
    case: Case, x: jax.Array, w: jax.Array, weight: jax.Array, added: jax.Array, config: Any = None
) -> jax.Array:
    if not case.few:
        return dense.swiglu(x, w) if config is None else dense.run(x, w, config=config)
    given, total = (Normed(x, weight, _EPSILON), None) if case.normed else (x, added)
    return few_rows.product(given, w, swiglu=case.swiglu, added=total, config=config)


def tuned_forms(case: Case) -> dict[str, Form]:
    """The kernel with every config that fits, by name."""
    found: dict[str, Form] = {}
    if case.few:
        for columns, warpgroups, loads in itertools.product((8, 16, 32, 64), (1, 2, 4), (2, 4, 6, 7, 8, 12, 16)):
            few = FewRowsConfig(columns=columns, warpgroups=warpgroups, loads=loads)
            if case.results % columns == 0 and case.depth % few.step == 0:
                found[f"{columns=} {warpgroups=} {loads=}"] = functools.partial(in_kernel, config=few)
        return found
    for columns, stages, band in itertools.product((128, 192, 256), (3, 4, 5), (1, 8, 16, 32)):
        try:
            many = GroupedConfig(columns=columns, stages=stages, swiglu=True, band=band)
        except ValueError:  # does not fit
            continue
        if case.columns % columns == 0:
            found[f"{columns=} {stages=} {band=}"] = functools.partial(in_kernel, config=many)
    return found


def check(case: Case, form: Form, operands: tuple[jax.Array, ...]) -> float:
    """Relative error at 64 rows at most, the last among them."""
    x, w, weight, added = operands
    rows = np.unique(np.linspace(0, case.rows - 1, 64).astype(np.int32))
    wide = (a.astype(jnp.float32) for a in (x[rows], w[0], weight, added[rows]))
    wanted = np.asarray(jax.jit(functools.partial(in_xla, case))(*wide), np.float64)
    found = np.asarray(jax.jit(functools.partial(form, case))(x, w[0], weight, added)[rows], np.float64)
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    if not error < 8e-3:  # bfloat16 rounds the result, and in XLA the norm, gate and up before
        raise AssertionError(f"relative error {error}")
    return error


def measure(case: Case, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    operands = jax.jit(case.operands)()
    forms = {"xla": in_xla, "kernel": in_kernel} | (tuned_forms(case) if args.tune else {})
    for name, form in forms.items():
        row: dict[str, Any] = {**dataclasses.asdict(case), "form": name}
        try:
            row["error"] = check(case, form, operands)

            def every(x: jax.Array, w: jax.Array, *rest: jax.Array, form: Form = form) -> list[jax.Array]:
                return [form(case, x, w[i], *rest) for i in range(case.layers)]

            compiled = jax.jit(every, compiler_options=COMPILER_OPTIONS).lower(*operands).compile()
            found = device_times(lambda compiled=compiled: compiled(*operands), args.repeats)
            row["ms"] = found["kernels_ms"] / case.layers
            row["each_ms"] = found["each_ms"]
            row["tflops"] = 2e-9 * case.rows * case.depth * case.columns / row["ms"]
            row["of_bandwidth"] = 2e3 * case.depth * case.columns / row["ms"] / H100.memory_bytes_per_s
        except Exception as failure:  # one form must not end the others
            row["failure"] = f"{type(failure).__name__}: {failure}"[:2000]
        yield row


def show(row: dict[str, Any]) -> None:
    outcome = row.get("failure")
    if outcome is None:
        rate = (
            f"{row['of_bandwidth']:6.1%} of 3.35 TB/s"
            if row["rows"] <= few_rows.MAX_ROWS
            else f"{row['tflops']:6.1f} TFLOP/s"
        )
        outcome = f"{1e3 * row['ms']:9.2f} us {rate}  error {row['error']:.1e}"
    print(f"{row['preset']:13s} {row['rows']:6d} {row['name']:12s} {row['form']:32s} {outcome}", flush=True)


def parser_for(text: str | None, presets: list[str]) -> argparse.ArgumentParser:
    """With what benches of a layer's products share; `text` begins with what this one does."""
    parser = argparse.ArgumentParser(description=(text or "").split("\n", 1)[0])
    dense_ones = [name for name in PRESETS if Config.preset(name).experts is None]
    parser.add_argument("--presets", nargs="+", default=presets, choices=dense_ones, help="whose sizes")
    parser.add_argument("--repeats", type=int, default=30, help="calls in one timing (default: 30)")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    return parser


def started(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(arguments, a report to fill), or an error where there is no Hopper GPU."""
    args = parser.parse_args()
    if reason := hopper_reason():
        parser.error(f"times Hopper kernels, and {reason.replace('needs', 'that needs', 1)}")
    return args, {"environment": environment(), "arguments": vars(args), "rows": []}


def main() -> int:
    parser = parser_for(__doc__, ["qwen3.5-0.8b", "qwen3.5-9b"])
    parser.add_argument("--rows", type=int, nargs="*", default=[1], metavar="R", help="of a decode step, at most 4")
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 32768], metavar="T", help="of a prefill")
    parser.add_argument("--tune", action="store_true", help="time every config of the kernels")
    args, report = started(parser)
    for case in cases(args):
        for row in measure(case, args):
            report["rows"].append(row)
            show(row)
            if args.json:
                Path(args.json).write_text(json.dumps(report, indent=1))
    return 1 if any("failure" in row and row["form"] == "kernel" for row in report["rows"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
