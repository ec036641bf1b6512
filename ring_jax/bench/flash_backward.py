"""Times the backward flash-attention kernels on one GPU beside cuDNN: `python -m ring_jax.bench.flash_backward --help`.

Each case is first compared with a float32 reference on fresh random inputs. Times are of the device, in turns with cuDNN's and, with
--peer fa4, FlashAttention-4's, as in `flash_forward`. TFLOP/s count 14 H multiply-adds per
query-key pair that the mask leaves for forward and backward, 10 H for the backward alone (dkv and dq likewise, by the
whole backward's work).
"""

import argparse
import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ring_jax.bench.flash_forward import (
    Case,
    add_ratios,
    fa4_call,
    materialised,
    prepared,
    ratios,
    relative_error,
    seconds,
    started,
)
from ring_jax.flash.hopper import backward_common as common
from ring_jax.flash.hopper import backward_dkv, backward_dq, backward_launch, forward_launch
from ring_jax.flash.hopper.backward_common import BackwardConfig, default_config
from ring_jax.flash.operands import BlockOptions, Bounds, RowGradients

# What `deterministic` asks for.
FORMS = {"default": None, "repeatable": True, "fastest": False}


def inputs(case: Case, dtype) -> tuple[jax.Array, ...]:
    """query, kv, dout, key_start, key_end."""
    dout = jax.random.normal(
        jax.random.key(time.time_ns() % 2**31), (case.batch, case.length, case.heads, case.head_size)
    )
    return *case.inputs(dtype), dout.astype(dtype), *map(jnp.asarray, case.bounds())


def both(case: Case, config: BackwardConfig | None, deterministic: bool | None):
    """Forward and backward as one program."""
    scale = case.head_size**-0.5

    def run(query, kv, dout, key_start, key_end):
        bounds, options = Bounds(key_start, key_end), BlockOptions(scale, deterministic=deterministic)
        out, lse = forward_launch.forward(query, kv, bounds, None, options)
        delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
        rows = RowGradients(lse, delta, dout)
        return out, backward_launch.backward(query, kv, bounds, rows, options, config=config)

    return run


