"""What the Hopper backward kernels share: their configuration, the static problem, and steps written once.

The algorithm and its symbols are in `backward_launch`.
"""

from dataclasses import dataclass

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ring_jax._arrays import LOG2E
from ring_jax.flash.hopper.config import SHARED_MEMORY_BYTES
from ring_jax.flash.operands import BlockOptions
from ring_jax.mosaic import compat

ROWS = 64  # one warpgroup's wgmma rows
WGS = 2  # compute warpgroups
STAGE_COLUMNS = 32  # float32 columns per step of the epilogue: one 128-byte swizzle
TILE = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value per row of a tile
COL = plgpu.Layout.WGMMA.reduce(0)  # one value per column


def splits_by_role(H: int, Hv: int) -> bool:
    """Whether dK and dV of 64 keys are too wide for the registers of one warpgroup."""
    return H + Hv > 256


def keys_of_a_program(H: int, Hv: int) -> int:
    """Of dkv and fused: the rows of dK and dV that one thread block owns."""
    return ROWS if splits_by_role(H, Hv) else WGS * ROWS


@dataclass(frozen=True)
class BackwardConfig:
    """Tile sizes and pipeline depths.

    block_q_dkv: query rows per step of the dkv kernel.  stages: its Q, dO buffers.
    block_kv_dq: keys per step of the dq kernel.  slots: its K and V buffers together, of an odd number one more for K.
    warpgroups_dq: of 64 query rows each, which compute in the dq kernel; three leave each other 160 registers.
    overlap: dkv issues dP's product before the softmax, not after it; hides more and takes more registers.
    mask_first: dkv masks before exp2, not after it (see `softmax`).
    pipeline_dkv: dkv issues S, dP of the next queries together with dV, dK of the last ones, which then run during the
        softmax; takes registers for both, and gains from a third buffer. Without it, dS is made of the rounded P. Not where
        roles split.
    fused: one kernel of five products where the caller does not ask for repeatable gradients, else two of seven; it
        lacks the registers to overlap. Takes 64 or, at head size 64, 128 query rows a step.
    feed_registers: of the fused form's third warpgroup, which computes dQ; the other two share the rest.
    """

    block_q_dkv: int = 64
    stages: int = 2
    block_kv_dq: int = 128
    slots: int = 4
    warpgroups_dq: int = 2
    overlap: bool = True
    mask_first: bool = False
    pipeline_dkv: bool = False
    fused: bool = False
    feed_registers: int = 72

    def __post_init__(self):
        if self.block_q_dkv not in (32, 64, 128):
            raise ValueError(f"block_q_dkv must be 32, 64 or 128, got {self.block_q_dkv=}")
        if self.block_kv_dq % 16 or not 16 <= self.block_kv_dq <= 256:
            raise ValueError(f"block_kv_dq must be a multiple of 16 in [16, 256], got {self.block_kv_dq=}")
        if self.stages < 1 + self.pipeline_dkv or self.slots < 2:
            raise ValueError(
                f"need one stage, two with pipeline_dkv, and two slots, got {self.stages=}, {self.pipeline_dkv=}, {self.slots=}"
            )
        if self.warpgroups_dq not in (2, 3):
            raise ValueError(f"warpgroups_dq must be 2 or 3, got {self.warpgroups_dq=}")
        # A program starts with 168 registers a thread in three warpgroups; setmaxnreg waits for ever on more than that.
        if self.feed_registers % 8 or not 24 <= self.feed_registers <= 168:
            raise ValueError(f"feed_registers must be a multiple of 8 in [24, 168], got {self.feed_registers=}")

    @property
    def slots_of_dq(self) -> tuple[int, int]:
        return self.slots - self.slots // 2, self.slots // 2

    def check(self, H: int, Hv: int) -> None:
        """Raises ValueError where the tiles do not fit shared memory."""
        by_role = splits_by_role(H, Hv)
        rows = keys_of_a_program(H, Hv)
        staging = WGS * ROWS * STAGE_COLUMNS * 4
        dkv = 2 * (H + Hv) * (rows + self.stages * self.block_q_dkv) + 16 * self.stages * self.block_q_dkv + staging
        dkv += 2 * 2 * ROWS * self.block_q_dkv if by_role else 0
        if self.fused and not by_role:
            dkv += 2 * 2 * WGS * ROWS * self.block_q_dkv + 4 * H * self.block_q_dkv
        key_slots, value_slots = self.slots_of_dq
        dq = 2 * (H + Hv) * self.warpgroups_dq * ROWS + max(
            2 * (H * key_slots + Hv * value_slots) * self.block_kv_dq, staging
        )
        for name, used in (("dkv", dkv + 1024), ("dq", dq + 1024)):
            if used > SHARED_MEMORY_BYTES:
                raise ValueError(
                    f"{self} needs {used} bytes of shared memory in {name} for head sizes {(H, Hv)}: at most {SHARED_MEMORY_BYTES}"
                )


