"""Times the forward flash-attention kernel on one GPU beside cuDNN: `python -m ring_jax.bench.flash_forward --help`.

Every case is first compared with a float32 reference on fresh random inputs. Times are of the device: many calls are
queued behind each other, and ours and cuDNN's take turns, so that heat hits both; a turn begins with as many untimed calls, since the
first ones run at the clock that the kernel before has left. TFLOP/s count 4 H multiply-adds per query-key pair that the mask leaves.
--peer fa4 has FlashAttention-4 in the turns, in this process (XLA_PYTHON_CLIENT_PREALLOCATE=false leaves it memory).
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ring_jax._progress import track
from ring_jax.bench import torch_peers
from ring_jax.flash.hopper import forward_launch
from ring_jax.flash.hopper.config import ForwardConfig, forward_config
from ring_jax.flash.operands import BlockOptions, Bounds


@dataclasses.dataclass(frozen=True)
class Case:
    """batch,length,query heads,key-value heads,head size,mask; masks: full, causal, window:W, documents:N,
    hop:earlier and hop:later (one hop of a causal zigzag ring, `length` tokens a rank)."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_size: int
    mask: str

    @classmethod
    def parse(cls, text: str) -> "Case":
        batch, length, heads, kv_heads, head_size, mask = text.split(",")
        return cls(int(batch), int(length), int(heads), int(kv_heads), int(head_size), mask)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """key_start and key_end, [B, T]."""
        position = np.arange(self.length)
        kind, _, argument = self.mask.partition(":")
        start = np.zeros_like(position)
        if kind == "full":
            end = np.full_like(position, self.length)
        elif kind == "causal":
            end = position + 1
        elif kind == "window":
            start, end = np.maximum(position + 1 - int(argument), 0), position + 1
        elif kind in ("documents", "documents-full"):
            size = self.length // int(argument)
            start = position // size * size
            end = position + 1 if kind == "documents" else start + size
        elif self.mask == "hop:earlier":  # its first half is before all of ours, its second half after
            end = np.full_like(position, self.length // 2)
        elif self.mask == "hop:later":  # only our second half is behind it
            end = np.where(position < self.length // 2, 0, self.length)
        else:
            raise ValueError(
                f"mask must be full, causal, window:W, documents:N, documents-full:N, hop:earlier or hop:later, got {self.mask!r}"
            )
        rows = (self.batch, self.length)
        return np.broadcast_to(start, rows).astype(np.int32), np.broadcast_to(end, rows).astype(np.int32)

    @property
    def is_hop(self) -> bool:
        return self.mask.startswith("hop:")

    @property
    def peer_shape(self) -> str:
        """As `torch_peers` takes it for FlashAttention-4."""
        sizes = self.batch, self.length, self.heads, self.kv_heads, self.head_size
        return "x".join(map(str, (*sizes, self.mask)))

    def flops(self) -> float:
        start, end = self.bounds()
        return 4.0 * self.head_size * self.heads * float((end.astype(np.int64) - start).sum())

    def flops_of(self, name: str) -> float:
        """Of the row `name`: cuDNN's is the same work as ours, but for a hop, which it is given as full attention."""
        return (dataclasses.replace(self, mask="full") if self.is_hop and name == "cudnn" else self).flops()

    def inputs(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(jax.random.key(time.time_ns() % 2**31), 2)
        query = jax.random.normal(keys[0], (self.batch, self.length, self.heads, self.head_size), dtype)
        return query, jax.random.normal(keys[1], (2, self.batch, self.length, self.kv_heads, self.head_size), dtype)


def materialised(query, kv, key_start, key_end, scale, dtype) -> tuple[jax.Array, jax.Array]:
    """The plain formula with inputs, logits and probabilities in `dtype`."""
    group = query.shape[2] // kv.shape[3]
    key, value = (jnp.repeat(x.astype(dtype), group, axis=2) for x in kv)
    exact = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("btnh,bsnh->bnts", query.astype(dtype), key, precision=exact) * jnp.asarray(scale, dtype)
    position = jnp.arange(kv.shape[2])
    visible = (position >= key_start[..., None]) & (position < key_end[..., None])
    logits = jnp.where(visible[:, None], logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    p = jnp.exp(logits - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None].astype(dtype))
    return jnp.einsum("bnts,bsnh->btnh", p, value, precision=exact), jnp.swapaxes(lse, 1, 2)


def relative_error(out, expected) -> float:
    out, expected = np.asarray(out, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))


def check(case: Case, dtype, config: ForwardConfig | None) -> tuple[float, float]:
    """(our error, error of the materialised form in the same precision) at up to 2048 positions."""
    small = dataclasses.replace(case, length=min(case.length, 2048), heads=case.heads // case.kv_heads, kv_heads=1)
    query, kv = small.inputs(dtype)
    bounds = tuple(map(jnp.asarray, small.bounds()))
    scale = case.head_size**-0.5
    expected, expected_lse = jax.jit(materialised, static_argnums=(4, 5))(query, kv, *bounds, scale, jnp.float32)
    same, _ = jax.jit(materialised, static_argnums=(4, 5))(query, kv, *bounds, scale, dtype)
    attend = functools.partial(forward_launch.forward, carry=None, options=BlockOptions(scale), config=config)
    out, lse = jax.jit(attend)(query, kv, Bounds(*bounds))
    error, allowed = relative_error(out, expected), relative_error(same, expected)
    lse_error = float(jnp.abs(lse - expected_lse).max())
    if not (error <= 2 * allowed and lse_error < 1e-3):
        raise AssertionError(f"{case}: error {error}, same-precision reference {allowed}, LSE error {lse_error}")
    return error, allowed


def seconds(calls: dict[str, Callable[[], Any]], budget: float, rounds: int = 3) -> dict[str, float]:
    """Median seconds a call, the calls taking turns."""
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        begin = time.perf_counter()
        jax.block_until_ready([call() for _ in range(3)])
        repeats[name] = max(3, int(budget * 3 / (time.perf_counter() - begin)))
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(2):  # the first time to warm the card
                begin = time.perf_counter()
                for _ in range(repeats[name]):
                    last = call()
                jax.block_until_ready(last)
            times[name].append((time.perf_counter() - begin) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}


def cudnn_call(case: Case, query, kv) -> Callable[[], Any]:
    """cuDNN on the same case; documents as a batch of dense causal or full sequences of their length, a hop as full."""
    kind, _, argument = case.mask.partition(":")
    if kind.startswith("documents"):
        parts = case.batch * int(argument)
        query = query.reshape(parts, -1, *query.shape[2:])
        kv = kv.reshape(2, parts, -1, *kv.shape[3:])
    causal = kind in ("causal", "window", "documents")
    window = (int(argument) - 1, 0) if kind == "window" else None
    attend = jax.jit(
        lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, local_window_size=window, implementation="cudnn"
        )
    )
    key, value = kv[0] + 0, kv[1] + 0
    return lambda: attend(query, key, value)


class Queued:
    """Stands for what a call of PyTorch returns: waiting for it waits for all of the device's work."""

    def __init__(self, synchronize: Callable[[], None]):
        self.block_until_ready = synchronize


def fa4_call(case: Case, dtype, what: str) -> Callable[[], Queued]:
    """FlashAttention-4 on the same case, "forward" or "forward+backward"; its inputs are PyTorch's own."""
    import torch  # type: ignore[import-not-found]

    if case.mask not in ("full", "causal"):
        raise ValueError(f"--peer fa4 has the masks full and causal, got {case.mask}")
    found = torch_peers.fa4(torch, jnp.dtype(dtype).name, case.peer_shape)
    call = next(call for name, _, call in found if name == what)

    def queue() -> Queued:
        call()
        return Queued(torch.cuda.synchronize)

    return queue


def started(calls: dict[str, Callable[[], Any]], case: Case, name: str, make: Callable[[], Callable[[], Any]], **facts):
    """A row of the report; what `make` gives is put into `calls` if it runs, else the row says why not."""
    row = {"case": dataclasses.asdict(case), "name": name, **facts}
    try:
        call = make()
        jax.block_until_ready(call())
        calls[name] = call
    except Exception as failure:  # one config of a search must not end the search
        row["failure"] = f"{type(failure).__name__}: {failure}"[:600]
    return row


def prepared(
    calls: dict[str, Callable[[], Any]],
    case: Case,
    configs: Mapping[str, Any],
    prepare: Callable[[Any], tuple[dict[str, Any], Callable[[], Any]]],
    **facts: Any,
) -> Iterator[dict[str, Any]]:
    """`started` for each config; `prepare(config)` gives (facts, call). Compilation is most of a search's time, and runs beside itself."""
    with ThreadPoolExecutor() as pool:
        futures = {name: pool.submit(prepare, config) for name, config in configs.items()}
        for name, future in track(futures.items(), "compile", unit="configs"):
            about = {"config": dataclasses.asdict(configs[name]), **facts}
            row = started(calls, case, name, lambda future=future: future.result()[1], **about)
            yield row if future.exception() else row | future.result()[0]


def measure(
    case: Case,
    dtype,
    configs: dict[str, ForwardConfig],
    out_dtype,
    budget: float,
    checked: bool = True,
    peer: bool = False,
) -> list[dict[str, Any]]:
    query, kv = case.inputs(dtype)
    bounds = tuple(map(jnp.asarray, case.bounds()))
    calls: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}

    def prepare(config):
        facts = {}
        if checked:
            facts["error"], facts["same_precision_error"] = check(case, dtype, config)
        options = BlockOptions(case.head_size**-0.5)
        attend = functools.partial(forward_launch.forward, options=options, config=config)
        bounds_of_rows = Bounds(*bounds)
        if case.is_hop:
            return facts, resumed(attend, query, kv, bounds_of_rows)
        attend = functools.partial(attend, carry=None, out_dtype=out_dtype)
        compiled = jax.jit(attend).lower(query, kv, bounds_of_rows).compile()
        return facts, functools.partial(compiled, query, kv, bounds_of_rows)

    rows |= {row["name"]: row for row in prepared(calls, case, configs, prepare)}
    rows["cudnn"] = started(calls, case, "cudnn", lambda: cudnn_call(case, query, kv))
    if peer:
        rows["fa4"] = started(calls, case, "fa4", lambda: fa4_call(case, dtype, "forward"))
    for name, value in seconds(calls, budget).items():
        rows[name].update(seconds=value, tflops=case.flops_of(name) / value / 1e12)
    add_ratios(rows)
    return list(rows.values())


def add_ratios(rows: dict[str, dict[str, Any]]) -> None:
    """How fast each row is beside cuDNN and, where it ran, FlashAttention-4."""
    for other in ("cudnn", "fa4"):
        if "tflops" in rows.get(other, {}):
            for row in rows.values():
                if "tflops" in row:
                    row[f"ratio_to_{other}"] = row["tflops"] / rows[other]["tflops"]


def ratios(row: dict[str, Any]) -> str:
    return "".join(f"  / {other} {row[key]:.3f}" for other in ("cudnn", "fa4") if (key := f"ratio_to_{other}") in row)


def resumed(attend, query, kv, bounds) -> Callable[[], Any]:
    """Calls that each resume the last one's float32 result in its own buffers, as a ring's hops do."""
    out = jnp.zeros(query.shape, jnp.float32)
    state = [(out, jnp.zeros(query.shape[:3]))]
    compiled = jax.jit(attend, donate_argnums=3).lower(query, kv, bounds, state[0]).compile()

    def call():
        state[0] = compiled(query, kv, bounds, state[0])
        return state[0][1] + 0  # the next call takes the buffers themselves

    return call


def candidates(head_size: int, names: list[str]) -> dict[str, ForwardConfig]:
    """The tuned config, changed by each of `names`: "base", or fields such as "block_kv=64/stages=3"."""
    base = forward_config(head_size, head_size)
    found = {}
    for name in names:
        fields = [] if name == "base" else [field.split("=") for field in name.split("/")]
        changes: dict[str, Any] = {
            key: value == "True" if value in ("True", "False") else int(value) for key, value in fields
        }
        found[name] = dataclasses.replace(base, **changes)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", help=f"{Case.__doc__}, optionally @config names, such as base")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out-dtype", default=None, help="default: the input dtype, as cuDNN writes")
    parser.add_argument("--configs", nargs="+", default=["base"], help=candidates.__doc__)
    parser.add_argument("--seconds", type=float, default=0.05, help="of device time for each of three rounds")
    parser.add_argument("--peer", choices=["fa4"], help="take turns with FlashAttention-4, too, where it is installed")
    parser.add_argument("--skip-check", action="store_true", help="do not compare with the reference first")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    dtype = jnp.dtype(options.dtype)
    results = []
    for text in options.cases:
        text, _, names = text.partition("@")
        case = Case.parse(text)
        configs = candidates(case.head_size, names.split("+") if names else options.configs)
        out_dtype = jnp.dtype(options.out_dtype or dtype)
        for row in measure(
            case, dtype, configs, out_dtype, options.seconds, not options.skip_check, bool(options.peer)
        ):
            results.append(row)
            outcome = row.get("failure") or (
                f"{row['seconds'] * 1e3:9.3f} ms {row['tflops']:7.1f} TFLOP/s{ratios(row)}"
            )
            print(f"{text:34s} {row['name']:44s} {outcome}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
