"""What lies between two mixers of a decode step, for one row, in one launch: four products whose weights are read without a break.

    h1 = h + y W_out;   a = silu(g) u, [g | u] = norm(h1) W_up;   h2 = h1 + a W_down;   p = norm(h2) W_in

As many programs as multiprocessors, all running at once. A *memory* warpgroup of each streams its pieces of the four weights, one after
the other, through a ring of shared memory: it depends on nothing, so the next weight comes while sums of the last one are made and
waited for. Two *compute* warpgroups multiply-add in float32. A product is cut into *units*: 64 columns of one of `splits` parts of the
weight's rows. Between products all programs meet (`_meet`), and what needs a sum over parts adds the parts itself, each time in the same
order; so results repeat to the bit.

Rounded are h1, h2, a and p, as the products one by one do it (`few_rows_kernel`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from ring_jax.mosaic import compat, pipeline
from ring_jax.mosaic.layouts import channel_layout, whole_layout
from ring_jax.mosaic.pipeline import ring_slot
from ring_jax.nn.hopper.config import LANES, VECTOR, WARPS
from ring_jax.nn.hopper.few_rows_kernel import piece_layout, results_layout, sum_over, swiglu

COLUMNS = 64  # of a unit
WARP_ROWS = LANES * VECTOR // COLUMNS
PIECE = 128  # rows of a weight that come at once
COMPUTE = 2  # warpgroups
_WHOLE = 1024  # of a vector that a warp holds at once


@dataclasses.dataclass(frozen=True)
class Product:
    """x [depth] times W [depth, results], the rows of W in `splits` parts."""

    depth: int
    results: int
    splits: int

    @property
    def units(self) -> int:
        return self.results // COLUMNS * self.splits

    @property
    def rows(self) -> int:
        """Of a unit."""
        return self.depth // self.splits

    def busy(self, programs: int) -> float:
        """The share of so many programs that has a unit, over all rounds."""
        return self.units / (pl.cdiv(self.units, programs) * programs)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One launch: the products in their order, programs, pieces in shared memory."""

    out: Product
    up: Product
    down: Product
    into: Product
    epsilon: float
    programs: int
    stages: int

    @property
    def products(self) -> tuple[Product, ...]:
        return self.out, self.up, self.down, self.into

    @property
    def width(self) -> int:
        return self.out.results

    @property
    def one_part(self) -> bool:
        """Whether a program takes one unit of `down` at most, and so needs one part of what is multiplied."""
        return self.down.units <= self.programs

    @property
    def longest(self) -> int:
        """Of the vectors that are multiplied."""
        return max(self.out.depth, self.width, self.down.rows if self.one_part else self.down.depth)

    @property
    def other_bytes(self) -> int:
        """Of shared memory, beside the ring."""
        return 4 * (self.longest + self.width + 2 * COMPUTE * WARPS * COLUMNS) + 1024


