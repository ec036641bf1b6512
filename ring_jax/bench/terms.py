"""`ring-jax plan --check`: every term of a plan measured alone on this machine, then whole passes, beside what the plan says.

Each term runs as it does in the model, in a jitted stack of some layers (dispatch is amortised), on random data. Correctness is the
business of the other benches; here only time counts. Over several GPUs the sequence is spread.
"""

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ring_jax
from ring_jax import gdn, plan
from ring_jax.bench import model as model_bench
from ring_jax.bench import ring
from ring_jax.context.cost import costs
from ring_jax.models.qwen3_5 import Config
from ring_jax.moe.hopper import dense
from ring_jax.nn.hopper import few_rows
from ring_jax.plan.machine import Machine
from ring_jax.plan.result import duration

LAYERS = 4  # of a stack


class Term(NamedTuple):
    """One comparison: what, seconds said by the plan, seconds measured."""

    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted / self.measured - 1

    def __str__(self) -> str:
        return f"{self.name:52s} {duration(self.predicted):>10s} {duration(self.measured):>10s} {self.error:+7.1%}"


def compare(config: Config, name: str, tokens: int, machine: Machine, repeats: int = 3) -> Iterator[Term]:
    """All terms, one after the other.

    Args:
        config, name: the model. tokens: of the one row. machine: as many GPUs along "context" as there are here.
    """
    for term in (_products, _weights_read, _memory, _attention, _rule, _transfer):
        for label, predicted, call, layers in term(config, tokens, machine):
            yield Term(label, predicted, seconds(call, repeats) / layers)
            jax.clear_caches()
    yield from _passes(config, name, tokens, machine, repeats)


def seconds(call: Callable[[], Any], repeats: int, least: float = 0.03) -> float:
    """Median time of a call, two and more behind each other, for `least` seconds: the host starts the next one meanwhile."""
    jax.block_until_ready(call())
    begin = time.perf_counter()
    jax.block_until_ready(call())
    queued = max(2, math.ceil(least / (time.perf_counter() - begin)))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(queued):
            last = call()
        jax.block_until_ready(last)
        times.append((time.perf_counter() - begin) / queued)
    return statistics.median(times)


def _normal(shape, seed: int = 0, scale: float = 1.0, dtype: Any = jnp.bfloat16):
    return jax.jit(lambda key: scale * jax.random.normal(key, shape, dtype))(jax.random.key(seed))


def _products(config: Config, tokens: int, machine: Machine):
    """An MLP of the model as the model computes it; on one GPU."""
    width, hidden = config.hidden_size, config.mlp_size or 4 * config.hidden_size
    tokens = min(tokens, 32768)
    x, up, down = _normal((tokens, width)), _normal((width, 2 * hidden), 1, 0.02), _normal((hidden, width), 2, 0.02)

    @jax.jit
    def run(x, up, down):
        swiglu = dense.swiglu if dense.worthwhile(x, up.shape[1]) else lambda x, up: dense.combine(x @ up)
        return lax.scan(lambda x, _: (x + swiglu(x, up) @ down, None), x, None, length=LAYERS)[0]

    predicted = 6.0 * tokens * width * hidden / machine.gpu.product_flops
    yield f"MLP {width} x {hidden}, {tokens} rows", predicted, functools.partial(run, x, up, down), LAYERS


def _weights_read(config: Config, tokens: int, machine: Machine):
    """Products of one row with weights of their own, as in decode."""
    width, hidden = config.hidden_size, 2 * (config.mlp_size or 4 * config.hidden_size)
    count = 8
    weights = _normal((count, width, hidden), 3, 0.02)
    x = _normal((1, width))

    @jax.jit
    def run(x, weights):
        product = few_rows.product if few_rows.worthwhile(x, weights[0]) else jnp.matmul
        for i in range(count):
            x = x + product(x, weights[i])[:, :width]
        return x

    gpu = machine.gpu
    predicted = 2.0 * width * hidden / (gpu.memory_bytes_per_s * gpu.weight_share)
    yield f"weights {width} x {hidden} read by one row", predicted, functools.partial(run, x, weights), count


def _memory(config: Config, tokens: int, machine: Machine):
    """A norm's worth of reading and writing."""
    x = _normal((min(tokens, 32768), config.hidden_size))

    @jax.jit
    def run(x):
        def layer(x, _):
            y = x.astype(jnp.float32)
            y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
            return y.astype(x.dtype), None

        return lax.scan(layer, x, None, length=8 * LAYERS)[0]

    bytes_per_s = machine.gpu.memory_bytes_per_s * machine.gpu.stream_share
    yield f"norm of {x.shape[0]} x {x.shape[1]}", 2.0 * x.nbytes / bytes_per_s, functools.partial(run, x), 8 * LAYERS


