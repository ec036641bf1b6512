"""`ring-jax bench experts`: the experts of a layer on one GPU, ours beside the loop in XLA and jax's own grouped products.

Each case is first compared with float32 on fresh random inputs. Times are those of the device, from a profiler's trace of
several calls: kernels summed, and from the first kernel's begin to the last one's end. The roofline of a case is the larger
of its products over 989 TFLOP/s and its bytes (weights of the experts that are used once, x and y once) over 3.35 TB/s, the
H100's. With --tune every config of the kernels that fits is timed.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ring_jax._hardware import H100
from ring_jax.bench.attention import environment
from ring_jax.bench.trace import device_times
from ring_jax.models.qwen3_5.collectives import Collectives
from ring_jax.moe import MoEWeights, moe, route
from ring_jax.moe.hopper import backend
from ring_jax.moe.hopper.config import ExpertsConfig, GroupedConfig
from ring_jax.mosaic.device import hopper_reason

PEAK_FLOPS, PEAK_BYTES = H100.peak_flops, H100.memory_bytes_per_s


@dataclasses.dataclass(frozen=True)
class Case:
    """tokens of a layer with `experts` experts, k of them for each token."""

    tokens: int
    experts: int = 256
    per_token: int = 8
    width: int = 2048
    features: int = 512

    @property
    def flops(self) -> float:
        """Of the routed experts' products."""
        return 6.0 * self.tokens * self.per_token * self.width * self.features

    def seconds_at_peak(self, chosen: np.ndarray) -> float:
        touched = len(np.unique(chosen))
        moved = 2 * (touched * 3 * self.width * self.features + 2 * self.tokens * self.width)
        return max(self.flops / PEAK_FLOPS, moved / PEAK_BYTES)

    def operands(self, dtype: Any, seed: int) -> tuple[jax.Array, MoEWeights, MoEWeights]:
        """x, the routed experts and, as one more expert, the shared one."""
        keys = jax.random.split(jax.random.key(seed), 6)

        def draw(key, shape, fan_in):
            return (jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5).astype(dtype)

        d, f, e = self.width, self.features, self.experts

        def kernels(count, *keys):
            return draw(keys[0], (count, d, 2, f), d), draw(keys[1], (count, f, d), f)

        x = draw(keys[0], (self.tokens, d), 1)
        router = draw(keys[1], (d, e), d)
        return x, MoEWeights(router, *kernels(e, *keys[2:4])), MoEWeights(router[:, :1], *kernels(1, *keys[4:]))


def in_mosaic(x, weights: MoEWeights, per_token: int) -> jax.Array:
    return moe(x, weights, top_k=per_token, implementation="mosaic")[0]


def shared(x, weights: MoEWeights) -> jax.Array:
    """The gated shared expert, as models have it beside the routed ones."""
    alone = Collectives(None)
    hidden = alone.swiglu(x, weights.gate_up[0].reshape(x.shape[1], -1))
    return jax.nn.sigmoid(x @ weights.router[:, 0])[:, None] * alone.product(hidden, weights.down[0])


