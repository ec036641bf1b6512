"""What `ring-jax bench gdn` runs: programs with fresh random inputs, the float64 results that they are held to, and their bounds.

A part of a GDN layer is a `Part`: `operands(case)`, `run(*operands)`, `oracle(*operands)` in whatever dtype comes, and what the
GPU has to multiply and move for it at least.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ring_jax.gdn import Heads, by_head, causal_convolution, gated_delta_rule
from ring_jax.gdn.convolved import l2_normalize
from ring_jax.gdn.hopper import conv, decode, launch
from ring_jax.gdn.hopper.config import SHARED_MEMORY_BYTES, ForwardConfig
from ring_jax.nn.gdn import gated_rms_norm

WIDTH = 4  # of the convolution
CHUNK = 64
BACKWARD = 3.25  # FLOPs of the backward over those of the forward of a value head, recomputation included


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of sequences; `text` is batch x length x value heads."""

    batch: int
    length: int
    heads: Heads

    @classmethod
    def parse(cls, text: str, key_heads: int, size: int) -> "Case":
        batch, length, heads = (int(number) for number in text.split("x"))
        return cls(batch, length, Heads(key_heads, heads, size, size))

    @property
    def text(self) -> str:
        return f"{self.batch}x{self.length}x{self.heads.value_heads}"

    def small(self, length: int) -> "Case":
        """One that the oracle takes seconds for, with the same sizes of heads."""
        group = self.heads.value_heads // self.heads.key_heads
        heads = dataclasses.replace(self.heads, key_heads=2, value_heads=2 * group)
        return Case(min(self.batch, 2), min(self.length, length), heads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Of a layer.

    Fields:
        what: its name. name: of the variant that is timed.
        case: shapes. checked: those that are compared with the oracle first.
        operands, run, oracle: see above; `run` may take its last operand's buffers (`donates`), and returns it last then.
        calls: how often `run` does the part.
        flops, bytes: of one, at least.
        bound: of the relative L2 error of each result.
    """

    what: str
    name: str
    case: Case
    checked: Case
    operands: Callable[[Case, Any], tuple[Any, ...]]
    run: Callable[..., Any]
    oracle: Callable[..., Any]
    flops: float
    bytes: float
    bound: float = 1e-2
    calls: int = 1
    donates: bool = False

    def seconds_at_peak(self, flops_per_second: float, bytes_per_second: float) -> float:
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


# -- the rule ------------------------------------------------------------------------------------------------------


def rule_operands(case: Case, dtype: Any, gradient: bool = False) -> tuple[jax.Array, ...]:
    """query, key, value, log_decay, beta with decays as trained models have them; the cotangent of the output."""

    def draw(key):
        keys, heads = jax.random.split(key, 8), case.heads
        shape = case.batch, case.length, heads.key_heads, heads.key_size
        q, k = (l2_normalize(jax.random.normal(each, shape)) for each in keys[:2])
        values = case.batch, case.length, heads.value_heads, heads.value_size
        v, dout = (jax.random.normal(each, values) for each in keys[2:4])
        a_log = jnp.log(4 * jax.random.uniform(keys[4], (1, 1, values[2])) + 0.01)
        steps = jax.random.normal(keys[5], values[:3]) + jax.random.normal(keys[6], (1, 1, values[2])) - 2
        decay, beta = -jnp.exp(a_log) * jax.nn.softplus(steps), jax.nn.sigmoid(jax.random.normal(keys[7], values[:3]))
        arrays = *(x.astype(dtype) for x in (q, k, v)), decay, beta
        return (*arrays, dout.astype(dtype)) if gradient else arrays

    return jax.jit(draw)(seed())


def rule_flops(case: Case, gradient: bool = False) -> float:
    """Of chunks of 64: K K^T and Q K^T for a key head; K S, Q S, K^T u, T y and P u for a value head."""
    heads = case.heads
    key_head = 4 * CHUNK * heads.key_size
    value_head = 6 * heads.key_size * heads.value_size + 4 * CHUNK * heads.value_size
    value_head *= 1 + BACKWARD * gradient
    return float(case.batch * case.length * (key_head * heads.key_heads + value_head * heads.value_heads))


def rule_bytes(case: Case, keys: int, values: int, gates: int) -> float:
    """Of so many arrays like the keys, the values and the gates, each read or written once."""
    heads, tokens = case.heads, case.batch * case.length
    features = keys * heads.key_heads * heads.key_size + values * heads.value_heads * heads.value_size
    return tokens * (2.0 * features + 4.0 * gates * heads.value_heads)


def rule(case: Case, implementation: str | None) -> Part:
    run = functools.partial(gated_delta_rule, implementation=implementation)
    return Part(
        what="forward",
        name=implementation or "ours",
        case=case,
        checked=case.small(777),
        operands=rule_operands,
        run=run,
        oracle=functools.partial(gated_delta_rule, implementation="reference"),
        flops=rule_flops(case),
        bytes=rule_bytes(case, 2, 2, 2),
    )


def _with_gradients(implementation: str | None):
    def run(*operands):
        *operands, dout = operands
        apply = lambda *x: gated_delta_rule(*x, implementation=implementation)[0]  # noqa: E731
        out, pull = jax.vjp(apply, *operands)
        return out, *pull(dout)

    return run


def rule_gradient(case: Case, implementation: str | None) -> Part:
    return Part(
        what="forward + backward",
        name=implementation or "ours",
        case=case,
        checked=case.small(300),
        operands=functools.partial(rule_operands, gradient=True),
        run=_with_gradients(implementation),
        oracle=_with_gradients("reference"),
        flops=rule_flops(case, gradient=True),
        bytes=rule_bytes(case, 6, 5, 6),
        bound=2e-2,
    )


def tuned_rules(case: Case) -> list[Part]:
    """The forward kernel with every config that fits; their one oracle is compiled once."""
    found, heads, part = [], case.heads, rule(case, "mosaic")
    choices = itertools.product((1, 2), (2, 3, 4), (True, False), (1, 2, 4, 8))
    for warpgroups, stages, pipelined, pieces in choices:
        registers = (240, 104) if warpgroups == 1 else (200, 88)
        config = ForwardConfig(
            state_warpgroups=warpgroups,
            stages=stages,
            state_registers=registers[0],
            scores_registers=registers[1],
            pipelined=pipelined,
        )
        fits = config.shared_memory_bytes(heads.key_size) <= SHARED_MEMORY_BYTES
        if fits and heads.value_size % config.value_columns == 0 and pieces * 8 <= max(case.length // 64, 8):
            run = functools.partial(launch.forward, scale=heads.key_size**-0.5, config=config, pieces=pieces)
            name = f"state_warpgroups={warpgroups}/stages={stages}/pipelined={pipelined}/pieces={pieces}"
            found.append(dataclasses.replace(part, name=name, run=run))
    return found


# -- convolution ---------------------------------------------------------------------------------------------------


def _convolution_operands(case: Case, dtype: Any, gradient: bool = False) -> tuple[Any, ...]:
    """Projections q, k, v, their filters, and the cotangents of the results."""

    def draw(key):
        parts, counts = case.heads.parts, (case.heads.key_heads,) * 2 + (case.heads.value_heads,)
        keys = iter(jax.random.split(key, 9))
        normal = lambda *shape: jax.random.normal(next(keys), shape).astype(dtype)  # noqa: E731
        mixed = tuple(normal(case.batch, case.length, size) for size in parts)
        weights = tuple(normal(WIDTH, size) for size in parts)
        if not gradient:
            return mixed, weights
        shapes = ((case.batch, case.length, n, f // n) for n, f in zip(counts, parts, strict=True))
        return mixed, weights, tuple(normal(*shape) for shape in shapes)

    return jax.jit(draw)(seed())


def _plain_convolution(mixed, weights, heads: Heads):
    results = []
    for x, w, size in zip(mixed, weights, (heads.key_size, heads.key_size, heads.value_size), strict=True):
        y = jax.nn.silu(causal_convolution(x, w)[0])
        y = y.reshape(*y.shape[:2], -1, size)
        results.append(y if len(results) == 2 else l2_normalize(y))
    return tuple(results)


def convolution(case: Case, gradient: bool, **configs: conv.ConvConfig) -> Part:
    def heads_of(mixed) -> Heads:
        keys, values = (mixed[i].shape[2] // case.heads.key_size for i in (0, 2))
        return dataclasses.replace(case.heads, key_heads=keys, value_heads=values)

    def ours(mixed, weights):
        return conv.convolve(mixed, weights, heads_of(mixed), **configs)[:3]

    def plain(mixed, weights):
        return _plain_convolution(mixed, weights, heads_of(mixed))

    def with_gradients(function):
        def run(mixed, weights, cotangents):
            out, pull = jax.vjp(function, mixed, weights)
            return out, pull(tuple(c.astype(o.dtype) for c, o in zip(cotangents, out, strict=True)))

        return run

    arrays = 5 if gradient else 2  # mixed and results; mixed, cotangents and gradients
    heads = dataclasses.replace(case.heads, key_heads=8, value_heads=16)
    return Part(
        what="convolution" + (" + backward" if gradient else ""),
        name="/".join(f"{field}={value}" for config in configs.values() for field, value in vars(config).items())
        or "ours",
        case=case,
        checked=Case(1, min(case.length, 777), heads),
        operands=functools.partial(_convolution_operands, gradient=gradient),
        run=with_gradients(ours) if gradient else ours,
        oracle=with_gradients(plain) if gradient else plain,
        flops=0.0,
        bytes=2.0 * arrays * case.batch * case.length * case.heads.features,
    )


def tuned_convolutions(case: Case, gradient: bool) -> list[Part]:
    key = "backward_config" if gradient else "config"
    choices = itertools.product((32, 64, 128, 256), (1, 2, 4, 8), (8, 4), (True, False))
    configs = (conv.ConvConfig(rows=r, unroll=u, vector=v, prefetch=p) for r, u, v, p in choices)
    oracle = convolution(case, gradient).oracle  # compiled once
    return [dataclasses.replace(convolution(case, gradient, **{key: config}), oracle=oracle) for config in configs]


# -- decode --------------------------------------------------------------------------------------------------------


def _decode_operands(case: Case, dtype: Any, layers: int) -> tuple[Any, ...]:
    """Projections by key heads, tail, weights, stacked states."""

    def draw(key):
        heads, batch = case.heads, case.batch
        keys = iter(jax.random.split(key, 9))
        normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
        n, dk, dv = heads.value_heads, heads.key_size, heads.value_size
        few = normal(batch, 1, heads.key_heads, heads.stride), normal(batch, WIDTH - 1, heads.features)
        conv = tuple(normal(WIDTH, size).astype(dtype) for size in heads.parts)
        weights = decode.StepWeights(conv, normal(n), normal(n) - 2, 1 + 0.1 * normal(dv))
        return *(x.astype(dtype) for x in few), weights, normal(layers, batch, n, dk, dv)

    return jax.jit(draw)(seed())


def decode_step(case: Case, config: decode.DecodeConfig | None = None) -> Part:
    """A step of as many layers as have states beyond the cache of the GPU, one after the other."""
    state = 4 * case.batch * case.heads.value_heads * case.heads.key_size * case.heads.value_size
    layers = max(2, -(-(80 << 20) // state))

    def ours(projected, tail, weights, states):
        options = dict(heads=_heads_of(case, weights), config=config)
        weights = jax.tree.map(lambda w: w[None], weights)
        tails = jnp.stack([tail] * states.shape[0])
        for layer in range(states.shape[0]):
            out, states, _ = decode.step(projected, states, tails, weights, at=(layer, 0), **options)
        return out, states

    def plain(projected, tail, weights, states):
        heads = _heads_of(case, weights)
        left = []
        mixed, z = by_head.inputs(projected, heads), by_head.gate(projected, heads)
        b, a = jnp.split(by_head.strength_and_decay(projected, heads), 2, axis=2)
        y = jax.nn.silu(causal_convolution(mixed, jnp.concatenate(weights.conv, axis=1), tail=tail)[0])
        parts = jnp.split(y, list(itertools.accumulate(heads.parts[:-1])), axis=2)
        sizes = heads.key_size, heads.key_size, heads.value_size
        q, k, v = (x.reshape(*x.shape[:2], -1, size) for x, size in zip(parts, sizes, strict=True))
        g = -jnp.exp(weights.a_log)[None, None] * jax.nn.softplus(a + weights.dt_bias[None, None])
        for state in states:
            options = dict(initial_state=state, implementation="reference")
            out, state = gated_delta_rule(l2_normalize(q), l2_normalize(k), v, g, jax.nn.sigmoid(b), **options)
            left.append(state)
        return gated_rms_norm(out, z.reshape(out.shape), weights.norm, 1e-6), jnp.stack(left)

    return Part(
        what="decode step",
        name="ours"
        if config is None
        else f"columns={config.columns}/warpgroups={config.warpgroups}/slots={config.slots}",
        case=case,
        checked=dataclasses.replace(case.small(1), batch=min(case.batch, 3)),
        operands=functools.partial(_decode_operands, layers=layers),
        run=ours,
        oracle=plain,
        flops=0.0,
        bytes=2.0 * state,
        calls=layers,
        donates=True,
    )


def _heads_of(case: Case, weights: decode.StepWeights) -> Heads:
    keys, values = (w.shape[1] // case.heads.key_size for w in weights.conv[1:])
    return dataclasses.replace(case.heads, key_heads=keys, value_heads=values)


def tuned_decode_steps(case: Case) -> list[Part]:
    size = case.heads.value_size
    oracle, found = decode_step(case).oracle, []  # compiled once
    for columns, slots in itertools.product((32, 64, 128), (0, 3)):
        warpgroups = size // columns
        fits = size % columns == 0 and columns * case.heads.key_size <= decode.STATE_REGISTERS * 128
        if fits and warpgroups in (1, 2, 4) and (not slots or warpgroups == 1):
            config = decode.DecodeConfig(columns=columns, warpgroups=warpgroups, slots=slots)
            found.append(dataclasses.replace(decode_step(case, config), oracle=oracle))
    return found


# -- comparison ----------------------------------------------------------------------------------------------------


def seed() -> jax.Array:
    """Another one in each call."""
    return jax.random.key(int(np.random.default_rng().integers(2**31)))


def check(part: Part, dtype: Any) -> float:
    """The largest relative L2 error of a result against the oracle in float64."""
    operands = part.operands(part.checked, dtype)
    wide = jax.tree.map(lambda x: np.asarray(x.astype(jnp.float32), np.float64), operands)
    found = jax.jit(part.run)(*operands)
    with jax.enable_x64(True):
        wanted = jax.tree.map(np.asarray, jax.jit(part.oracle)(*wide))
    errors = jax.tree.map(relative_error, found, wanted)
    worst = max(jax.tree.leaves(errors))
    if not worst < part.bound:
        raise AssertionError(f"{part.what}, {part.name}: relative error {worst:.1e}, allowed {part.bound:.0e}")
    return worst


def relative_error(found: jax.Array, wanted: np.ndarray) -> float:
    found = np.asarray(found.astype(jnp.float32), np.float64)
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