def check(
    case: Case, dtype, config: BackwardConfig | None, deterministic: bool | None
) -> dict[str, tuple[float, float]]:
    """(our error, error of the materialised form in the same precision) of each gradient, at up to 1024 positions."""
    small = dataclasses.replace(case, length=min(case.length, 1024), heads=case.heads // case.kv_heads, kv_heads=1)
    query, kv, dout, *bounds = inputs(small, dtype)
    scale = case.head_size**-0.5

    def gradients(dtype):
        @jax.jit  # with the bounds as arguments: as constants, XLA folds the mask for minutes
        def pull(query, kv, dout, *bounds):
            _, transpose = jax.vjp(lambda *x: materialised(*x, *bounds, scale, dtype)[0], query, kv)
            return transpose(dout)

        dq, dkv = pull(*(x.astype(dtype) for x in (query, kv, dout)), *bounds)
        return dq, dkv[0], dkv[1]

    _, (dq, dkv) = jax.jit(both(small, config, deterministic))(query, kv, dout, *bounds)
    found = {}
    for name, ours, same, exact in zip(
        ("dq", "dk", "dv"), (dq, dkv[0], dkv[1]), gradients(dtype), gradients(jnp.float32), strict=True
    ):
        error, allowed = relative_error(ours, exact), relative_error(same, exact)
        found[name] = (error, allowed)
        if not error <= 2 * allowed:
            raise AssertionError(f"{case}: {name} error {error}, same-precision reference {allowed}")
    return found


def cudnn_call(case: Case, query, kv, dout):
    """cuDNN's forward and backward; documents as a batch of dense sequences of their length, a hop as full."""
    kind, _, argument = case.mask.partition(":")
    if kind.startswith("documents"):
        parts = case.batch * int(argument)
        query, dout = (x.reshape(parts, -1, *x.shape[2:]) for x in (query, dout))
        kv = kv.reshape(2, parts, -1, *kv.shape[3:])
    causal = kind in ("causal", "window", "documents")
    window = (int(argument) - 1, 0) if kind == "window" else None

    def run(query, key, value, dout):
        def attend(*x):
            return jax.nn.dot_product_attention(*x, is_causal=causal, local_window_size=window, implementation="cudnn")

        out, transpose = jax.vjp(attend, query, key, value)
        return out, transpose(dout)

    key, value = kv[0] + 0, kv[1] + 0
    compiled = jax.jit(run).lower(query, key, value, dout).compile()
    return lambda: compiled(query, key, value, dout)


def parts(case: Case, config: BackwardConfig, operands) -> dict[str, Any]:
    """Calls of the backward's kernels one by one."""
    query, kv, dout, key_start, key_end = operands
    module = backward_launch
    B, T, N, H = query.shape
    S, K = kv.shape[-3:-1]
    problem = common.Problem(B, T, S, N, K, H, H, False, jnp.dtype(query.dtype), BlockOptions(H**-0.5), config)
    lse = jnp.full((B, T, N), 10.0)
    rows = jax.jit(lambda *x: module._prepare_rows(problem, *x))(key_start, key_end, lse, 0.1 * lse)
    found = {}
    kernels = {"dq": (backward_dq.dq, module._dq_table), "dkv": (backward_dkv.dkv, module._dkv_table)}
    for name, (kernel, table) in kernels.items():
        full = (query, kv.reshape(-1, S, K, H), dout, *rows, jax.jit(partial(table, problem))(key_start, key_end))
        compiled = jax.jit(lambda *x, kernel=kernel: kernel(problem, *x)).lower(*full).compile()
        found[name] = lambda compiled=compiled, full=full: compiled(*full)
    return found


def measure(case: Case, dtype, options) -> list[dict[str, Any]]:
    operands = inputs(case, dtype)
    calls: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    deterministic = FORMS[options.form]

    def add(name, make, work, **facts):
        rows[name] = started(calls, case, name, make, work=work, **facts)

    add("cudnn", lambda: cudnn_call(case, *operands[:3]), 3.5)
    if options.peer:
        add("fa4", lambda: fa4_call(case, dtype, "forward+backward"), 3.5)
    configs = candidates(case.head_size, options.configs, deterministic)

    def prepare(config: BackwardConfig):
        facts = {"errors": check(case, dtype, config, deterministic)} if options.check else {}
        run = jax.jit(both(case, config, deterministic)).lower(*operands).compile()
        return facts, lambda: run(*operands)

    for row in prepared(calls, case, configs, prepare, work=3.5):
        name = row["name"]
        rows[name] = row
        if options.parts:
            for part in ("dq", "dkv"):
                config = configs[name]
                add(f"{name} {part}", lambda part=part, config=config: parts(case, config, operands)[part], 2.5)
    for name, value in seconds(calls, options.seconds).items():
        rows[name].update(seconds=value, tflops=rows[name]["work"] * case.flops_of(name) / value / 1e12)
    add_ratios({name: row for name, row in rows.items() if row["work"] == 3.5})
    return list(rows.values())


def candidates(head_size: int, names: list[str], deterministic: bool | None = None) -> dict[str, BackwardConfig]:
    """The tuned config, changed by each of `names`: "base", or fields such as "block_q_dkv=96/stages=3"."""
    base = default_config(head_size, head_size, deterministic=deterministic)
    found = {}
    for name in names:
        changes = {} if name == "base" else dict(field.split("=") for field in name.split("/"))
        found[name] = dataclasses.replace(base, **{key: int(value) for key, value in changes.items()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", help=Case.__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--configs", nargs="+", default=["base"], help=candidates.__doc__)
    parser.add_argument("--form", choices=FORMS, default="default", help="as deterministic= asks for (default: None)")
    parser.add_argument("--parts", action="store_true", help="time the kernels one by one, too")
    parser.add_argument("--peer", choices=["fa4"], help="take turns with FlashAttention-4, too, where it is installed")
    parser.add_argument("--no-check", dest="check", action="store_false")
    parser.add_argument("--seconds", type=float, default=0.05, help="of device time for each of three rounds")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    dtype = jnp.dtype(options.dtype)
    results = []
    for text in options.cases:
        for row in measure(Case.parse(text), dtype, options):
            results.append(row)
            outcome = row.get("failure") or f"{row['seconds'] * 1e3:9.3f} ms {row['tflops']:7.1f} TFLOP/s"
            print(f"{text:32s} {row['name']:36s} {outcome}{ratios(row)}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
