"""One or a few tokens of the gated delta rule on Hopper, the state updated in place, with what lies around the rule.

    o_t = exp(g_t) S^T q_t + (k_t . q_t) u_t;   u_t = beta_t (v_t - exp(g_t) S^T k_t);   S <- exp(g_t) S + k_t u_t^T

as in `ring_jax.gdn.recurrent`, the decay near one applied as S + expm1(g) S. Bound by reading and writing S once: a warpgroup
keeps `columns` columns of one head's state [dk, dv] in registers over all tokens. A warp holds all dk rows of its quarter of the
columns, so that sums over dk need shuffles alone.

*Projected* operands, which lie by key heads (`ring_jax.gdn.by_head`), bring the convolution and the gates along:

    q, k, v = silu(convolution(mixed)), q and k l2-normalised;   beta = sigmoid(b);   g = -exp(A_log) softplus(a + dt_bias)

The convolution of q and k is made one channel a thread and handed over through shared memory; every warpgroup makes its own.
The leaving tail goes to an array of its own, since other programs still read the one that came in. With a gate z, the program
holds a whole head and ends with y = weight o / rms(o) silu(z).

Programs that load, compute and store in step leave memory idle in between. So where there are many heads, a program *walks* over
several: their states come to `slots` in shared memory by TMA, two ahead, and go back from there.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax.gdn.hopper.conv_kernel import NORM_EPSILON, sigmoid
from ring_jax.gdn.hopper.decode_parts import expm1, softplus, state_layout
from ring_jax.gdn.recurrent import SLOW
from ring_jax.mosaic import compat
from ring_jax.mosaic.layouts import channel_layout, whole_layout

_CLOSED = -1e4  # of b and a: a strength and a log decay of exactly zero


@dataclasses.dataclass(frozen=True)
class Problem:
    """One launch.

    Fields:
        columns, warpgroups: see `DecodeConfig`.
        width: of the convolution, where the operands are projections.
        norm_epsilon: None for no gate and no output norm.
        present: whether an operand says which rows of the batch have tokens; states and tails of the others stay.
        stacked: whether an operand (layer, group) says whose states and tail, and whose weights, of all these are.
        slots: for the states of a program that walks over heads, 0 where each program has one. walkers: such programs.
    """

    batch: int
    time: int
    key_heads: int
    value_heads: int
    dk: int
    dv: int
    columns: int
    warpgroups: int
    scale: float
    width: int | None
    norm_epsilon: float | None
    present: bool = False
    stacked: bool = False
    slots: int = 0
    walkers: int = 0

    @property
    def features(self) -> int:
        """Of the convolution, q | k | v."""
        return 2 * self.key_heads * self.dk + self.value_heads * self.dv

    @property
    def items(self) -> int:
        """Heads of rows of a batch, or parts of them."""
        return self.batch * self.value_heads * self.dv // (self.columns * self.warpgroups)

    @property
    def programs(self) -> int:
        return min(self.items, self.walkers) if self.slots else self.items


class _Head:
    """What one warpgroup of a program works on: one of `Problem.items`."""

    def __init__(self, problem: Problem, item):
        self.warpgroup = lax.axis_index("warpgroup")
        slices = problem.dv // (problem.columns * problem.warpgroups)
        part, rest = lax.rem(item, slices), lax.div(item, slices)
        self.problem, self.batch = problem, lax.div(rest, problem.value_heads)
        self.head = lax.rem(rest, problem.value_heads)
        self.group = problem.value_heads // problem.key_heads
        self.key_head = lax.div(self.head, self.group)
        self.columns = pl.ds((part * problem.warpgroups + self.warpgroup) * problem.columns, problem.columns)
        self.first = (part == 0) & (self.warpgroup == 0)
        self.layout = state_layout(problem.columns)
        self.row_layout, self.column_layout = self.layout.reduce(1), self.layout.reduce(0)

    def over_rows(self, x: jax.Array) -> jax.Array:
        """[dk] to [dk, columns]."""
        return self._broadcast(x, 0)

    def over_columns(self, x: jax.Array) -> jax.Array:
        """[columns] to [dk, columns]."""
        return self._broadcast(x, 1)

    def _broadcast(self, x, axis):
        shape = (self.problem.dk, self.problem.columns)
        return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (axis,)), self.layout)


class _Given:
    """Operands of the rule itself."""

    def __init__(self, head: _Head, refs):
        self.head, self.refs = head, refs

    def load(self) -> None:
        pass

    def prepare(self, qk_smem) -> None:
        pass

    def token(self, t: int):
        head, (q_ref, k_ref, v_ref, g_ref, beta_ref) = self.head, self.refs
        q, k = (
            compat.load(ref.at[head.batch, t, head.key_head], head.row_layout).astype(jnp.float32)
            for ref in (q_ref, k_ref)
        )
        v = compat.load(v_ref.at[head.batch, t, head.head, head.columns], head.column_layout).astype(jnp.float32)
        at = (head.batch, t, head.head)
        return q, k, v, g_ref[at], beta_ref[at].astype(jnp.float32)


class _Projected:
    """Operands made from projections by key heads, and the tail that the convolution leaves."""

    def __init__(self, head: _Head, refs, layer, group, leaving_ref, present_ref):
        self.head = head
        self.x_ref, tail_ref, *filters, a_log_ref, dt_bias_ref = refs
        self.tail_ref, self.filters = tail_ref.at[layer], [ref.at[group] for ref in filters]
        self.a_log_ref, self.dt_bias_ref = a_log_ref.at[group], dt_bias_ref.at[group]
        self.leaving_ref, self.qk_smem = leaving_ref, None
        self.present_ref = present_ref
        problem = head.problem
        keys = problem.key_heads * problem.dk
        self.key_channels = pl.ds(head.key_head * problem.dk, problem.dk)  # of their filters
        self.channels = [pl.ds(part * keys + head.key_head * problem.dk, problem.dk) for part in range(2)]
        self.own = pl.ds(head.head * problem.dv + head.columns.start, problem.columns)
        self.value_channels = pl.ds(2 * keys + self.own.start, problem.columns)
        # Columns of the projections of this key head: q and k, then v, z, b and a of the heads that share it.
        member, values = head.head - head.key_head * head.group, 2 * problem.dk
        gates, self.b = values + head.group * problem.dv, values + 2 * head.group * problem.dv + member
        self.q, self.k = (pl.ds(part * problem.dk, problem.dk) for part in range(2))
        own = member * problem.dv + head.columns.start
        self.v, self.z_columns = (pl.ds(first + own, problem.columns) for first in (values, gates))

    def load(self) -> None:
        """Everything at once: each load that waits for another costs as much as the state of one row of a batch."""
        head, problem = self.head, self.head.problem
        self.parts = [
            self._inputs(channels, columns, w.at[:, self.key_channels], channel_layout(problem.dk))
            for channels, columns, w in zip(self.channels, (self.q, self.k), self.filters, strict=False)
        ]
        self.parts.append(
            self._inputs(self.value_channels, self.v, self.filters[2].at[:, self.own], head.column_layout)
        )
        self.ba = [
            [self.x_ref[head.batch, t, head.key_head, self.b + i * head.group] for i in range(2)]
            for t in range(problem.time)
        ]
        self.real = None if self.present_ref is None else self.present_ref[head.batch] > 0
        self.a_log, self.dt_bias = self.a_log_ref[head.head], self.dt_bias_ref[head.head]

    def z(self, t: int):
        """The gate of this program's columns."""
        return self.x_ref.at[self.head.batch, t, self.head.key_head, self.z_columns]

    def _inputs(self, channels, columns, filters, layout):
        """The last inputs and the new ones, and their filter: `channels` of the tail, `columns` of the projections."""
        problem, batch = self.head.problem, self.head.batch
        x = [compat.load(self.tail_ref.at[batch, i, channels], layout) for i in range(problem.width - 1)]
        x += [compat.load(self.x_ref.at[batch, t, self.head.key_head, columns], layout) for t in range(problem.time)]
        return x, [compat.load(filters.at[j], layout) for j in range(problem.width)]

    def _convolved(self, x, w) -> list[jax.Array]:
        """silu of the convolution, for each token."""
        problem = self.head.problem
        x, w = ([each.astype(jnp.float32) for each in arrays] for arrays in (x, w))
        found = []
        for t in range(problem.time):
            y = w[0] * x[t]
            for j in range(1, problem.width):
                y = y + w[j] * x[t + j]
            found.append(y * sigmoid(y))
        return found

    def _leave(self, x, channels) -> None:
        """Writes the tail of these channels: the one that came where there is no token."""
        for i, each in enumerate(x[self.head.problem.time :]):
            each = each if self.real is None else jnp.where(self.real, each, x[i])
            compat.store(self.leaving_ref.at[self.head.batch, i, channels], each)

    def prepare(self, qk_smem) -> None:
        head = self.head
        self.qk_smem = qk_smem.at[head.warpgroup]
        for part, arrays in enumerate(self.parts[:2]):
            for t, s in enumerate(self._convolved(*arrays)):
                compat.store(self.qk_smem.at[t, part], s)
        self.values = self._convolved(*self.parts[2])
        plgpu.commit_smem()

        @pl.when(head.first & (head.key_head * head.group == head.head))
        def _():
            for channels, (x, _) in zip(self.channels, self.parts[:2], strict=True):
                self._leave(x, channels)

        self._leave(self.parts[2][0], self.value_channels)

    def token(self, t: int):
        head = self.head
        q, k = (compat.load(self.qk_smem.at[t, part], head.row_layout) for part in range(2))
        q, k = (x * lax.rsqrt(jnp.sum(x * x) + NORM_EPSILON) for x in (q, k))
        b, a = (x.astype(jnp.float32) for x in self.ba[t])
        if self.real is not None:
            b, a = (jnp.where(self.real, x, _CLOSED) for x in (b, a))
        g = -jnp.exp(self.a_log.astype(jnp.float32)) * softplus(a + self.dt_bias.astype(jnp.float32))
        return q, k, self.values[t], g, sigmoid(b)


