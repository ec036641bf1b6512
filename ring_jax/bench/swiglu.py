"""SwiGLU of many rows that share their weights, one kernel beside cuBLAS's product and XLA's pass over its results.

    python -m ring_jax.bench.swiglu [--gradient] [--tune] [--json FILE]

Both forms are first compared with float32 at some rows. Times are kernels summed, from a profiler's trace of many calls: what such products
draw lowers the clock, within a tenth of a second.
"""

import argparse
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ring_jax.bench.attention import environment
from ring_jax.bench.trace import device_times
from ring_jax.models.qwen3_5 import COMPILER_OPTIONS, Config
from ring_jax.moe.hopper import dense
from ring_jax.moe.hopper.config import GroupedConfig
from ring_jax.mosaic.device import hopper_reason

PRESETS = ("qwen3.5-0.8b", "qwen3.5-4b", "qwen3.5-9b")


def in_xla(x: jax.Array, weights: jax.Array) -> jax.Array:
    return dense.combine(x @ weights)


def tuned_forms(features: int) -> dict[str, Callable[..., jax.Array]]:
    """Every config that fits, by name; the forward pass."""
    found = {}
    for columns, stages, band in itertools.product((128, 192, 256), (3, 4, 5), (1, 8, 16, 32)):
        try:
            config = GroupedConfig(columns=columns, stages=stages, swiglu=True, band=band)
        except ValueError:  # does not fit
            continue
        if 2 * features % columns == 0:
            run = functools.partial(dense.run, config=config)
            found[f"columns={columns}/stages={stages}/band={band}"] = run
    return found


def check(run: Callable[..., jax.Array], x: jax.Array, weights: jax.Array) -> float:
    """Relative error at 64 rows, the last among them."""
    rows = np.linspace(0, x.shape[0] - 1, 64).astype(np.int32)
    exact = functools.partial(jnp.matmul, precision="highest")
    wanted = jax.jit(lambda x, w: dense.combine(exact(x, w)))(x[rows].astype(jnp.float32), weights.astype(jnp.float32))
    found = np.asarray(jax.jit(run)(x, weights)[rows], np.float64)
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    if not error < 6e-3:  # bfloat16 rounds the result, and in XLA gate and up before
        raise AssertionError(f"relative error {error}")
    return error


def measure(tokens: int, width: int, features: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    keys = jax.random.split(jax.random.key(tokens + width), 2)
    x = jax.random.normal(keys[0], (tokens, width), jnp.bfloat16)
    weights = (jax.random.normal(keys[1], (width, 2 * features)) * width**-0.5).astype(jnp.bfloat16)
    forms = {"xla": in_xla, "kernel": dense.swiglu} | (tuned_forms(features) if args.tune else {})
    rows = []
    for name, form in forms.items():
        row: dict[str, Any] = {"tokens": tokens, "width": width, "features": features, "form": name}
        rows.append(row)
        try:
            row["error"] = check(form, x, weights)
            run = form
            if args.gradient:
                run = lambda x, w, form=form: jax.vjp(form, x, w)[1](jnp.ones_like(x, shape=(tokens, features)))  # noqa: E731
            compiled = jax.jit(run, compiler_options=COMPILER_OPTIONS).lower(x, weights).compile()
            row.update(device_times(lambda compiled=compiled: compiled(x, weights), args.repeats))
            products = 3 if args.gradient else 1
            row["tflops"] = products * 4e-9 * tokens * width * features / row["kernels_ms"]
        except Exception as failure:  # one form must not end the others
            row["failure"] = f"{type(failure).__name__}: {failure}"[:2000]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], metavar="T")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS, help="whose sizes")
    parser.add_argument("--gradient", action="store_true", help="with the backward pass")
    parser.add_argument("--tune", action="store_true", help="time every config of the kernel, forward")
    parser.add_argument("--repeats", type=int, default=60, help="calls in one timing (default: 60)")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    args = parser.parse_args()
    if reason := hopper_reason():
        parser.error(f"times a Hopper kernel, and {reason.replace('needs', 'that needs', 1)}")
    report: dict[str, Any] = {"environment": environment(), "arguments": vars(args), "rows": []}
    for preset, tokens in itertools.product(args.presets, args.tokens):
        config = Config.preset(preset)
        for row in measure(tokens, config.hidden_size, config.mlp_size or 0, args):
            report["rows"].append({"preset": preset, **row})
            outcome = (
                row.get("failure")
                or f"{row['kernels_ms']:8.3f} ms {row['tflops']:6.1f} TFLOP/s  error {row['error']:.1e}"
            )
            print(f"{preset:13s} {tokens:6d} {row['form']:32s} {outcome}", flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(report, indent=1))
    return 1 if any("failure" in row and row["form"] == "kernel" for row in report["rows"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