def scratch(problem: Problem, dtype: Any) -> dict[str, Any]:
    stages = problem.stages
    return dict(
        ring=plgpu.SMEM((stages, PIECE // WARP_ROWS, WARP_ROWS, COLUMNS), dtype),
        x_smem=plgpu.SMEM((problem.longest,), jnp.float32),
        h_smem=plgpu.SMEM((problem.width,), jnp.float32),
        sums=plgpu.SMEM((COMPUTE * WARPS, 2, COLUMNS), jnp.float32),
        full=plgpu.Barrier(num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        met=plgpu.Barrier(num_arrivals=COMPUTE),
    )


def kernel(problem: Problem, y_ref, h_ref, norm_ref, next_norm_ref, *refs, ring, x_smem, h_smem, sums, full, free, met):
    """y [K], h and norms [D]; weights [K / n, n, N], n = WARP_ROWS; the meeting place; h2 [D], p [F]; parts of the first three products
    [splits, N], float32."""
    weights, (state_ref, h2_ref, p_ref), parts = refs[:4], refs[4:7], refs[7:]
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")

    def units(product: Product, body: Callable[..., Any], carry: Any) -> Any:
        """carry = body(column block, part, carry) for this program's units."""
        count = lax.div(product.units - program + problem.programs - 1, jnp.int32(problem.programs))

        def one(i, carry):
            unit = program + i * problem.programs
            return body(lax.div(unit, jnp.int32(product.splits)), lax.rem(unit, jnp.int32(product.splits)), carry)

        return lax.fori_loop(0, count, one, carry)

    @pl.when(warpgroup == COMPUTE)
    def _memory():
        def feed():
            step = jnp.int32(0)
            for product, w_ref in zip(problem.products, weights, strict=True):

                def unit(block, part, step, product=product, w_ref=w_ref):
                    def piece(i, step):
                        slot = ring_slot(step, problem.stages)
                        first = (part * product.rows + i * PIECE) // WARP_ROWS
                        rows, columns = pl.ds(first, PIECE // WARP_ROWS), pl.ds(block * COLUMNS, COLUMNS)
                        plgpu.barrier_wait(free.at[slot])
                        plgpu.copy_gmem_to_smem(w_ref.at[rows, :, columns], ring.at[slot], full.at[slot])
                        return step + 1

                    return lax.fori_loop(0, product.rows // PIECE, piece, step)

                step = units(product, unit, step)

        pipeline.in_first_warp(feed)
        if compat.interpreting():  # the interpreter wants every phase of a barrier to be seen
            for slot in range(problem.stages):
                plgpu.barrier_wait(free.at[slot])

    @pl.when(warpgroup < COMPUTE)
    def _compute():
        for slot in range(problem.stages):
            plgpu.barrier_arrive(free.at[slot])

        def together():
            plgpu.commit_smem()
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)

        def share(length: int):
            """This warpgroup's half of a vector, and its layout."""
            return pl.ds(warpgroup * (length // COMPUTE), length // COMPUTE), channel_layout(length // COMPUTE)

        def wide(ref, at, layout):
            return compat.load(ref.at[at], layout).astype(jnp.float32)

        def rounded(x):
            return x.astype(h_ref.dtype).astype(jnp.float32)

        mine, layout = share(problem.width)

        def add(h, part_ref, weight_ref):
            """This warpgroup's half of h + the product, rounded; x is its norm."""
            h = rounded(h + sum_over(part_ref, mine, layout))
            h_smem.at[mine][...] = h
            together()
            squares = jnp.float32(0.0)
            for first in range(0, problem.width, _WHOLE):
                length = min(_WHOLE, problem.width - first)
                some = compat.load(h_smem.at[pl.ds(first, length)], whole_layout(length))
                squares = squares + jnp.sum(some * some)
            factor = lax.rsqrt(squares * (1.0 / problem.width) + problem.epsilon)
            x_smem.at[mine][...] = h * factor * (1.0 + wide(weight_ref, mine, layout))
            together()
            return h

        def multiply(product: Product, step, store, *, part_only: bool = False):
            """store(column block, part, sums [COLUMNS]) of this program's units; `part_only`: x holds the unit's part alone."""
            shape = WARPS, WARP_ROWS, COLUMNS
            layout = piece_layout(*shape[1:])

            def unit(block, part, carry):
                step, parity = carry
                start = jnp.int32(0) if part_only else part * product.rows

                def piece(i, carry):
                    step, acc = carry
                    slot = ring_slot(step, problem.stages)
                    plgpu.barrier_wait(full.at[slot])
                    for n in range(PIECE // (WARP_ROWS * WARPS * COMPUTE)):
                        at = (n * COMPUTE + warpgroup) * WARPS
                        w = compat.load(ring.at[slot, pl.ds(at, WARPS)], layout).astype(jnp.float32)
                        rows = pl.ds(start + i * PIECE + at * WARP_ROWS, WARPS * WARP_ROWS)
                        x = _rows(x_smem.at[rows], layout.reduce(2))
                        acc = acc + w * plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (0, 1)), layout)
                    plgpu.barrier_arrive(free.at[slot])
                    return step + 1, acc

                zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
                step, acc = lax.fori_loop(0, product.rows // PIECE, piece, (step, zeros))
                compat.store(sums.at[pl.ds(warpgroup * WARPS, WARPS), parity], jnp.sum(acc, axis=1))
                together()

                @pl.when(warpgroup == parity)
                def _():
                    store(pl.ds(block * COLUMNS, COLUMNS), part, sum_over(sums, parity, results_layout(COLUMNS)))

                return step, 1 - parity

            return units(product, unit, (step, jnp.int32(0)))[0]

        def keep(part_ref):
            return lambda columns, part, value: compat.store(part_ref.at[part, columns], value)

        def meet():
            together()
            _meet(problem.programs, warpgroup, state_ref)
            together()

        of_y, y_layout = share(problem.out.depth)
        x_smem.at[of_y][...] = wide(y_ref, of_y, y_layout)
        together()
        step = multiply(problem.out, jnp.int32(0), keep(parts[0]))
        meet()
        h = add(wide(h_ref, mine, layout), parts[0], norm_ref)
        step = multiply(problem.up, step, keep(parts[1]))
        meet()
        of_a, a_layout = share(problem.down.rows if problem.one_part else problem.down.depth)
        first = of_a.start
        if problem.one_part:
            first += lax.rem(program, jnp.int32(problem.down.splits)) * problem.down.rows
        gate, up = (
            sum_over(parts[1], pl.ds(first + half * problem.down.depth, of_a.size), a_layout) for half in range(2)
        )
        x_smem.at[of_a][...] = rounded(swiglu(gate, up))
        together()
        step = multiply(problem.down, step, keep(parts[2]), part_only=problem.one_part)
        meet()
        h = add(h, parts[2], next_norm_ref)
        pl.when(program == 0)(lambda: compat.store(h2_ref.at[mine], h.astype(h2_ref.dtype)))
        multiply(
            problem.into,
            step,
            lambda columns, part, value: compat.store(p_ref.at[columns], value.astype(p_ref.dtype)),
        )


def _rows(x_ref: Any, layout: Any) -> jax.Array:
    """16 numbers as [4, 4]: those of a warp, then of a quarter of its lanes' rows."""
    if compat.interpreting():
        return x_ref[...].reshape(WARPS, WARP_ROWS)
    replicated = fragmented_array.Replicated(LANES // WARP_ROWS)
    flat = compat.tiled_layout(((WARPS * WARP_ROWS,), (WARP_ROWS,), (1,)), (-3,), (-2, replicated))

    @plgpu.inline_mgpu(
        arg_types=(flat,), return_type=plgpu.ShapeDtypeStruct((WARPS, WARP_ROWS), jnp.float32, layout=layout)
    )
    def rows(_: Any, x: Any) -> Any:
        own = layout.to_mgpu()
        registers = x.registers.reshape(own.registers_shape((WARPS, WARP_ROWS)))
        return mgpu.FragmentedArray(_registers=registers, _layout=own, _is_signed=None)

    return rows(compat.load(x_ref, flat))


def _meet(programs: int, warpgroup: jax.Array, state_ref: Any) -> None:
    """Returns when every program has come here, and sees what all of them have written. The meeting place is (how many have come, how
    often all had), and is left with none."""
    if compat.interpreting() or programs == 1:
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def wait_for_all(_: Any, place: Any) -> None:
        pointer = mgpu_utils.memref_ptr(place)
        text = (
            "{ .reg .pred p; .reg .b32 thread, came, turn, now;\n"
            "mov.u32 thread, %tid.x;\nsetp.ne.u32 p, thread, 0;\n@p bra $$L_met_${:uid};\n"
            "ld.acquire.gpu.global.u32 turn, [$0+4];\nfence.acq_rel.gpu;\n"
            f"atom.acq_rel.gpu.global.inc.u32 came, [$0], {programs - 1};\n"
            f"setp.eq.u32 p, came, {programs - 1};\n@p bra $$L_last_${{:uid}};\n"
            "$$L_wait_${:uid}:\nld.acquire.gpu.global.u32 now, [$0+4];\nsetp.eq.u32 p, now, turn;\n"
            "@p bra $$L_wait_${:uid};\nbra $$L_met_${:uid};\n"
            "$$L_last_${:uid}:\nadd.u32 turn, turn, 1;\nst.release.gpu.global.u32 [$0+4], turn;\n"
            "$$L_met_${:uid}: }"
        )
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [pointer], text, "l,~{memory}", has_side_effects=True)

    pl.when(warpgroup == 0)(lambda: wait_for_all(state_ref))