def kernel(problem: Problem, *refs, qk_smem=None, o_smem=None, o_full=None, slots=None, loaded=None) -> None:
    """refs: the operands; the output norm's weight where there is a gate; which rows have tokens and (layer, group) where they
    are operands; the states; out, and the leaving tail of projected operands."""
    *inputs, states_ref, out_ref = refs if problem.width is None else refs[:-1]
    layer, group, present_ref = 0, 0, None
    if problem.stacked:
        *inputs, at_ref = inputs
    if problem.present:
        *inputs, present_ref = inputs
    if problem.stacked:
        sizes = states_ref.shape[0], inputs[-1].shape[0]
        layer, group = (lax.max(lax.min(at_ref[i], size - 1), 0) for i, size in enumerate(sizes))

    def one(item, load, store):
        """Moves on one item's state, for which `load` asks, a call of what it returns waits, and which `store` takes."""
        head, rest = _Head(problem, item), inputs
        operands: Any
        norm_ref = None
        if problem.width is None:
            operands = _Given(head, rest)
        else:
            if problem.norm_epsilon is not None:
                *rest, norm_ref = rest
                norm_ref = norm_ref.at[group]
            operands = _Projected(head, rest, layer, group, refs[-1], present_ref)
        state_ref = states_ref.at[layer, head.batch, head.head, :, head.columns]
        arrived = load(state_ref, head.layout)
        operands.load()
        gate = None if norm_ref is None else _OutputNorm(head, operands.z, norm_ref)
        operands.prepare(qk_smem)
        state, outs = _tokens(head, operands, arrived())
        store(state_ref, state)
        if gate is not None:
            outs = gate.apply(outs, o_smem, o_full)
        for t, out in enumerate(outs):
            compat.store(out_ref.at[head.batch, t, head.head, head.columns], out.astype(out_ref.dtype))

    if slots is None:
        one(lax.axis_index("program"), _at_once, compat.store)
    else:
        _walk(problem, one, states_ref.at[layer], slots, loaded)


