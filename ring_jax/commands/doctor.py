"""``ring-jax doctor``: versions, devices, mesh, links, what runs here, a self-check against the reference, advice."""

import argparse
import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ring_jax._arrays import on_host
from ring_jax.cli import CommandError, find_devices
from ring_jax.commands import doctor_layers

LONGEST = 8192  # of the self-check: the reference forms all scores at once
PACKAGES = ("ring-jax", "jax", "jaxlib", "flax", "numpy", "orbax-checkpoint", "jax-cuda12-plugin", "jax-cuda13-plugin")
# Largest error over the largest value: a few units of the dtype's rounding, and room for a long sum.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seq-len",
        type=int,
        default=512,
        metavar="S",
        help=f"length of the self-check, up to {LONGEST} (default: 512)",
    )


def run(args: argparse.Namespace) -> int:
    if not 1 <= args.seq_len <= LONGEST:
        raise CommandError(f"--seq-len must be from 1 to {LONGEST}, got {args.seq_len}")
    devices = find_devices()
    print_versions()
    print_devices(devices)
    print_links(devices)
    print_choices()
    ok = check_implementations(args.seq_len)
    ok &= check_strategies(devices, args.seq_len)
    ok &= check_layers(args.seq_len)
    print("advice")
    for line in advice(devices):
        print(f"  - {line}")
    print("all that runs here agrees with the reference" if ok else "FAILED: something disagrees with the reference")
    return 0 if ok else 1


def print_versions() -> None:
    installed = {name: _version(name) for name in PACKAGES}
    listed = ", ".join(f"{name} {version}" for name, version in installed.items() if version)
    print(f"versions  Python {platform.python_version()}, {listed}")


def print_devices(devices: list[Any]) -> None:
    import jax

    first = devices[0]
    emulated = " (emulated on one CPU)" if first.platform == "cpu" and len(devices) > 1 else ""
    memory = (first.memory_stats() or {}).get("bytes_limit") if first.platform != "cpu" else None
    size = f", {memory / 2**30:.0f} GiB each for jax" if memory else ""
    print(f"devices   {len(devices)} x {first.device_kind} on {first.platform}{emulated}{size}")
    print(f"mesh      ('context',) of {len(devices)}, {jax.process_count()} process(es)")


def print_links(devices: list[Any]) -> None:
    if devices[0].platform != "gpu":
        print("links     memory of this host")
        return
    topology = _output("nvidia-smi", "topo", "-m")
    rows = [line.rstrip() for line in topology.splitlines() if line.lstrip().startswith("GPU")]
    print("links     " + ("\n          ".join(rows) if rows else "unknown: nvidia-smi topo -m gives nothing"))


def print_choices() -> None:
    """Which block implementation=None picks here, and why none before it."""
    import jax

    from ring_jax.flash.backends import PREFERENCE, FixedMask, select, unsupported_reason
    from ring_jax.flash.operands import BlockOptions

    print("implementation=None picks")
    cases: list[tuple[str, int, FixedMask | None]] = [
        ("bfloat16", 128, "causal"),
        ("bfloat16", 256, "full"),
        ("bfloat16", 128, None),
        ("float32", 128, "causal"),
    ]
    for dtype, head_size, fixed_mask in cases:
        shapes: list[Any] = [jax.ShapeDtypeStruct((*n, 64, 2, head_size), dtype) for n in ((1,), (2, 1))]
        inputs = *shapes, BlockOptions(head_size**-0.5), fixed_mask
        chosen = select(None, *inputs).name
        passed = PREFERENCE[: PREFERENCE.index(chosen)]
        reasons = "; ".join(f"{name} {unsupported_reason(name, *inputs)}" for name in passed)
        mask = fixed_mask or "any other mask"
        print(f"  {dtype}, head size {head_size}, {mask}: {chosen}" + (f" ({reasons})" if reasons else ""))
    for line in doctor_layers.choices():
        print(f"  {line}")


def check_implementations(seq_len: int) -> bool:
    """Forward and gradients of every flash implementation against float32 `reference`; True where all agree."""
    import jax
    import jax.numpy as jnp

    from ring_jax.flash import flash_attention
    from ring_jax.flash.backends import BACKENDS

    start, end = jnp.zeros((1, seq_len), jnp.int32), jnp.arange(1, seq_len + 1, dtype=jnp.int32)[None]

    def results(implementation: Any, arrays: Any) -> Any:
        def loss(arrays: Any) -> Any:
            query, key, value = arrays
            out, lse = flash_attention(query, key, value, start, end, implementation=implementation)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(lse)), (out, lse)

        grads, (out, lse) = jax.jit(jax.grad(loss, has_aux=True))(arrays)
        return [out, lse, *grads]

    print("implementations, causal, forward and gradients")
    arrays = _random_qkv(seq_len)
    want = results("reference", arrays)
    return _compare(BACKENDS, lambda name, dtype: results(name, tuple(x.astype(dtype) for x in arrays)), want)


