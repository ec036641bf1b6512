"""What lies between two mixers of a decode step of one row, on one Hopper GPU: one launch beside its four products.

    python -m ring_jax.bench.chain [--presets ...] [--json FILE]

Their results are compared, too. Times are of layers whose weights no cache can hold, one after the other as in a step: of kernels, and
from the first one's begin to the last one's end.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ring_jax._hardware import H100
from ring_jax.bench.flash_forward import relative_error
from ring_jax.bench.products import BYTES, drawn, parser_for, started
from ring_jax.bench.trace import device_times
from ring_jax.models.qwen3_5 import COMPILER_OPTIONS, Config
from ring_jax.nn.hopper import chain, few_rows
from ring_jax.nn.norm import Normed

_EPSILON = 1e-6
Vectors = tuple[jax.Array, jax.Array]


def shapes(preset: str) -> tuple[tuple[int, ...], ...]:
    """Of one GDN layer before another: out, norm, gate and up, down, the next norm, in."""
    config = Config.preset(preset)
    width, mlp, linear = config.hidden_size, config.mlp_size or 0, config.linear
    into = linear.key_heads * linear.stride
    return (linear.parts[2], width), (width,), (width, 2 * mlp), (mlp, width), (width,), (width, into)


def operands(preset: str) -> tuple[jax.Array, ...]:
    """The mixer's result and the residual; weights of as many layers as a cache cannot hold."""
    found = shapes(preset)
    layers = max(2, -(-BYTES // (2 * sum(int(np.prod(shape)) for shape in found))))
    all_shapes = (found[0][:1], found[1], *((layers, *shape) for shape in found))
    scales = (1.0, 1.0, *(shape[0] ** -0.5 if len(shape) == 2 else 0.1 for shape in found))
    return drawn(len(preset), all_shapes, scales)


def by_products(y: jax.Array, h: jax.Array, layers: list[tuple[jax.Array, ...]]) -> Vectors:
    y, h = y[None], h[None]
    for out, norm, up, down, next_norm, into in layers:
        h = few_rows.product(y, out, added=h)
        a = few_rows.product(Normed(h, norm, _EPSILON), up, swiglu=True)
        h = few_rows.product(a, down, added=h)
        p = few_rows.product(Normed(h, next_norm, _EPSILON), into)
        y = p[:, : y.shape[1]]
    return h[0], p[0]


def by_chain(y: jax.Array, h: jax.Array, layers: list[tuple[jax.Array, ...]]) -> Vectors:
    place = chain.start()
    size = y.size
    for weights in layers:
        h, p, place = chain.between_mixers(y, h, *weights, place, epsilon=_EPSILON)
        y = p[:size]
    return h, p


def measure(preset: str, repeats: int) -> list[dict[str, Any]]:
    arrays = jax.jit(operands, static_argnums=0)(preset)
    layers = arrays[2].shape[0]
    rows: list[dict[str, Any]] = []
    results: dict[str, Vectors] = {}
    for name, form in {"products": by_products, "chain": by_chain}.items():

        def run(y: jax.Array, h: jax.Array, *weights: jax.Array, form: Callable[..., Vectors] = form) -> Vectors:
            return form(y, h, [tuple(w[i] for w in weights) for i in range(layers)])

        row: dict[str, Any] = {"preset": preset, "name": name}
        try:
            compiled = jax.jit(run, compiler_options=COMPILER_OPTIONS).lower(*arrays).compile()
            results[name] = compiled(*arrays)
            times = device_times(lambda compiled=compiled: compiled(*arrays), repeats)
            row |= {"us": 1e3 * times["kernels_ms"] / layers, "span_us": 1e3 * times["span_ms"] / layers}
            one = sum(w.nbytes for w in arrays[2:]) / layers
            row["of_bandwidth"] = 1e6 * one / row["span_us"] / H100.memory_bytes_per_s
        except Exception as failure:  # one form must not end the other
            row["failure"] = f"{type(failure).__name__}: {failure}"[:2000]
        rows.append(row)
    if len(results) == 2:
        rows[-1]["difference"] = max(map(relative_error, *results.values()))
    return rows


def main() -> int:
    args, report = started(parser_for(__doc__, ["qwen3.5-0.8b", "qwen3.5-4b", "qwen3.5-9b"]))
    for preset in args.presets:
        for row in measure(preset, args.repeats):
            report["rows"].append(row)
            outcome = row.get("failure") or (
                f"{row['us']:8.2f} us of kernels, {row['span_us']:8.2f} in all, {row['of_bandwidth']:6.1%} of 3.35 TB/s"
                + (f", differs by {row['difference']:.1e}" if "difference" in row else "")
            )
            print(f"{preset:13s} {row['name']:10s} {outcome}", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=1))
    return 1 if any("failure" in row for row in report["rows"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