def _at_once(ref: Any, layout: Any) -> Any:
    state = compat.load(ref, layout)
    return lambda: state


def _tokens(head: _Head, operands: Any, state: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """The state after all tokens, and what each reads."""
    outs = []
    for t in range(head.problem.time):
        q, k, v, g, beta = operands.token(t)
        slow = g > SLOW
        change = jnp.where(slow, expm1(lax.max(g, SLOW)), jnp.exp(g))
        state = state * change + state * jnp.where(slow, 1.0, 0.0)
        q, key = q * head.problem.scale, head.over_rows(k)
        read_k = jnp.sum(state * key, axis=0)
        read_q = jnp.sum(state * head.over_rows(q), axis=0)
        u = beta * (v - read_k)
        outs.append(read_q + jnp.sum(k * q) * u)
        state = state + key * head.over_columns(u)
    return state, outs


def _walk(problem: Problem, one: Any, states_ref: Any, slots: Any, loaded: Any) -> None:
    """Every `programs`-th item: whole heads, a warpgroup each. States come `slots` - 1 ahead."""
    program, ahead = lax.axis_index("program"), problem.slots - 1
    rounds = lax.div(problem.items - program + problem.programs - 1, problem.programs)

    def fetch(i):
        @pl.when(i < rounds)
        def _():
            item, slot = program + i * problem.programs, lax.rem(i, problem.slots)
            source = states_ref.at[lax.div(item, problem.value_heads), lax.rem(item, problem.value_heads)]
            plgpu.copy_gmem_to_smem(source, slots.at[slot], loaded.at[slot])

    for i in range(ahead):
        fetch(jnp.int32(i))

    @pl.loop(0, rounds)
    def _(i):
        slot = lax.rem(i, problem.slots)

        def load(_, layout):
            def arrived():
                plgpu.barrier_wait(loaded.at[slot])
                return compat.load(slots.at[slot], layout)

            return arrived

        def store(state_ref, state):
            compat.store(slots.at[slot], state)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(slots.at[slot], state_ref)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the state before has left: its slot is free
            fetch(i + ahead)

        one(program + i * problem.programs, load, store)

    plgpu.wait_smem_to_gmem(0)


class _OutputNorm:
    """weight o / rms(o) silu(z); the squares of a head come together through shared memory."""

    def __init__(self, head: _Head, z_ref_of, weight_ref):
        def load(ref):
            return compat.load(ref, head.column_layout)

        assert head.problem.norm_epsilon is not None
        self.head, self.epsilon = head, head.problem.norm_epsilon
        self.z = [load(z_ref_of(t)) for t in range(head.problem.time)]
        self.weight = load(weight_ref.at[head.columns])

    def apply(self, outs, o_smem, o_full) -> list[jax.Array]:
        head, problem = self.head, self.head.problem
        for t, out in enumerate(outs):
            compat.store(o_smem.at[t, head.columns], out)
        plgpu.commit_smem()
        if problem.warpgroups > 1:
            plgpu.barrier_arrive(o_full)
            plgpu.barrier_wait(o_full)
        normed, weight = [], self.weight.astype(jnp.float32)
        for t, out in enumerate(outs):
            whole = compat.load(o_smem.at[t], whole_layout(problem.dv))
            mean = jnp.sum(whole * whole) * (1.0 / problem.dv)
            z = self.z[t].astype(jnp.float32)
            normed.append(weight * (out * lax.rsqrt(mean + self.epsilon)) * (z * sigmoid(z)))
        return normed


def scratch(problem: Problem) -> dict[str, Any]:
    """Shared memory of a program."""
    found: dict[str, Any] = {}
    if problem.slots:
        found["slots"] = plgpu.SMEM((problem.slots, problem.dk, problem.dv), jnp.float32)
        found["loaded"] = plgpu.Barrier(num_barriers=problem.slots)
    if problem.width is not None:
        found["qk_smem"] = plgpu.SMEM((problem.warpgroups, problem.time, 2, problem.dk), jnp.float32)
    if problem.norm_epsilon is not None:
        found["o_smem"] = plgpu.SMEM((problem.time, problem.dv), jnp.float32)
        if problem.warpgroups > 1:
            found["o_full"] = plgpu.Barrier(num_arrivals=problem.warpgroups)
    return found