def layer(case: Case, experts: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda x, weights, common: experts(x, weights, case.per_token) + shared(x, common)


def in_xla(x, weights: MoEWeights, per_token: int) -> jax.Array:
    return moe(x, weights, top_k=per_token, implementation="xla")[0]


def by_ragged_dot(x, weights: MoEWeights, per_token: int) -> jax.Array:
    """`lax.ragged_dot` on sorted rows."""
    routing = route(x, weights.router, top_k=per_token)
    order = jnp.argsort(routing.experts.reshape(-1), stable=True)
    sizes = jnp.bincount(routing.experts.reshape(-1), length=weights.gate_up.shape[0]).astype(jnp.int32)
    rows = x[order // per_token]
    fused = weights.gate_up.reshape(*weights.gate_up.shape[:2], -1)
    gate, up = jnp.split(lax.ragged_dot(rows, fused, sizes), 2, axis=-1)
    out = lax.ragged_dot(jax.nn.silu(gate) * up, weights.down, sizes)
    back = jnp.zeros_like(out).at[order].set(out, unique_indices=True)
    every = jnp.ones_like(routing.experts, dtype=bool)
    return backend.weighted_sum(back, routing.weights, every).astype(x.dtype)


def check(case: Case, x, weights: MoEWeights, experts: Callable[..., jax.Array], tokens: int = 48) -> float:
    """Relative error of `experts` at some tokens against the same in float32 with the same routing."""
    routing = jax.jit(lambda x, w: route(x, w, top_k=case.per_token))(x, weights.router)
    found = jax.jit(lambda x, w: experts(x, w, case.per_token))(x, weights)
    pick = np.unique(np.random.default_rng(time.time_ns() % 2**32).integers(0, case.tokens, tokens))
    pick = np.unique(np.concatenate([pick, [0, case.tokens - 1]]))

    @jax.jit
    def exact(x, gate_up, down, chosen, factors):
        def one(token):
            x, chosen, factors = token
            kernel_in, kernel_out = (w[chosen].astype(jnp.float32) for w in (gate_up, down))
            gate, up = jnp.einsum("d,kdcf->ckf", x.astype(jnp.float32), kernel_in, precision="highest")
            return jnp.einsum("k,kf,kfd->d", factors, jax.nn.silu(gate) * up, kernel_out, precision="highest")

        return lax.map(one, (x, chosen, factors))

    wanted = exact(x[pick], weights.gate_up, weights.down, routing.experts[pick], routing.weights[pick])
    found, wanted = (np.asarray(a, np.float64) for a in (found[pick].astype(jnp.float32), wanted))
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    if not error < 6e-3:  # bfloat16 rounds hidden values, rows and the sum by up to 2^-9 each
        raise AssertionError(f"{case}: relative error {error}")
    return error


FORMS = {"ours": in_mosaic, "xla": in_xla, "ragged_dot": by_ragged_dot}


def tuned_forms(case: Case) -> dict[str, Callable[..., jax.Array]]:
    """Ours with every config that fits, by name; the forward pass."""
    found, few = {}, case.tokens * case.per_token <= 48 * case.experts
    warpgroups, heights = (1, (16, 64)) if few else (2, (128,))
    for rows, up, down, stages in itertools.product(heights, (64, 128, 256), (64, 128, 256), (3, 4, 5, 7, 10)):
        try:
            options: dict[str, Any] = {"rows": rows, "warpgroups": warpgroups, "stages": stages}
            wide = GroupedConfig(columns=up, width=min(64, up // 2), swiglu=True, **options)
            config = ExpertsConfig(up=wide, down=GroupedConfig(columns=down, **options))
        except ValueError:  # does not fit
            continue
        if 2 * case.features % up == 0 and case.width % down == 0:
            found[f"rows={rows}/up={up}/down={down}/stages={stages}"] = functools.partial(with_config, config=config)
    return found


def with_config(x, weights: MoEWeights, per_token: int, config: ExpertsConfig) -> jax.Array:
    routing = route(x, weights.router, top_k=per_token)
    y = backend.run_experts(x, weights.gate_up, weights.down, routing.weights, routing.experts, config=config)
    return y.astype(x.dtype)


def measure(case: Case, forms: dict[str, Callable], dtype: Any, repeats: int, gradient: bool) -> list[dict[str, Any]]:
    x, weights, common = jax.jit(lambda: case.operands(dtype, time.time_ns() % 2**31))()
    chosen = np.asarray(jax.jit(lambda x, r: route(x, r, top_k=case.per_token).experts)(x, weights.router))
    rows = []
    for name, experts in forms.items():
        row: dict[str, Any] = {"case": dataclasses.asdict(case), "form": name, "gradient": gradient}
        rows.append(row)
        try:
            row["error"] = check(case, x, weights, experts)
            run = layer(case, experts)
            if gradient:
                loss = lambda *a, run=run: (run(*a).astype(jnp.float32) ** 2).sum()  # noqa: E731
                run = jax.grad(loss, argnums=(0, 1, 2))
            compiled = jax.jit(run).lower(x, weights, common).compile()
            row.update(device_times(lambda compiled=compiled: compiled(x, weights, common), repeats))
            row["routed_roofline_ms"] = case.seconds_at_peak(chosen) * 1e3 * (3 if gradient else 1)
            row["routed_tflops"] = case.flops * (3 if gradient else 1) / row["kernels_ms"] / 1e9
        except Exception as failure:  # one form must not end the others
            row["failure"] = f"{type(failure).__name__}: {failure}"[:2000]
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tokens = [1, 16, 128, 8192, 32768]
    parser.add_argument("--tokens", type=int, nargs="+", default=tokens, metavar="T", help="of a layer")
    parser.add_argument("--forms", nargs="+", default=["ours", "xla"], choices=sorted(FORMS), help="default: ours xla")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="of tokens and weights")
    parser.add_argument("--gradient", action="store_true", help="with the backward pass")
    parser.add_argument("--tune", action="store_true", help="time every config of the kernels, forward")
    parser.add_argument("--repeats", type=int, default=10, help="calls in one timing (default: 10)")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")


def unavailable(_: argparse.Namespace) -> str | None:
    """Why this host cannot run the benchmark, or None."""
    reason = hopper_reason()
    return f"times the Hopper kernels, and {reason.replace('needs', 'that needs', 1)}" if reason else None


def run(args: argparse.Namespace) -> int:
    report: dict[str, Any] = {"environment": environment(), "arguments": vars(args), "rows": []}
    for tokens in args.tokens:
        case = Case(tokens)
        forms = {name: FORMS[name] for name in args.forms} | (tuned_forms(case) if args.tune else {})
        for row in measure(case, forms, jnp.dtype(args.dtype), args.repeats, args.gradient):
            report["rows"].append(row)
            show(row)
            if args.json:
                Path(args.json).write_text(json.dumps(report, indent=1))
    return 1 if any("failure" in row and row["form"] == "ours" for row in report["rows"]) else 0


def show(row: dict[str, Any]) -> None:
    outcome = row.get("failure") or (
        f"{row['kernels_ms']:8.3f} ms kernels {row['span_ms']:8.3f} span {row['routed_roofline_ms']:7.3f} roofline "
        f"{row['routed_tflops']:6.1f} TFLOP/s  error {row['error']:.1e}"
    )
    print(f"{row['case']['tokens']:7d} {row['form']:10s} {outcome}", flush=True)
    for name, spent in list(row.get("each_ms", {}).items())[:10]:
        print(f"          {spent:8.4f} {name[:90]}", flush=True)
