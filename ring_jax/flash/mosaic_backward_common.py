"""What the Hopper backward kernels share: their configuration, the static problem, and steps written once.

The algorithm and its symbols are in `mosaic_hopper_backward`.
"""

import math
from dataclasses import dataclass

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax.flash import mosaic_compat as compat

LOG2E = math.log2(math.e)
ROWS = 64  # one warpgroup's wgmma rows
WGS = 2  # compute warpgroups
STAGE_COLUMNS = 32  # float32 columns per step of the epilogue: one 128-byte swizzle
SMEM_BYTES = 227 * 1024
TILE = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value per row of a tile
COL = plgpu.Layout.WGMMA.reduce(0)  # one value per column


def splits_by_role(H: int, Hv: int) -> bool:
    """Whether dK and dV of 64 keys are too wide for the registers of one warpgroup."""
    return H + Hv > 256


@dataclass(frozen=True)
class BackwardConfig:
    """Tile sizes and pipeline depths.

    block_q_dkv: query rows per step of the dkv kernel.  stages: its Q, dO buffers.
    block_kv_dq: keys per step of the dq kernel.  slots: its K and V buffers, K and V alternate.
    overlap: dkv issues dP's product before the softmax, not after it; hides more and takes more registers.
    fused: one kernel of five products where the caller does not ask for repeatable gradients, else two of seven; it
        lacks the registers to overlap.
    feed_registers: of the fused form's third warpgroup, which computes dQ; the other two share the rest.
    """

    block_q_dkv: int = 64
    stages: int = 2
    block_kv_dq: int = 128
    slots: int = 4
    overlap: bool = True
    fused: bool = False
    feed_registers: int = 72

    def __post_init__(self):
        if self.block_q_dkv not in (32, 64, 128):
            raise ValueError(f"block_q_dkv must be 32, 64 or 128, got {self.block_q_dkv=}")
        if self.block_kv_dq % 16 or not 16 <= self.block_kv_dq <= 256:
            raise ValueError(f"block_kv_dq must be a multiple of 16 in [16, 256], got {self.block_kv_dq=}")
        if self.stages < 1 or self.slots < 2:
            raise ValueError(f"need at least one stage and two slots, got {self.stages=}, {self.slots=}")
        # A program starts with 168 registers a thread in three warpgroups; setmaxnreg waits for ever on more than that.
        if self.feed_registers % 8 or not 24 <= self.feed_registers <= 168:
            raise ValueError(f"feed_registers must be a multiple of 8 in [24, 168], got {self.feed_registers=}")

    def check(self, H: int, Hv: int) -> None:
        """Raises ValueError where the tiles do not fit shared memory."""
        by_role = splits_by_role(H, Hv)
        rows = ROWS if by_role else WGS * ROWS
        staging = WGS * ROWS * STAGE_COLUMNS * 4
        dkv = 2 * (H + Hv) * (rows + self.stages * self.block_q_dkv) + 16 * self.stages * self.block_q_dkv + staging
        dkv += 2 * 2 * ROWS * self.block_q_dkv if by_role else 0
        dq = 2 * (H + Hv) * WGS * ROWS + max((H + Hv) * self.slots * self.block_kv_dq, staging)
        if H != Hv and self.slots % 2:
            raise ValueError(f"head sizes that differ, {(H, Hv)}, need an even number of slots, got {self.slots=}")
        for name, used in (("dkv", dkv + 1024), ("dq", dq + 1024)):
            if used > SMEM_BYTES:
                raise ValueError(
                    f"{self} needs {used} bytes of shared memory in {name} for head sizes {(H, Hv)}: at most {SMEM_BYTES}"
                )


def default_config(H: int, Hv: int, *, deterministic: bool = True) -> BackwardConfig:
    """Tiles for head sizes (H, Hv), and the form: fused where that is faster and gradients need not repeat.

    Timed on one H200 (2026-11-22, forward + backward, ratio to cuDNN): 128 full 0.93, causal 1.03 (0.84 and 0.92 without
    overlap); 64 causal 0.93 (0.92 with 64 rows a step); 256 full 1.36, causal 1.26. Fused: 128 full 1.06, causal 1.17
    (32K: 1.02, 1.06); 64 full 0.88, causal 0.93.
    """
    widest = max(H, Hv)
    if H != Hv and widest > 128:
        return BackwardConfig(block_q_dkv=64, stages=2, block_kv_dq=64, slots=2)
    if widest <= 64:
        return BackwardConfig(block_q_dkv=128, stages=2, block_kv_dq=128, slots=4)
    if widest <= 128:
        return BackwardConfig(block_q_dkv=64, stages=2, block_kv_dq=128, slots=4, fused=not deterministic)
    return BackwardConfig(block_q_dkv=64, stages=2, block_kv_dq=64, slots=3)


