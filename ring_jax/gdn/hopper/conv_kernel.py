"""The causal convolution of a GDN layer on Hopper, with SiLU and the l2 norms of q and k, forward and backward.

    y_t = sum_j w_j x_{t-(W-1)+j};  s = silu(y);  out = s n, n = 1 / sqrt(sum s^2 + eps) over a head of q or k (of v: 1)

Memory-bound, so every element is read once. A program (one warpgroup) owns a block of channels, whole heads of 128 threads
times `vector` channels, and walks along the tokens of its tile with the last W - 1 inputs in registers; those before the
tile are read again. One launch serves q, k and v: the block's number says which.
Inputs may lie by key heads, with other columns between those of q, k and v: a block then takes the same columns of several heads.

Documents come as one int32 for each token (`FLAG_*`). The window of inputs is emptied where a document begins, or takes the
tail where the first one does, so that no other token needs to look at segment ids. A flag also says whether any of the next
`AHEAD` tokens has one: most groups of rows have none, and run as if there were no documents.

Backward: with do the cotangent of out, ds = n do - s n^3 (s.do), dy = ds silu'(y),

    dx_t = sum_j w_j dy_{t+(W-1)-j};   dw_j = sum_t dy_t x_{t-(W-1)+j}

A tile computes dy for its own tokens and the W - 1 after them; dx_t is stored W - 1 tokens after it was begun. dw is summed in
registers over the tile and written once per program, in float32.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax._arrays import LOG2E
from ring_jax.gdn.hopper.conv_problem import (
    FLAG_AHEAD,
    FLAG_CONTINUES,
    FLAG_FIRST,
    FLAG_PADDING,
    NORM_EPSILON,
    Part,
    Problem,
)
from ring_jax.mosaic import compat


def heads_layout(head_size: int, vector: int) -> Any:
    """[heads, head_size] over a warpgroup: `vector` neighbouring channels a thread, no head in two warps."""
    heads = 32 * vector // head_size  # of a warp
    return compat.tiled_layout(((4 * heads, head_size), (heads, head_size), (1, vector)), (-6,), (-4, -3))


def sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + exp(-x)) to 3e-7: the square of a reciprocal root is one fast instruction, a quotient is a dozen."""
    root = lax.rsqrt(1.0 + jnp.exp2(x * -LOG2E))
    return root * root


@dataclasses.dataclass(frozen=True)
class _Block:
    """What one program works on."""

    problem: Problem
    part: Part
    batch: Any
    tile: Any
    head: Any  # in the part
    member: Any = None  # of the value heads that share a key head

    @property
    def layout(self) -> Any:
        return heads_layout(self.part.head_size, self.problem.vector)

    @property
    def shape(self) -> tuple[int, int]:
        return self.problem.heads_per_block(self.part), self.part.head_size

    @property
    def first_row(self) -> Any:
        return self.tile * self.problem.rows

    @property
    def rows(self) -> Any:
        """Tokens of this tile, static where all tiles are whole."""
        p = self.problem
        return p.rows if p.time % p.rows == 0 else lax.min(p.rows, p.time - self.first_row)

    def of(self, ref: Any, *row: Any, joint: bool = False) -> Any:
        """These heads of a row of an array of this part alone, or of all parts."""
        heads = pl.ds(self.head + (self.part.first_head if joint else 0), self.shape[0])
        return ref.at[(*row, heads) if self.member is None else (*row, heads, self.member)]

    def of_inputs(self, ref: Any, row: Any) -> Any:
        """These heads of a row of the projections."""
        part = self.part
        if part.column is None:
            return self.of(ref, self.batch, row, joint=self.problem.joint_inputs)
        column = part.column + (0 if self.member is None else self.member * part.head_size)
        return ref.at[self.batch, row, pl.ds(self.head, self.shape[0]), pl.ds(column, part.head_size)]

    def load(self, ref: Any) -> jax.Array:
        return compat.load(ref, self.layout)

    def load_float(self, ref: Any) -> jax.Array:
        return self.load(ref).astype(jnp.float32)

    def zeros(self) -> jax.Array:
        return plgpu.layout_cast(jnp.zeros(self.shape, jnp.float32), self.layout)

    def total(self, x: jax.Array) -> jax.Array:
        """x [heads, head_size] summed over each head, [heads]."""
        return jnp.sum(x, axis=1)

    def spread(self, x: jax.Array) -> jax.Array:
        """[heads] to [heads, head_size]."""
        return plgpu.layout_cast(lax.broadcast_in_dim(x, self.shape, (0,)), self.layout)