def _attention(config: Config, tokens: int, machine: Machine):
    """Causal, forward and with gradients, over the context ranks."""
    ranks, gpu, head = machine.size("context"), machine.gpu, config.head_dim
    heads = {"query_heads": config.num_heads, "kv_heads": config.num_kv_heads, "head_size": head}
    context = ring.make_context(ranks, "ring")
    operands = ring.draw(context, tokens, config.num_heads, config.num_kv_heads, head, LAYERS)
    for gradients in (False, True):
        work = 3.5 * gpu.attention_rate(head) / gpu.attention_rate(head, backward=True) if gradients else 1.0
        shape = {"query_len": tokens, "key_len": tokens, "ranks": ranks, "gpu": gpu, **heads}
        found = costs(**shape, work=work, moved=4.0 if gradients else 1.0)["ring"].seconds
        found += ranks * (gpu.hop_seconds[1] - gpu.hop_seconds[0]) if gradients and ranks > 1 else 0.0
        copied = gpu.attention_copies[gradients] * tokens / ranks * config.num_heads * head * 2
        found += copied / (gpu.memory_bytes_per_s * gpu.stream_share)
        f = ring.stack(context, True, LAYERS, gradients)
        label = f"attention {'forward + backward' if gradients else 'forward'}, ring over {ranks}"
        yield label, found, functools.partial(f, *operands), LAYERS


def _rule(config: Config, tokens: int, machine: Machine):
    """The gated delta rule, forward and with gradients; over ranks by passing states."""
    ranks, heads = machine.size("context"), config.linear
    context = ring.make_context(ranks, "ring") if ranks > 1 else None
    spread = {"context": context, "strategy": "state"} if ranks > 1 else {}
    shapes = [(1, tokens, heads.key_heads, heads.key_size)] * 2 + [(1, tokens, heads.value_heads, heads.value_size)]
    query, key, value = (_normal(shape, i, shape[-1] ** -0.5) for i, shape in enumerate(shapes))
    decay = -jnp.abs(_normal((1, tokens, heads.value_heads), 4, 0.1, jnp.float32))
    beta = jax.nn.sigmoid(_normal((1, tokens, heads.value_heads), 5))
    operands = [query, key, value, decay, beta]
    if context is not None:
        operands = [jax.device_put(x, NamedSharding(context.mesh, P(None, "context"))) for x in operands]

    def forward(query, key, value, decay, beta):
        def layer(value, _):
            return ring_jax.gated_delta_rule(query, key, value, decay, beta, **spread)[0], None

        return lax.scan(layer, value, None, length=LAYERS)[0]

    loss = lambda *x: jnp.sum(forward(*x).astype(jnp.float32) ** 2)  # noqa: E731
    shape = gdn.GDNShape(1, tokens, heads, conv_width=1)
    seconds = gdn.costs(shape, ranks, "zigzag", machine.gpu)["state"].seconds()
    both = seconds + gdn.cost.backward_seconds(tokens / ranks, 1, heads, machine.gpu, passes=ranks > 1)
    yield f"gated delta rule forward over {ranks}", seconds, functools.partial(jax.jit(forward), *operands), LAYERS
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))
    yield f"gated delta rule forward + backward over {ranks}", both, functools.partial(gradient, *operands), LAYERS


def _transfer(config: Config, tokens: int, machine: Machine):
    """One permute of a rank's keys and values, and one gather of all of them."""
    ranks = machine.size("context")
    if ranks == 1:
        return
    mesh = ring.make_context(ranks, "ring").mesh
    rows = max(tokens // ranks, 8)
    spread = NamedSharding(mesh, P("context"))
    x = jax.device_put(_normal((ranks * rows, 2 * config.num_kv_heads * config.head_dim)), spread)
    turn = [(i, (i + 1) % ranks) for i in range(ranks)]

    def permutes(x):
        return lax.scan(lambda x, _: (lax.ppermute(x, "context", turn), None), x, None, length=LAYERS)[0]

    def gathers(x):
        def layer(x, _):
            whole = lax.all_gather(x, "context", tiled=True)
            return x + lax.dynamic_slice_in_dim(whole, rows * lax.axis_index("context"), rows), None

        return lax.scan(layer, x, None, length=LAYERS)[0]

    for name, f, parts in (("permute", permutes, 1), ("gather", gathers, ranks - 1)):
        received = parts * x.nbytes / ranks
        run = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("context"), out_specs=P("context")))
        label = f"{name} of {x.nbytes / ranks / 2**20:.0f} MiB a rank"
        yield label, machine.wait(received, 1, machine.link("context")), functools.partial(run, x), LAYERS


def _passes(config: Config, name: str, tokens: int, machine: Machine, repeats: int) -> Iterator[Term]:
    """Prefill and decode of the whole model."""
    ranks = machine.size("context")
    said = plan.predict(config, tokens=tokens, mesh=machine.mesh, gpu=machine.gpu, weights="none")
    args = argparse.Namespace(
        ranks=ranks, remat="attention", checkpoint=None, batch=1, repeats=repeats, steps=16, profile=False
    )
    programs = model_bench.Programs(model_bench.make_model(config, args))
    for one, measure in ((said.prefill, model_bench.prefill), (said.decode, model_bench.decode)):
        row, _ = measure(programs, args, tokens)
        yield Term(f"{name} {one.name}, {tokens} tokens, {ranks} GPU(s)", one.seconds, row["ms"] / 1e3)