def _compare(names: Iterable[str], run: Callable[[str, str], list[Any]], want: list[Any]) -> bool:
    """`run(name, dtype)` of each against what is wanted, a line each; True where all agree."""
    ok = True
    for name in names:
        for dtype in doctor_layers.DTYPES:
            try:
                got = run(name, dtype)
            except NotImplementedError as reason:
                print(f"  {name:<14} {dtype:<9} does not run: {reason}")
                continue
            ok &= _report(f"{name:<14} {dtype:<9}", got, want, TOLERANCE[dtype])
    return ok


def check_strategies(devices: list[Any], seq_len: int) -> bool:
    """Every strategy on the zigzag layout against the reference on one device; True where all agree."""
    import jax
    import jax.numpy as jnp

    import ring_jax
    from ring_jax.context.strategies import STRATEGIES

    mesh = jax.sharding.Mesh(np.asarray(devices), ("context",))
    cp = ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh)
    arrays = _random_qkv(seq_len, heads=2 * len(devices))
    bounds = jnp.zeros((1, seq_len), jnp.int32), jnp.arange(1, seq_len + 1, dtype=jnp.int32)[None]
    want = ring_jax.flash_attention(*arrays, *bounds, implementation="reference")[0]

    print(f"strategies, causal, zigzag over {len(devices)} device(s)")
    ok = True
    for strategy in STRATEGIES:
        if strategy == "ring_ulysses":  # takes two mesh axes
            continue

        def attend(arrays: Any, strategy: Any = strategy) -> Any:
            query, key, value = (cp.to_layout(x) for x in arrays)
            out = ring_jax.ring_attention(
                query, key, value, is_causal=True, context=cp, seq_len=seq_len, strategy=strategy
            )
            assert isinstance(out, jax.Array)
            return cp.from_layout(out, seq_len)

        try:
            got = jax.jit(attend)(arrays)
        except (NotImplementedError, ValueError) as reason:
            print(f"  {strategy:<14} does not run: {reason}")
            continue
        ok &= _report(f"{strategy:<14}", [got], [want], TOLERANCE["float32"])
    return ok


def check_layers(seq_len: int) -> bool:
    """Every implementation of the gated delta rule and of the experts against float32; True where all agree."""
    ok = True
    for what, make in (("gated delta rule", doctor_layers.rules), ("experts", doctor_layers.experts)):
        print(f"{what}, forward")
        ok &= _compare(*make(seq_len))
    return ok


def advice(devices: list[Any]) -> list[str]:
    """What would make this installation faster or more complete."""
    lines = []
    if devices[0].platform == "cpu":
        if _output("nvidia-smi", "-L"):
            lines.append(
                "this host has an NVIDIA GPU that jax does not use: pip install 'ring-jax[cuda13]' (or cuda12)"
            )
        lines.append("emulated devices show correctness and communication, not speed: they share this CPU")
    elif len(devices) == 1:
        lines.append("one device makes a ring of one; ring attention pays from two")
    if devices[0].platform == "gpu" and len(devices) > 1:
        lines.append(
            "one process over NVLink: XLA_FLAGS=--xla_gpu_collective_permute_mode=peer moves KV with copy engines, "
            "faster than NCCL from about 16 MiB a hop (an XLA that does not know a flag stops at start-up)"
        )
    if platform.python_version_tuple()[:2] == ("3", "11"):
        lines.append("jax 0.10.2 is the last for Python 3.11: take 3.12 or newer for the newest jax")
    if importlib.util.find_spec("tokenizers") is None or importlib.util.find_spec("jinja2") is None:
        lines.append("`ring-jax generate` needs pip install 'ring-jax[cli]'")
    return lines


def _random_qkv(seq_len: int, heads: int = 4, head_dim: int = 64) -> tuple[Any, Any, Any]:
    import jax.numpy as jnp

    random = np.random.default_rng(0)
    shapes = ((1, seq_len, n, head_dim) for n in (heads, heads // 2, heads // 2))
    # Values that bfloat16 holds exactly, so that every dtype starts from the same input.
    return tuple(jnp.asarray(random.standard_normal(s), jnp.bfloat16).astype(jnp.float32) for s in shapes)  # type: ignore[return-value]


def _report(label: str, got: list[Any], want: list[Any], tolerance: float) -> bool:
    error = 0.0
    for a, b in zip(got, want, strict=True):
        a, b = on_host(a).astype(np.float64), on_host(b).astype(np.float64)
        error = max(error, float(np.abs(a - b).max() / np.abs(b).max()))
    ok = error <= tolerance
    print(f"  {label} {'agrees' if ok else 'DISAGREES'}, relative error {error:.1e} (allowed {tolerance:g})")
    return ok


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