@dataclass(frozen=True)
class Problem:
    """Everything static that the kernels need."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    Hv: int
    flat: bool
    dtype: jnp.dtype
    scale: float
    soft_cap: float | None
    config: BackwardConfig

    @property
    def G(self) -> int:
        return self.N // self.K

    def key_at(self, b, rows, head):
        return (b, rows, head, pl.ds(0, self.H))

    def value_at(self, b, rows, head):
        """Of kv seen as [2 B, S, K, H] (packed) or [B, S, K, H + Hv] (flat)."""
        return (b, rows, head, pl.ds(self.H, self.Hv)) if self.flat else (b + self.B, rows, head, pl.ds(0, self.Hv))


class Value:
    """Stands for an accumulator in interpret mode, which has no wgmma with a register operand."""

    def __init__(self, array):
        self.array = array


def accumulate(fn, *shapes):
    """fn(*accumulators) with fresh zero accumulators in registers."""
    if compat.interpreting():
        return fn(*(Value(jnp.zeros(shape, jnp.float32)) for shape in shapes))
    return pl.run_scoped(fn, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def product(acc, lhs, rhs, *, rhs_transposed=False):
    """acc += lhs @ rhs, issued and not waited for."""
    if isinstance(acc, Value):
        rhs_array = rhs[...].T if rhs_transposed else rhs[...]
        acc.array += lax.dot(
            lhs if isinstance(lhs, jax.Array) else lhs[...], rhs_array, preferred_element_type=jnp.float32
        )
    else:
        plgpu.wgmma(acc, lhs, rhs.transpose((1, 0)) if rhs_transposed else rhs)


def read(acc, in_flight=0):
    """The accumulator's value once at most `in_flight` products are still running."""
    return acc.array if isinstance(acc, Value) else plgpu.wgmma_accumulator_load(acc, wait_n=in_flight)


def loop(lower, upper, body, *accumulators):
    """for i in [lower, upper): body(i), where the body adds to the accumulators."""
    # From 0, since `lower` may vary over a manual mesh axis and the loop's own counter does not.
    if not any(isinstance(acc, Value) for acc in accumulators):
        lax.fori_loop(0, upper - lower, lambda i, _: body(lower + i), None)
        return

    def step(i, arrays):
        for acc, array in zip(accumulators, arrays, strict=True):
            acc.array = array
        body(lower + i)
        return tuple(acc.array for acc in accumulators)

    arrays = lax.fori_loop(0, upper - lower, step, tuple(acc.array for acc in accumulators))
    for acc, array in zip(accumulators, arrays, strict=True):
        acc.array = array


def softmax(problem, s, lse, visible):
    """P = exp2(S log2(e) - LSE) of one tile, and the derivative of the soft cap (or None). `lse`, `visible` as tiles."""
    derivative = None
    if problem.soft_cap is None:
        exponent = s * (problem.scale * LOG2E) - lse
    else:
        # tanh from exp2: the hardware's tanh is good to 5e-4 only, too coarse once multiplied by the cap.
        tanh = 1.0 - 2.0 / (1.0 + jnp.exp2(s * (2.0 * LOG2E * problem.scale / problem.soft_cap)))
        derivative = 1.0 - tanh * tanh
        exponent = tanh * (problem.soft_cap * LOG2E) - lse
    return visible(jnp.exp2(exponent)), derivative


def masked(p, keys, start, end):
    return jnp.where((keys >= start) & (keys < end), p, 0.0)


def store(acc, scale, staging, target):
    """Writes scale * acc [64, columns] to `target(columns)` in float32; TMA cuts off rows beyond the array."""
    value = read(acc) * scale
    for column in range(0, value.shape[1], STAGE_COLUMNS):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staging[...] = lax.slice(value, (0, column), (ROWS, column + STAGE_COLUMNS))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging, target(pl.ds(column, STAGE_COLUMNS)))
    plgpu.wait_smem_to_gmem(0)


def drain(total, depth, *barriers):
    """Waits until everything in flight was consumed: barriers must not be left behind with a pending phase."""

    pending = lax.min(total, depth)

    @pl.loop(0, pending)
    def _(i):
        for barrier in barriers:
            plgpu.barrier_wait(barrier.at[lax.rem(total - pending + i, depth)])


def ring_slot(i, slots):
    """i mod slots, for i >= 0."""
    return i & (slots - 1) if slots & (slots - 1) == 0 else lax.rem(i, slots)


def program(problem, heads, tiles, *, descending):
    """(batch, head, tile) of this program: heads fastest, so that neighbours share tiles in L2; the longest first."""
    p = lax.axis_index("program")
    head, p = lax.rem(p, heads), lax.div(p, heads)
    b, tile = lax.rem(p, problem.B), lax.div(p, problem.B)
    return b, head, tiles - 1 - tile if descending else tile