class _Inputs:
    """The inputs of a block, their filter, and the window of the last W inputs on the way along the tokens."""

    def __init__(self, block: _Block, x_ref, w_ref, tail_ref, flags_ref):
        self.block, self.x_ref, self.tail_ref, self.flags_ref = block, x_ref, tail_ref, flags_ref
        problem = block.problem
        self.weight = [block.load_float(block.of(w_ref, j, joint=problem.joint_weights)) for j in range(problem.width)]

    def raw(self, row) -> jax.Array:
        return self.block.load(self.block.of_inputs(self.x_ref, row))

    def flag(self, row) -> Any:
        """None where there are no documents."""
        return None if self.flags_ref is None else self.flags_ref[self.block.batch, row] & (FLAG_AHEAD - 1)

    def flags_ahead(self, row) -> Any:
        return self.flags_ref[self.block.batch, row] >= FLAG_AHEAD

    def _tail(self, index) -> jax.Array:
        if self.tail_ref is None:
            return self.block.zeros()
        return self.block.load_float(self.block.of(self.tail_ref, self.block.batch, index))

    def history(self) -> list[jax.Array]:
        """The W - 1 inputs before the tile, as its first token sees them unless it begins a document."""
        history = self.block.problem.width - 1
        window: list[jax.Array] = []
        for i in range(history):
            row = self.block.first_row - history + i
            inside = lax.max(row, 0)
            if self.flags_ref is not None:  # never true before the array: row 0 begins a document or padding
                window = self.emptied(
                    window, jnp.where(row >= 0, self.flag(inside), FLAG_CONTINUES), missing=history - i
                )
            x = self.raw(inside).astype(jnp.float32)
            window.append(jnp.where(row >= 0, x, self._tail(history + lax.min(row, -1))))
        return window

    def emptied(self, window: list[jax.Array], flag, missing: int = 0) -> list[jax.Array]:
        """The inputs before a token with this flag; the first `missing` of them are not in the window."""
        if flag is None or not window:
            return window

        def empty(*window):
            tails = [self._tail(missing + i) for i in range(len(window))]
            return tuple(jnp.where(flag == FLAG_FIRST, tail, 0.0) for tail in tails)

        return list(lax.cond(flag > FLAG_CONTINUES, empty, lambda *window: window, *window))

    def convolved(self, window: list[jax.Array]) -> jax.Array:
        total = self.weight[0] * window[0]
        for weight, x in zip(self.weight[1:], window[1:], strict=True):
            total = total + weight * x
        return total


def _dispatch(problem: Problem, body) -> None:
    """Runs body(index of the part, block) for this program."""
    total = sum(problem.blocks(part) for part in problem.parts)
    program = lax.axis_index("program")
    number, rest = lax.rem(program, total), lax.div(program, total)
    tile, batch = lax.rem(rest, problem.tiles), lax.div(rest, problem.tiles)
    first = 0
    for i, part in enumerate(problem.parts):
        heads, last = problem.heads_per_block(part), first + problem.blocks(part)

        @pl.when((number >= first) & (number < last))
        def _(i=i, part=part, first=first, heads=heads):
            block, member = number - first, None
            if part.members is not None:
                block, member = lax.div(block, part.members), lax.rem(block, part.members)
            # The last block slides back over heads that another computes too.
            head = lax.min(block * heads, part.heads - heads)
            body(i, _Block(problem, part, batch, tile, head, member))

        first = last


def _walk(inputs: _Inputs, start, count, load, step, carry, unsettled=None):
    """carry = step(row, carry, flag, *load(row)) for `count` rows from start on, in groups whose loads come first.

    A group without flags runs as if there were no documents, with None for a flag, unless `unsettled(carry)`.
    """
    problem = inputs.block.problem
    unroll = problem.unroll

    def load_group(first):
        return [load(lax.min(first + i, problem.time - 1) if problem.prefetch else first + i) for i in range(unroll)]

    def run(first, loaded, carry, flagged):
        for i, arrays in enumerate(loaded):
            carry = step(first + i, carry, inputs.flag(first + i) if flagged else None, *arrays)
        return carry

    def group(g, carry):
        first = start + g * unroll
        if problem.prefetch:
            carry, loaded = carry
            following = load_group(first + unroll)
            return compute(first, loaded, carry), following
        return compute(first, load_group(first), carry)

    def compute(first, loaded, carry):
        if inputs.flags_ref is None:
            return run(first, loaded, carry, False)
        flagged = inputs.flags_ahead(first)
        if unsettled is not None:
            flagged |= unsettled(carry)
        return lax.cond(
            flagged,
            lambda carry: run(first, loaded, carry, True),
            lambda carry: run(first, loaded, carry, False),
            carry,
        )

    groups = count // unroll if isinstance(count, int) else lax.div(count, unroll)
    if problem.prefetch:
        carry, _ = lax.fori_loop(0, groups, group, (carry, load_group(start)))
    else:
        carry = lax.fori_loop(0, groups, group, carry)
    if isinstance(count, int) and count % unroll == 0:
        return carry
    return lax.fori_loop(groups * unroll, count, lambda i, carry: run(start + i, [load(start + i)], carry, True), carry)


def _split(problem: Problem, refs, groups: int):
    """`groups` times one Ref for each part, (tail Refs or Nones), flags or None, and the other Refs."""
    refs, n = list(refs), len(problem.parts)
    arrays = [[refs.pop(0) for _ in range(n)] for _ in range(groups)]
    tails = [refs.pop(0) for _ in range(n)] if problem.tail else [None] * n
    flags = refs.pop(0) if problem.flags else None
    return (*arrays, tails, flags, refs)