def default_config(H: int, Hv: int, *, deterministic: bool | None = None) -> BackwardConfig:
    """Tiles for head sizes (H, Hv), and the form: fused where that is faster and gradients need not repeat.

    Timed on one H200 (2026-11-22, forward + backward, full and causal, ratio to cuDNN):
    64 (16K): repeatable 1.04, 1.06, fused 1.14, 1.17; 128 (8K): repeatable 0.96, 1.10, fused 1.08, 1.21; 128 (32K):
    repeatable 0.93, 0.97, fused 1.04, 1.08; 256 (32K full): 1.30.
    The kernels alone, full: 64, dq 5.44 ms with three warpgroups and 96 keys, 5.77 with two and 128; dkv 7.70 ms, with the
    mask last 8.19, pipelined with 64 queries 8.16; fused 10.95 ms pipelined, 11.66 overlapped, 13.41 neither. 64 fused, again on
    2026-11-27 (16K full, forward + backward): four stages 16.8 ms, three 17.1 to 17.4, two 20.2.
    """
    widest = max(H, Hv)
    if H != Hv and widest > 128:
        return BackwardConfig(block_q_dkv=64, stages=2, block_kv_dq=64, slots=2)
    if widest <= 64:
        # Repeating costs 10% here, which None accepts; 9 to 12% at 128, which it does not.
        if deterministic is False:
            return BackwardConfig(
                block_q_dkv=64, stages=4, block_kv_dq=96, slots=8, warpgroups_dq=3, pipeline_dkv=True, fused=True
            )
        return BackwardConfig(block_q_dkv=128, stages=2, block_kv_dq=96, slots=8, warpgroups_dq=3, mask_first=True)
    if widest <= 128:
        return BackwardConfig(
            block_q_dkv=64, stages=2, block_kv_dq=128, slots=4, fused=not deterministic, feed_registers=88
        )
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
    options: BlockOptions
    config: BackwardConfig
    segments: int = 1
    fused: bool = False  # one kernel that adds dq in memory, not two
    # Programs of dkv and fused that share a KV tile, each with its share of the query heads; they add to zeros.
    split: int = 1
    # N counts the query heads that share the K heads here; the arrays of queries may hold others around them.
    first_head: int = 0

    @property
    def G(self) -> int:
        return self.N // self.K

    @property
    def share(self) -> int:
        """Query heads of one program of dkv and fused; program head i has the heads from i * share on."""
        return self.G // self.split

    def roles(self, wg, span):
        """Whether a warpgroup computes, and whether it feeds the others; what would only add zeros does neither."""
        compute, feed = wg < WGS, wg == WGS
        return (compute, feed) if self.split == 1 else (compute & (span[1] > span[0]), feed & (span[1] > span[0]))

    def kv_head(self, head):
        """The KV head of a program head."""
        return head if self.split == 1 else lax.div(head, self.split)

    def key_at(self, b, rows, head):
        """Of kv seen as [P 2 B, S, K, H] (packed) or [P B, S, K, H + Hv] (flat), b in [0, P B)."""
        return (b if self.flat else self._packed_row(b), rows, head, pl.ds(0, self.H))

    def value_at(self, b, rows, head):
        if self.flat:
            return (b, rows, head, pl.ds(self.H, self.Hv))
        return (self._packed_row(b) + self.B, rows, head, pl.ds(0, self.Hv))

    def _packed_row(self, b):
        return b if self.segments == 1 else b + lax.div(b, self.B) * self.B

    def query_batch(self, b):
        """The batch entry whose queries see the keys of `b`, which counts batch entries segment by segment."""
        return b if self.segments == 1 else lax.rem(b, self.B)


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


def softmax(problem, s, lse, visible, *, mask_first=False):
    """P = exp2(S log2(e) - LSE) of one tile, and the derivative of the soft cap (or None). `lse()` as a tile.

    `visible(x, hidden)` puts `hidden` where x is masked. With `mask_first` before exp2: its branch then does not part exp2
    from the instructions that can run while exp2's unit is busy.
    """
    if problem.options.logits_soft_cap is None:
        factor, derivative = problem.options.scale * LOG2E, None
    else:
        # tanh from exp2: the hardware's tanh is good to 5e-4 only, too coarse once multiplied by the cap.
        s = 1.0 - 2.0 / (1.0 + jnp.exp2(s * (2.0 * LOG2E * problem.options.scale / problem.options.logits_soft_cap)))
        factor, derivative = problem.options.logits_soft_cap * LOG2E, 1.0 - s * s
    if mask_first:
        s = visible(s, -jnp.inf)
        return jnp.exp2(s * factor - lse()), derivative
    return visible(jnp.exp2(s * factor - lse()), 0.0), derivative


def masked(x, keys, start, end, hidden):
    return jnp.where((keys >= start) & (keys < end), x, hidden)


def store(acc, scale, staging, target, *, add=False):
    """Writes scale * acc [64, columns] to `target(columns)`, float32, or adds it; TMA cuts off rows beyond the array."""
    value = read(acc) * scale
    for column in range(0, value.shape[1], STAGE_COLUMNS):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staging[...] = lax.slice(value, (0, column), (ROWS, column + STAGE_COLUMNS))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging, target(pl.ds(column, STAGE_COLUMNS)), reduction_op="add" if add else None)
    plgpu.wait_smem_to_gmem(0)


def drain(total, depth, *barriers):
    """Waits until everything in flight was consumed: barriers must not be left behind with a pending phase."""

    pending = lax.min(total, depth)

    @pl.loop(0, pending)
    def _(i):
        for barrier in barriers:
            plgpu.barrier_wait(barrier.at[lax.rem(total - pending + i, depth)])


def span_of(table, b, tile):
    """(first, last, u, v) from a row of the dkv table: a KV tile visits the query tiles [first, last), [u, v) without mask."""
    first, last, u, v = (table[b, tile, i] for i in range(4))
    last = lax.max(first, last)
    u = lax.clamp(first, u, last)
    return first, last, u, lax.clamp(u, v, last)


def program(batch, heads, tiles, *, descending):
    """(batch, head, tile) of this program: heads fastest, so that neighbours share tiles in L2; the longest first."""
    p = lax.axis_index("program")
    head, p = lax.rem(p, heads), lax.div(p, heads)
    b, tile = lax.rem(p, batch), lax.div(p, batch)
    return b, head, tiles - 1 - tile if descending else tile
