"""Every Hopper kernel once, on small odd sizes: for compute-sanitizer, which watches what they read and write.

    compute-sanitizer --tool memcheck python -m ring_jax.bench.small
    compute-sanitizer --tool racecheck python -m ring_jax.bench.small "gated delta" convolution

takes the cases whose names begin so, all by default. Nothing is compared: that is what tests are for, whose references
would be watched, too.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ring_jax.flash import flash_attention
from ring_jax.flash.hopper import forward_launch
from ring_jax.flash.hopper.config import forward_config
from ring_jax.flash.operands import BlockOptions, Bounds
from ring_jax.flash.paged import paged_attention
from ring_jax.gdn import Heads, gated_delta_rule
from ring_jax.gdn.hopper import backward_launch, conv, decode, launch
from ring_jax.moe.hopper import backend, dense, top_k
from ring_jax.nn.hopper import chain, few_rows, heads
from ring_jax.nn.norm import Normed

Run = tuple[Callable[..., Any], tuple[Any, ...]]  # a function and its operands
HEADS = Heads(8, 16, 128, 128)


def normal(*shape: int, dtype: Any = jnp.bfloat16, scale: float = 1.0) -> np.ndarray:
    values = np.random.default_rng(sum(shape)).normal(scale=scale, size=shape)
    return values.astype(jnp.dtype(dtype))


def gradients(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Results, and gradients of the sum of the first one's squares by the first `count` operands."""

    def loss(*operands):
        found = function(*operands)
        first = found[0] if isinstance(found, tuple) else found
        return jnp.sum(jnp.square(first.astype(jnp.float32))), found

    return jax.grad(loss, argnums=tuple(range(count)), has_aux=True)


def attention(size: int, deterministic: bool) -> Run:
    """Two documents, a carry, queries and keys of odd lengths."""
    time, keys = 200, 328
    position = np.arange(time)
    start = np.where(position < 90, 0, 150).astype(np.int32)[None]
    end = np.minimum(position + 140, keys).astype(np.int32)[None]
    carry = normal(1, time, 4, size, dtype=jnp.float32), normal(1, time, 4, dtype=jnp.float32)

    def run(query, key, value):
        options: Any = {"implementation": "mosaic", "deterministic": deterministic, "carry": carry}
        return flash_attention(query, key, value, start, end, **options)

    shapes = (1, time, 4, size), (1, keys, 2, size), (1, keys, 2, size)
    return gradients(run, 3), tuple(normal(*shape) for shape in shapes)


def several_tiles() -> Run:
    """Blocks that walk over query tiles, the last block over fewer, and a rounded result."""
    config = dataclasses.replace(forward_config(128, 128), tiles_per_block=3)
    options: Any = {"options": BlockOptions(0.1), "carry": None, "out_dtype": jnp.bfloat16, "config": config}
    bounds = Bounds(np.zeros((1, 600), np.int32), np.arange(1, 601, dtype=np.int32)[None])
    run = functools.partial(forward_launch.forward, bounds=bounds, **options)
    return run, (normal(1, 600, 4, 128), normal(2, 1, 600, 2, 128))


def paged() -> Run:
    table = np.arange(3 * 5, dtype=np.int32).reshape(3, 5) % 7
    run = functools.partial(paged_attention, implementation="mosaic", layer=1)
    return run, (normal(3, 1, 8, 128), normal(2, 2, 7, 64, 2, 128), table, np.array([0, 77, 300], np.int32))


def rule_operands(time: int, size: int) -> tuple[np.ndarray, ...]:
    shapes = (1, time, 2, size), (1, time, 2, size), (1, time, 4, size)
    arrays = [normal(*shape, scale=size**-0.5) for shape in shapes]
    decay = -np.abs(normal(1, time, 4, dtype=jnp.float32))
    return *arrays, decay, np.full((1, time, 4), 0.5, np.float32), normal(1, 4, size, size, dtype=jnp.float32)


def rule(implementation: str, size: int, documents: bool) -> Run:
    operands = rule_operands(193, size)
    ids = np.searchsorted([64, 130], np.arange(193), side="right").astype(np.int32)[None] if documents else None

    def run(*arrays):
        options: Any = {"implementation": implementation, "segment_ids": ids}
        return gated_delta_rule(*arrays[:-1], initial_state=arrays[-1], **options)

    return (gradients(run, 6) if implementation == "mosaic" else run), operands


def pieces() -> Run:
    return functools.partial(launch.forward, scale=0.1, pieces=3), rule_operands(700, 128)[:5]