def forward_kernel(problem: Problem, *refs) -> None:
    x_refs, w_refs, tail_refs, flags_ref, out_refs = _split(problem, refs, 2)

    def body(i, block: _Block):
        inputs = _Inputs(block, x_refs[i], w_refs[i], tail_refs[i], flags_ref)
        out_ref = out_refs[i]

        def load(row):
            return (inputs.raw(row),)

        def step(row, window, flag, raw):
            window = [*inputs.emptied(list(window), flag), raw.astype(jnp.float32)]
            y = inputs.convolved(window)
            out = y * sigmoid(y)
            if block.part.norm:
                out = out * block.spread(lax.rsqrt(block.total(out * out) + NORM_EPSILON))
            if flag is not None:
                out = jnp.where(flag == FLAG_PADDING, 0.0, out)
            compat.store(block.of(out_ref, block.batch, row), out.astype(out_ref.dtype))
            return tuple(window[1:])

        _walk(inputs, block.first_row, block.rows, load, step, tuple(inputs.history()))

    _dispatch(problem, body)


def backward_kernel(problem: Problem, *refs) -> None:
    x_refs, w_refs, do_refs, tail_refs, flags_ref, out_refs = _split(problem, refs, 3)
    history, n = problem.width - 1, len(problem.parts)
    dx_refs, dw_refs = (
        [refs[0]] * n if joint else refs
        for refs, joint in (
            (out_refs[: 1 if problem.joint_inputs else n], problem.joint_inputs),
            (out_refs[1 if problem.joint_inputs else n :], problem.joint_weights),
        )
    )

    def body(i, block: _Block):
        inputs = _Inputs(block, x_refs[i], w_refs[i], tail_refs[i], flags_ref)
        do_ref, dx_ref, dw_ref = do_refs[i], dx_refs[i], dw_refs[i]
        first, end = block.first_row, block.first_row + block.rows

        def load(row):
            inside = lax.min(row, problem.time - 1)
            return inputs.raw(inside), block.load(block.of(do_ref, block.batch, inside))

        def step(row, carry, flag, raw, do, edge=False):
            window, pending, dw, seen = carry
            x = raw.astype(jnp.float32)
            if flag is not None:  # whatever lies on padding, NaN too, must not reach dw
                x = jnp.where(flag == FLAG_PADDING, 0.0, x)
            window = [*inputs.emptied(list(window), flag), x]
            dy = _output_gradient(block, inputs.convolved(window), do.astype(jnp.float32))
            if flag is not None:
                dy = jnp.where(flag == FLAG_PADDING, 0.0, dy)
                # How many tokens back this one's document goes on, as far as anyone asks.
                seen = jnp.where(flag > FLAG_CONTINUES, 0, lax.min(seen + 1, history))
            own = dy
            if edge:
                dy = jnp.where(row < problem.time, dy, 0.0)
                own = jnp.where(row < end, dy, 0.0)
            dw = tuple(total + own * x for total, x in zip(dw, window, strict=True))
            shares = [w * dy for w in inputs.weight]  # for the token W - 1 back, ..., for this one
            if flag is not None:
                shares = [jnp.where(seen >= history - j, share, 0.0) for j, share in enumerate(shares)]
            sums = [a + b for a, b in zip(pending, shares[:-1], strict=True)] + shares[-1:]

            def finish():
                dx = block.of(dx_ref, block.batch, row - history, joint=problem.joint_inputs)
                compat.store(dx, sums[0].astype(dx_ref.dtype))

            pl.when((row - history >= first) & (row - history < end))(finish) if edge else finish()
            return tuple(window[1:]), tuple(sums[1:]), dw, seen

        def edge_rows(start, count, carry):
            def row(i, carry):
                flag = inputs.flag(lax.min(start + i, problem.time - 1))
                return step(start + i, carry, flag, *load(start + i), edge=True)

            return lax.fori_loop(0, count, row, carry)

        carry = (
            tuple(inputs.history()),
            (block.zeros(),) * history,
            (block.zeros(),) * problem.width,
            jnp.int32(history),
        )
        carry = edge_rows(first, history, carry)
        rows = block.rows
        whole = max(rows - history, 0) if isinstance(rows, int) else lax.max(rows - history, 0)
        carry = _walk(inputs, first + history, whole, load, step, carry, lambda carry: carry[3] < history)
        _, _, dw, _ = edge_rows(first + history + whole, rows - whole, carry)
        for j, total in enumerate(dw):
            row = block.batch * problem.tiles + block.tile
            compat.store(block.of(dw_ref, row, j, joint=problem.joint_weights), total)

    _dispatch(problem, body)


def _output_gradient(block: _Block, y: jax.Array, do: jax.Array) -> jax.Array:
    """The cotangent of y from that of the output."""
    gate = sigmoid(y)
    s = y * gate
    ds = do
    if block.part.norm:
        n = lax.rsqrt(block.total(s * s) + NORM_EPSILON)
        ds = block.spread(n) * do - s * block.spread(n * n * n * block.total(s * do))
    return ds * (gate + s * (1.0 - gate))