def entering_gradient() -> Run:
    def run(*arrays):
        prepared = backward_launch.prepare(arrays, arrays[2], scale=0.1, segment_ids=None)
        return backward_launch.entering_gradient(prepared)

    return run, rule_operands(193, 128)[:5]


def convolution(*shape: int) -> Run:
    """Over q | k | v, or over projections by key heads."""
    ids = np.searchsorted([5, 64, 100], np.arange(133), side="right").astype(np.int32)[None]
    run = functools.partial(conv.convolve, heads=HEADS, segment_ids=ids)
    return gradients(lambda x, w, tail: run(x, w, tail=tail), 3), (
        normal(1, 133, *shape),
        normal(4, HEADS.features),
        normal(1, 3, HEADS.features),
    )


def decode_step(batch: int) -> Run:
    n, (keys, _, values) = HEADS.value_heads, HEADS.parts
    gates = normal(n, dtype=jnp.float32)
    filters = normal(4, keys), normal(4, keys), normal(4, values)
    weights = decode.StepWeights(filters, gates, gates, normal(128, dtype=jnp.float32))
    run = functools.partial(decode.step, heads=HEADS)
    state = normal(batch, n, 128, 128, dtype=jnp.float32)
    projected = normal(batch, 1, HEADS.key_heads, HEADS.stride)
    return run, (projected, state, normal(batch, 3, HEADS.features), weights)


def experts(tokens: int) -> Run:
    rng = np.random.default_rng(0)
    chosen = np.stack([rng.permutation(8)[:2] for _ in range(tokens)]).astype(np.int32)
    weights = np.full((tokens, 2), 0.5, np.float32)
    shapes = (tokens, 256), (8, 256, 2, 128), (8, 128, 256)

    def run(x, up, down):
        return backend.run_experts(x, up, down, jnp.asarray(weights), jnp.asarray(chosen))

    return gradients(run, 3), tuple(normal(*shape, scale=0.1) for shape in shapes)


def few_rows_product(rows: int) -> Run:
    def run(x, weight, w, added):
        return few_rows.product(Normed(x, weight, 1e-6), w, added=added)

    return run, (normal(rows, 1024), normal(1024), normal(1024, 2048, scale=0.03), normal(rows, 2048))


def queries_and_keys() -> Run:
    run = functools.partial(heads.queries_and_keys, group=4, epsilon=1e-6)
    angles = normal(1, 77, 32, dtype=jnp.float32)
    return run, (normal(1, 77, 2 * (2 * 4 + 2) * 128), normal(128), normal(128), angles, angles)


def between_mixers() -> Run:
    k, d, m, f = 512, 256, 768, 192
    shapes = (k,), (d,), (k, d), (d,), (d, 2 * m), (m, d), (d,), (d, f)
    run = functools.partial(chain.between_mixers, epsilon=1e-6)
    return run, (*(normal(*shape, scale=0.1) for shape in shapes), np.zeros(2, np.int32))


CASES: dict[str, Callable[[], Run]] = {
    **{f"attention, heads of {n}": functools.partial(attention, n, True) for n in (64, 128, 256)},
    "attention, fused backward": lambda: attention(128, False),
    "attention, several tiles": several_tiles,
    "paged attention": paged,
    "gated delta rule": lambda: rule("mosaic", 128, False),
    "gated delta rule, documents, heads of 64": lambda: rule("mosaic", 64, True),
    "gated delta rule, split operands": lambda: rule("mosaic_split", 128, False),
    "gated delta rule, transition": lambda: (launch.transition, rule_operands(193, 128)[1:5]),
    "gated delta rule, pieces": pieces,
    "gated delta rule, entering gradient": entering_gradient,
    "convolution": lambda: convolution(HEADS.features),
    "convolution, by key heads": lambda: convolution(HEADS.key_heads, HEADS.stride),
    "decode step, one row": lambda: decode_step(1),
    "decode step, walking": lambda: decode_step(34),
    "experts": lambda: experts(77),
    "experts, one token": lambda: experts(1),
    "top-k": lambda: (functools.partial(top_k.top_k, k=8), (np.abs(normal(70, 256, dtype=jnp.float32)),)),
    "swiglu": lambda: (gradients(dense.swiglu, 2), (normal(300, 256), normal(256, 512, scale=0.1))),
    "few rows": lambda: few_rows_product(3),
    "queries and keys": queries_and_keys,
    "between mixers": between_mixers,
}


def main(*names: str) -> None:
    for name, case in CASES.items():
        if not names or name.startswith(names):
            run, operands = case()
            jax.tree.map(np.asarray, jax.jit(run)(*operands))
            print(name, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
