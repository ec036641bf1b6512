"""Flash-attention backward on Hopper in Pallas Mosaic GPU: two kernels, seven matrix products, bitwise repeatable.

    S = scale Q K^T (soft-capped),  P = exp(S - LSE),  dV = P^T dO,  dP = dO V^T,  dS = P (dP - delta),
    dQ = scale dS K,  dK = scale dS^T Q

Algorithm: FlashAttention-2 (arXiv 2307.08691), section 3.1.2, with the warp specialisation of FlashAttention-3
(arXiv 2407.08608). LSE is the final one of the whole attention, perhaps over several KV blocks, and
delta = rowsum(dO . O) - dLSE (the paper's D). The plain form is `flash.reference.backward`.

- `dkv`: a program owns one KV tile of one KV head and walks over the query tiles of every query head of the group, so
  dK and dV stay in registers and GQA needs no atomics. It works on transposed tiles S^T [keys, queries]: P^T and dS^T
  then are left operands in registers.
- `dq`: a program owns one query tile of one query head and walks over the KV tiles.

One warpgroup feeds shared memory by TMA, two compute. Where dK and dV do not fit one warpgroup's registers (H + Hv >
256) the compute warpgroups of `dkv` split by role instead of by rows: one makes P and dV, the other dS and dK.

Tiles outside the interval of keys that their rows see are never visited; only tiles on its edge are masked.
"""

from dataclasses import dataclass
from functools import partial
import math

import jax
from jax import lax
import jax.experimental.pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from ring_jax.flash import mosaic_compat as compat
from ring_jax.flash import packed

_LOG2E = math.log2(math.e)
_ROWS = 64  # one warpgroup's wgmma rows
_WGS = 2
_STAGE_COLUMNS = 32  # float32 columns per step of the epilogue: one 128-byte swizzle
_SMEM_BYTES = 227 * 1024
_TILE = plgpu.Layout.WGMMA
_ROW = plgpu.Layout.WGMMA.reduce(1)  # one value per row of a tile
_COL = plgpu.Layout.WGMMA.reduce(0)  # one value per column


@dataclass(frozen=True)
class BackwardConfig:
    """Tile sizes and pipeline depths.

    block_q_dkv: query rows per step of the dkv kernel.  stages: its Q, dO buffers.
    block_kv_dq: keys per step of the dq kernel.  slots: its K and V buffers, K and V alternate.
    """

    block_q_dkv: int = 64
    stages: int = 2
    block_kv_dq: int = 128
    slots: int = 4

    def __post_init__(self):
        if self.block_q_dkv % 32 or not 32 <= self.block_q_dkv <= 128:
            raise ValueError(f"block_q_dkv must be a multiple of 32 in [32, 128], got {self.block_q_dkv=}")
        if self.block_kv_dq % 16 or not 16 <= self.block_kv_dq <= 256:
            raise ValueError(f"block_kv_dq must be a multiple of 16 in [16, 256], got {self.block_kv_dq=}")
        if self.stages < 1 or self.slots < 2:
            raise ValueError(f"need at least one stage and two slots, got {self.stages=}, {self.slots=}")

    def check(self, H: int, Hv: int) -> None:
        """Raises ValueError where the tiles do not fit shared memory."""
        by_role = _by_role(H, Hv)
        rows = _ROWS if by_role else _WGS * _ROWS
        staging = _WGS * _ROWS * _STAGE_COLUMNS * 4
        dkv = 2 * (H + Hv) * (rows + self.stages * self.block_q_dkv) + 16 * self.stages * self.block_q_dkv + staging
        dkv += 2 * 2 * _ROWS * self.block_q_dkv if by_role else 0
        dq = 2 * (H + Hv) * _WGS * _ROWS + max((H + Hv) * self.slots * self.block_kv_dq, staging)
        if H != Hv and self.slots % 2:
            raise ValueError(f"head sizes that differ, {(H, Hv)}, need an even number of slots, got {self.slots=}")
        for name, used in (("dkv", dkv + 1024), ("dq", dq + 1024)):
            if used > _SMEM_BYTES:
                raise ValueError(f"{self} needs {used} bytes of shared memory in {name} for head sizes {(H, Hv)}: at most {_SMEM_BYTES}")


def default_config(H: int, Hv: int) -> BackwardConfig:
    """The measured best for head sizes (H, Hv)."""
    widest = max(H, Hv)
    if H != Hv and widest > 128:
        return BackwardConfig(block_q_dkv=64, stages=2, block_kv_dq=64, slots=2)
    if widest <= 64:
        return BackwardConfig(block_q_dkv=128, stages=2, block_kv_dq=128, slots=4)
    if widest <= 128:
        return BackwardConfig(block_q_dkv=64, stages=2, block_kv_dq=128, slots=4)
    return BackwardConfig(block_q_dkv=64, stages=2, block_kv_dq=64, slots=3)


def unsupported_reason(query, kv, *, logits_soft_cap=None, **_) -> str | None:
    """Why `backward` cannot run on these shapes and dtypes, or None. Says nothing of the device."""
    if query.dtype not in (jnp.bfloat16, jnp.float16) or kv.dtype != query.dtype:
        return f"the Hopper backward takes bfloat16 or float16 query and KV of one dtype, got {query.dtype} and {kv.dtype}"
    H = query.shape[-1]
    Hv = packed.value_size(kv, H)
    if H % 64 or Hv % 64 or not (64 <= H <= 256 and 64 <= Hv <= 256):
        return f"the Hopper backward takes head sizes 64, 128, 192 and 256, got {H} and {Hv}: pad them with zeros"
    if query.shape[2] % kv.shape[-2]:
        return f"{query.shape[2]} query heads cannot share {kv.shape[-2]} KV heads"
    if 0 in query.shape or 0 in kv.shape:
        return "the Hopper backward takes no empty arrays"
    return None


def _by_role(H: int, Hv: int) -> bool:
    return H + Hv > 256


@dataclass(frozen=True)
class _Problem:
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


def backward(
    query: jax.Array,
    kv: jax.Array,
    key_start: jax.Array,
    key_end: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
    *,
    scale: float,
    logits_soft_cap: float | None = None,
    deterministic: bool = True,
    config: BackwardConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of one attention block from the final LSE.

    Args:
        query: [B, T, N, H] bfloat16 or float16.
        kv: packed [2, B, S, K, H], or flat [B, S, K, H + Hv] where the value's head size differs.
        key_start, key_end: int32 [B, T]; row t sees the keys start <= s < end; non-decreasing along T.
        lse: [B, T, N] float32, natural logarithm; -inf on rows that see nothing.
        delta: [B, T, N] float32, rowsum(dO . O) - dLSE.
        dout: [B, T, N, Hv], the query's dtype.
    Returns:
        dq [B, T, N, H] and dkv like kv, both float32.
    Raises:
        NotImplementedError: see `unsupported_reason`.
        ValueError: the config does not fit.
    """
    if (reason := unsupported_reason(query, kv)) is not None:
        raise NotImplementedError(reason)
    length, kv_length = query.shape[1], kv.shape[-3]
    query, lse, delta, dout = (_to_eight(x, 1) for x in (query, lse, delta, dout))
    key_start, key_end = (_to_eight(x, 1, mode="edge") for x in (key_start, key_end))
    kv = _to_eight(kv, kv.ndim - 3)
    B, T, N, H = query.shape
    S, K = kv.shape[-3:-1]
    Hv = packed.value_size(kv, H)
    config = config or default_config(H, Hv)
    config.check(H, Hv)
    dtype = jnp.dtype(query.dtype)
    # A padded row sees nothing.
    key_start = jnp.where(jnp.arange(T) < length, key_start, key_end) if T != length else key_start
    problem = _Problem(B, T, S, N, K, H, Hv, kv.ndim == 4, dtype, float(scale), logits_soft_cap, config)
    rows = _prepare_rows(problem, key_start, key_end, lse, delta)
    operands = (query, kv.reshape(-1, S, K, kv.shape[-1]), dout.astype(dtype), *rows)
    dq = _dq(problem, *operands, _dq_table(problem, key_start, key_end))
    dkv = _dkv(problem, *operands, _dkv_table(problem, key_start, key_end))
    dkv = lax.slice_in_dim(dkv.reshape(kv.shape), 0, kv_length, axis=kv.ndim - 3)
    return lax.slice_in_dim(dq, 0, length, axis=1), dkv


# What is cheap and done once, in XLA.


def _to_eight(x, axis, mode="constant"):
    """TMA reads tiles of 8 rows: pads a length that does not divide (nothing is copied where it does)."""
    pad = -x.shape[axis] % 8
    return jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)], mode=mode) if pad else x


def _prepare_rows(problem, key_start, key_end, lse, delta):
    """Per-row values as TMA wants them: sequence last, padded to whole tiles.

    Returns stats [B, N, 2, T'] float32 (LSE in base 2, delta) and bounds [B, 2, T'] int32. A row that sees nothing, and
    padding, gets LSE = +inf: its P = exp2(S - LSE) is 0 without a mask.
    """
    live = (key_start < key_end)[..., None] & (lse > -jnp.inf)
    stats = jnp.stack([jnp.where(live, lse * _LOG2E, jnp.inf), jnp.where(live, delta, 0.0)], axis=1)  # [B, 2, T, N]
    pad = -problem.T % 128
    stats = lax.pad(stats.transpose(0, 3, 1, 2), jnp.float32(jnp.inf), [(0, 0, 0)] * 3 + [(0, pad, 0)])
    stats = stats.at[:, :, 1, problem.T :].set(0.0) if pad else stats
    bounds = jnp.pad(jnp.stack([key_start, key_end], axis=1), [(0, 0), (0, 0), (0, pad)])
    return stats, bounds


def _row_tiles(problem, key_start, key_end, tile):
    """Extremes of the bounds over the live rows of each query tile: four arrays [B, tiles], and whether any row lives."""
    pad = [(0, 0), (0, -problem.T % tile)]
    start, end = jnp.pad(key_start, pad), jnp.pad(key_end, pad)
    start, end = (x.reshape(problem.B, -1, tile) for x in (start, end))
    live = start < end
    none = problem.S
    return (
        jnp.min(jnp.where(live, start, none), axis=-1),
        jnp.max(jnp.where(live, start, 0), axis=-1),
        jnp.min(jnp.where(live, end, none), axis=-1),
        jnp.max(jnp.where(live, end, 0), axis=-1),
        jnp.any(live, axis=-1),
    )


def _dq_table(problem, key_start, key_end):
    """[B, query tiles, 4] int32: the KV tiles [first, last) that a query tile visits, and [u, v) that need no mask."""
    block = problem.config.block_kv_dq
    min_start, max_start, min_end, max_end, live = _row_tiles(problem, key_start, key_end, _WGS * _ROWS)
    last = jnp.where(live, pl.cdiv(max_end, block), 0)
    first = jnp.minimum(min_start // block, last)
    u = jnp.clip(pl.cdiv(max_start, block), first, last)
    v = jnp.clip(min_end // block, u, last)
    return jnp.stack([first, last, u, v], axis=-1).astype(jnp.int32)


def _dkv_table(problem, key_start, key_end):
    """[B, KV tiles, 4] int32: the query tiles [first, last) that a KV tile visits, and [u, v) that need no mask."""
    block = _ROWS if _by_role(problem.H, problem.Hv) else _WGS * _ROWS
    extremes = _row_tiles(problem, key_start, key_end, problem.config.block_q_dkv)
    min_start, max_start, min_end, max_end, live = (x[:, None, :] for x in extremes)
    tiles = live.shape[-1]
    low = (jnp.arange(pl.cdiv(problem.S, block), dtype=jnp.int32) * block)[None, :, None]
    index = jnp.arange(tiles, dtype=jnp.int32)
    meets = live & (min_start < low + block) & (max_end > low)
    first = jnp.min(jnp.where(meets, index, tiles), axis=-1)
    last = jnp.max(jnp.where(meets, index + 1, 0), axis=-1)
    first = jnp.minimum(first, last)
    inside = (index >= first[..., None]) & (index < last[..., None])
    full = inside & (~live | ((max_start <= low) & (min_end >= low + block)))
    u = jnp.minimum(jnp.min(jnp.where(full, index, tiles), axis=-1), last)
    v = jnp.min(jnp.where(inside & ~full & (index >= u[..., None]), index, last[..., None]), axis=-1)
    return jnp.stack([first, last, u, jnp.maximum(u, v)], axis=-1).astype(jnp.int32)


# Pieces that both kernels use.


class _Value:
    """Stands for an accumulator in interpret mode, which has no wgmma with a register operand."""

    def __init__(self, array):
        self.array = array


def _accumulate(fn, *shapes):
    """fn(*accumulators) with fresh zero accumulators in registers."""
    if compat.interpreting():
        return fn(*(_Value(jnp.zeros(shape, jnp.float32)) for shape in shapes))
    return pl.run_scoped(fn, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def _product(acc, lhs, rhs, *, rhs_transposed=False):
    """acc += lhs @ rhs, issued and not waited for."""
    if isinstance(acc, _Value):
        rhs_array = rhs[...].T if rhs_transposed else rhs[...]
        acc.array += lax.dot(lhs if isinstance(lhs, jax.Array) else lhs[...], rhs_array, preferred_element_type=jnp.float32)
    else:
        plgpu.wgmma(acc, lhs, rhs.transpose((1, 0)) if rhs_transposed else rhs)


def _read(acc, in_flight=0):
    """The accumulator's value once at most `in_flight` products are still running."""
    return acc.array if isinstance(acc, _Value) else plgpu.wgmma_accumulator_load(acc, wait_n=in_flight)


def _loop(lower, upper, body, *accumulators):
    """for i in [lower, upper): body(i), where the body adds to the accumulators."""
    # From 0, since `lower` may vary over a manual mesh axis and the loop's own counter does not.
    if not any(isinstance(acc, _Value) for acc in accumulators):
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


def _softmax(problem, s, lse, visible):
    """P = exp2(S log2(e) - LSE) of one tile, and the derivative of the soft cap (or None). `lse`, `visible` as tiles."""
    derivative = None
    if problem.soft_cap is None:
        exponent = s * (problem.scale * _LOG2E) - lse
    else:
        # tanh from exp2: the hardware's tanh is good to 5e-4 only, too coarse once multiplied by the cap.
        tanh = 1.0 - 2.0 / (1.0 + jnp.exp2(s * (2.0 * _LOG2E * problem.scale / problem.soft_cap)))
        derivative = 1.0 - tanh * tanh
        exponent = tanh * (problem.soft_cap * _LOG2E) - lse
    return visible(jnp.exp2(exponent)), derivative


def _masked(p, keys, start, end):
    return jnp.where((keys >= start) & (keys < end), p, 0.0)


def _store(acc, scale, staging, target):
    """Writes scale * acc [64, columns] to `target(columns)` in float32; TMA cuts off rows beyond the array."""
    value = _read(acc) * scale
    for column in range(0, value.shape[1], _STAGE_COLUMNS):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staging[...] = lax.slice(value, (0, column), (_ROWS, column + _STAGE_COLUMNS))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging, target(pl.ds(column, _STAGE_COLUMNS)))
    plgpu.wait_smem_to_gmem(0)


def _drain(total, depth, *barriers):
    """Waits until everything in flight was consumed: barriers must not be left behind with a pending phase."""

    pending = lax.min(total, depth)

    @pl.loop(0, pending)
    def _(i):
        for barrier in barriers:
            plgpu.barrier_wait(barrier.at[lax.rem(total - pending + i, depth)])


def _program(problem, heads, tiles, *, descending):
    """(batch, head, tile) of this program: heads fastest, so that neighbours share tiles in L2; the longest first."""
    p = lax.axis_index("program")
    head, p = lax.rem(p, heads), lax.div(p, heads)
    b, tile = lax.rem(p, problem.B), lax.div(p, problem.B)
    return b, head, tiles - 1 - tile if descending else tile


# The dq kernel.


def _dq(problem, query, kv, dout, stats, bounds, table):
    H, Hv, config = problem.H, problem.Hv, problem.config
    tiles = table.shape[1]
    if H == Hv:
        slots = (compat.tiled_smem((config.slots, config.block_kv_dq, H), problem.dtype),)
    else:
        slots = tuple(compat.tiled_smem((config.slots // 2, config.block_kv_dq, width), problem.dtype) for width in (H, Hv))
    staging = compat.tiled_smem((_WGS, _ROWS, _STAGE_COLUMNS), jnp.float32)
    call = compat.kernel(
        partial(_dq_body, problem, tiles),
        name="flash_backward_dq",
        out_type=compat.output_like((problem.B, problem.T, problem.N, H), jnp.float32, query, kv, dout, stats, bounds),
        scratch=dict(
            q_smem=compat.tiled_smem((_WGS, _ROWS, H), problem.dtype),
            do_smem=compat.tiled_smem((_WGS, _ROWS, Hv), problem.dtype),
            # The epilogue's staging reuses the KV slots.
            slots=plgpu.RefUnion(slots, staging),
            rows_full=plgpu.Barrier(num_arrivals=2, num_barriers=_WGS),
            full=plgpu.Barrier(num_barriers=config.slots),
            consumed=plgpu.Barrier(num_arrivals=_WGS, num_barriers=config.slots),
            done=plgpu.Barrier(num_arrivals=_WGS),
        ),
        grid=(problem.N * problem.B * tiles,),
        grid_names=("program",),
        num_threads=_WGS + 1,
        thread_name="wg",
    )
    return call(query, kv, dout, stats, bounds, table)


def _slot(slots, slot, i):
    """Buffer `slot` of the ring in which K (i = 0) and V (i = 1) alternate."""
    return slots[0].at[slot] if len(slots) == 1 else slots[i].at[lax.div(slot, 2)]


def _dq_body(problem, tiles, query, kv, dout, stats, bounds, table, dq, *, q_smem, do_smem, slots, rows_full, full, consumed, done):  # fmt: skip
    config = problem.config
    block = config.block_kv_dq
    wg = lax.axis_index("wg")
    b, head, tile = _program(problem, problem.N, tiles, descending=True)
    first, last, u, v = (table[b, tile, i] for i in range(4))
    slots, staging = slots

    @pl.when(wg < _WGS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        rows = pl.ds(tile * (_WGS * _ROWS) + wg * _ROWS, _ROWS)
        q, do = q_smem.at[wg], do_smem.at[wg]
        plgpu.copy_gmem_to_smem(query.at[b, rows, head], q, rows_full.at[wg])
        plgpu.copy_gmem_to_smem(dout.at[b, rows, head], do, rows_full.at[wg])
        lse, delta = (plgpu.load(stats.at[b, head, i, rows], layout=_ROW, optimized=False) for i in range(2))
        start, end = (plgpu.load(bounds.at[b, i, rows], layout=_ROW, optimized=False) for i in range(2))
        plgpu.barrier_wait(rows_full.at[wg])
        shape = (_ROWS, block)

        def spread(x):
            return lax.broadcast_in_dim(x, shape, [0])

        def walk(dq_acc):
            def step(j):
                item = 2 * (j - first)
                k_slot, v_slot = lax.rem(item, config.slots), lax.rem(item + 1, config.slots)
                key, value = _slot(slots, k_slot, 0), _slot(slots, v_slot, 1)

                def visible(p):
                    keys = j * block + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_TILE)
                    return lax.cond((j < u) | (j >= v), lambda: _masked(p, keys, spread(start), spread(end)), lambda: p)

                def scores(s_acc, dp_acc):
                    plgpu.barrier_wait(full.at[k_slot])
                    _product(s_acc, q, key, rhs_transposed=True)
                    plgpu.barrier_wait(full.at[v_slot])
                    _product(dp_acc, do, value, rhs_transposed=True)
                    p, derivative = _softmax(problem, _read(s_acc, in_flight=1), spread(lse), visible)
                    ds = p * (_read(dp_acc) - spread(delta))
                    plgpu.barrier_arrive(consumed.at[v_slot])
                    return ds if derivative is None else ds * derivative

                ds = _accumulate(scores, shape, shape)
                _product(dq_acc, ds.astype(problem.dtype), key)
                _read(dq_acc)
                plgpu.barrier_arrive(consumed.at[k_slot])

            _loop(first, last, step, dq_acc)
            # The staging buffer reuses the slots, and the other warpgroup may still read them.
            plgpu.barrier_arrive(done)
            plgpu.barrier_wait(done)
            _store(dq_acc, problem.scale, staging.at[wg], lambda columns: dq.at[b, rows, head, columns])

        _accumulate(walk, (_ROWS, problem.H))

    @pl.when(wg == _WGS)
    def _memory():
        plgpu.set_max_registers(40, action="decrease")
        kv_head = lax.div(head, problem.G)

        @pl.loop(0, last - first)
        def _(t):
            keys = pl.ds((first + t) * block, block)
            for i, source in enumerate((problem.key_at, problem.value_at)):
                slot = lax.rem(2 * t + i, config.slots)

                @pl.when(2 * t + i >= config.slots)
                def _(slot=slot):
                    plgpu.barrier_wait(consumed.at[slot])

                plgpu.copy_gmem_to_smem(kv.at[source(b, keys, kv_head)], _slot(slots, slot, i), full.at[slot])

        _drain(2 * (last - first), config.slots, consumed)


# The dkv kernel.


def _dkv(problem, query, kv, dout, stats, bounds, table):
    H, Hv, config = problem.H, problem.Hv, problem.config
    by_role = _by_role(H, Hv)
    rows = _ROWS if by_role else _WGS * _ROWS
    tiles, block, stages = table.shape[1], config.block_q_dkv, config.stages
    scratch = dict(
        k_smem=compat.tiled_smem((rows // _ROWS, _ROWS, H), problem.dtype),
        v_smem=compat.tiled_smem((rows // _ROWS, _ROWS, Hv), problem.dtype),
        q_smem=compat.tiled_smem((stages, block, H), problem.dtype),
        do_smem=compat.tiled_smem((stages, block, Hv), problem.dtype),
        stats_smem=plgpu.SMEM((stages, 2, block), jnp.float32),
        bounds_smem=plgpu.SMEM((stages, 2, block), jnp.int32),
        staging=compat.tiled_smem((_WGS, _ROWS, _STAGE_COLUMNS), jnp.float32),
        kv_full=plgpu.Barrier(num_arrivals=2 * (rows // _ROWS)),
        q_full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        do_full=plgpu.Barrier(num_barriers=stages),
        q_consumed=plgpu.Barrier(num_arrivals=_WGS, num_barriers=stages),
        do_consumed=plgpu.Barrier(num_arrivals=_WGS, num_barriers=stages),
    )
    if by_role:
        scratch |= dict(
            p_smem=compat.tiled_smem((2, _ROWS, block), problem.dtype),
            p_full=plgpu.Barrier(num_barriers=2),
            p_consumed=plgpu.Barrier(num_barriers=2),
        )
    call = compat.kernel(
        partial(_dkv_body, problem, tiles),
        name="flash_backward_dkv",
        out_type=compat.output_like(kv.shape, jnp.float32, query, kv, dout, stats, bounds),
        scratch=scratch,
        grid=(problem.K * problem.B * tiles,),
        grid_names=("program",),
        num_threads=_WGS + 1,
        thread_name="wg",
    )
    return call(query, kv, dout, stats, bounds, table)


def _dkv_body(problem, tiles, query, kv, dout, stats, bounds, table, dkv, *, kv_full, **scratch):
    by_role = _by_role(problem.H, problem.Hv)
    wg = lax.axis_index("wg")
    b, head, tile = _program(problem, problem.K, tiles, descending=False)
    span = tuple(table[b, tile, i] for i in range(4))
    pieces = 1 if by_role else _WGS
    first_row = tile * (pieces * _ROWS)

    def target(at, piece, row):
        """Where a column range of dK or dV goes."""
        index = at(b, pl.ds(row, _ROWS), head)
        return lambda columns: dkv.at[index[0], index[1], index[2], pl.ds(index[3].start + columns.start, columns.size)]

    if by_role:
        for role, body in enumerate((_dv_role, _dk_role)):
            at = (problem.value_at, problem.key_at)[role]

            @pl.when(wg == role)
            def _(body=body, role=role, at=at):
                plgpu.set_max_registers(232, action="increase")
                plgpu.barrier_wait(kv_full)
                body(problem, span, first_row, target(at, 0, first_row), **scratch)
    else:

        @pl.when(wg < _WGS)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            plgpu.barrier_wait(kv_full)
            row = first_row + wg * _ROWS
            _dkv_rows(problem, span, wg, row, target(problem.key_at, wg, row), target(problem.value_at, wg, row), **scratch)

    @pl.when(wg == _WGS)
    def _memory():
        plgpu.set_max_registers(40, action="decrease")
        for piece in range(pieces):
            rows = pl.ds(first_row + piece * _ROWS, _ROWS)
            plgpu.copy_gmem_to_smem(kv.at[problem.key_at(b, rows, head)], scratch["k_smem"].at[piece], kv_full)
            plgpu.copy_gmem_to_smem(kv.at[problem.value_at(b, rows, head)], scratch["v_smem"].at[piece], kv_full)
        _feed_queries(problem, span, b, head, query, dout, stats, bounds, **scratch)


def _feed_queries(problem, span, b, head, query, dout, stats, bounds, *, q_full, do_full, q_consumed, do_consumed, **smem):
    """Streams the query tiles [first, last) of each query head of the group."""
    block, stages = problem.config.block_q_dkv, problem.config.stages
    first, last = span[:2]
    count = last - first

    @pl.loop(0, problem.G)
    def _(g):
        @pl.loop(0, count)
        def _(i):
            t = g * count + i
            slot, q_head = lax.rem(t, stages), head * problem.G + g
            rows = pl.ds((first + i) * block, block)

            @pl.when(t >= stages)
            def _():
                plgpu.barrier_wait(q_consumed.at[slot])

            plgpu.copy_gmem_to_smem(query.at[b, rows, q_head], smem["q_smem"].at[slot], q_full.at[slot])
            plgpu.copy_gmem_to_smem(stats.at[b, q_head, :, rows], smem["stats_smem"].at[slot], q_full.at[slot])
            plgpu.copy_gmem_to_smem(bounds.at[b, :, rows], smem["bounds_smem"].at[slot], q_full.at[slot])

            @pl.when(t >= stages)
            def _():
                plgpu.barrier_wait(do_consumed.at[slot])

            plgpu.copy_gmem_to_smem(dout.at[b, rows, q_head], smem["do_smem"].at[slot], do_full.at[slot])

    _drain(problem.G * count, stages, q_consumed, do_consumed)


def _walk_queries(problem, span, body, *accumulators):
    """body(t, query tile) for each query tile of each query head of the group; t counts on."""
    first, last = span[:2]
    count = last - first

    def per_head(g):
        _loop(first, last, lambda i: body(g * count + i - first, i), *accumulators)

    _loop(0, problem.G, per_head, *accumulators)


def _visible_keys(span, i, first_key, shape, bounds):
    """Masks P^T [keys, queries] where query tile i needs it."""

    def apply(p):
        keys = first_key + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_TILE)
        start, end = (lax.broadcast_in_dim(plgpu.load(bounds.at[x], layout=_COL), shape, [1]) for x in range(2))
        return _masked(p, keys, start, end)

    return lambda p: lax.cond((i < span[2]) | (i >= span[3]), lambda: apply(p), lambda: p)


def _dkv_rows(problem, span, wg, row, dk_target, dv_target, *, k_smem, v_smem, q_smem, do_smem, stats_smem, bounds_smem,
              staging, q_full, do_full, q_consumed, do_consumed):  # fmt: skip
    """dK and dV of 64 keys in one warpgroup."""
    stages = problem.config.stages
    shape = (_ROWS, problem.config.block_q_dkv)
    key, value = k_smem.at[wg], v_smem.at[wg]

    def spread(ref):
        return lax.broadcast_in_dim(plgpu.load(ref, layout=_COL), shape, [1])

    def walk(dk_acc, dv_acc):
        def step(t, i):
            slot = lax.rem(t, stages)
            q, do = q_smem.at[slot], do_smem.at[slot]

            def scores(s_acc, dp_acc):
                plgpu.barrier_wait(q_full.at[slot])
                _product(s_acc, key, q, rhs_transposed=True)
                lse = spread(stats_smem.at[slot, 0])
                delta = spread(stats_smem.at[slot, 1])
                plgpu.barrier_wait(do_full.at[slot])
                _product(dp_acc, value, do, rhs_transposed=True)
                visible = _visible_keys(span, i, row, shape, bounds_smem.at[slot])
                p, derivative = _softmax(problem, _read(s_acc, in_flight=1), lse, visible)
                _product(dv_acc, p.astype(problem.dtype), do)
                ds = p * (_read(dp_acc, in_flight=1) - delta)
                return ds if derivative is None else ds * derivative

            ds = _accumulate(scores, shape, shape)
            _product(dk_acc, ds.astype(problem.dtype), q)
            _read(dv_acc, in_flight=1)
            plgpu.barrier_arrive(do_consumed.at[slot])
            _read(dk_acc)
            plgpu.barrier_arrive(q_consumed.at[slot])

        _walk_queries(problem, span, step, dk_acc, dv_acc)
        _store(dk_acc, problem.scale, staging.at[wg], dk_target)
        _store(dv_acc, 1.0, staging.at[wg], dv_target)

    _accumulate(walk, (_ROWS, problem.H), (_ROWS, problem.Hv))


def _dv_role(problem, span, row, target, *, k_smem, q_smem, do_smem, stats_smem, bounds_smem, p_smem, staging,
             q_full, do_full, q_consumed, do_consumed, p_full, p_consumed, **_):  # fmt: skip
    """S^T, P^T (handed to the other warpgroup) and dV of 64 keys."""
    stages = problem.config.stages
    shape = (_ROWS, problem.config.block_q_dkv)

    def walk(dv_acc):
        def step(t, i):
            slot, p_slot = lax.rem(t, stages), lax.rem(t, 2)

            def probabilities(s_acc):
                plgpu.barrier_wait(q_full.at[slot])
                _product(s_acc, k_smem.at[0], q_smem.at[slot], rhs_transposed=True)
                lse = lax.broadcast_in_dim(plgpu.load(stats_smem.at[slot, 0], layout=_COL), shape, [1])
                visible = _visible_keys(span, i, row, shape, bounds_smem.at[slot])
                p, derivative = _softmax(problem, _read(s_acc), lse, visible)
                return p, p if derivative is None else p * derivative

            p, p_for_ds = _accumulate(probabilities, shape)
            plgpu.barrier_arrive(q_consumed.at[slot])
            p = p.astype(problem.dtype)

            @pl.when(t >= 2)
            def _():
                plgpu.barrier_wait(p_consumed.at[p_slot])

            p_smem.at[p_slot][...] = p_for_ds.astype(problem.dtype)
            plgpu.barrier_arrive(p_full.at[p_slot])
            plgpu.barrier_wait(do_full.at[slot])
            _product(dv_acc, p, do_smem.at[slot])
            _read(dv_acc)
            plgpu.barrier_arrive(do_consumed.at[slot])

        _walk_queries(problem, span, step, dv_acc)
        _drain(problem.G * (span[1] - span[0]), 2, p_consumed)
        _store(dv_acc, 1.0, staging.at[0], target)

    _accumulate(walk, (_ROWS, problem.Hv))


def _dk_role(problem, span, row, target, *, v_smem, q_smem, do_smem, stats_smem, p_smem, staging,
             q_full, do_full, q_consumed, do_consumed, p_full, p_consumed, **_):  # fmt: skip
    """dP^T, dS^T and dK of the same 64 keys."""
    stages = problem.config.stages
    shape = (_ROWS, problem.config.block_q_dkv)

    def walk(dk_acc):
        def step(t, i):
            slot, p_slot = lax.rem(t, stages), lax.rem(t, 2)

            def gradients(dp_acc):
                plgpu.barrier_wait(do_full.at[slot])
                _product(dp_acc, v_smem.at[0], do_smem.at[slot], rhs_transposed=True)
                plgpu.barrier_wait(q_full.at[slot])
                delta = lax.broadcast_in_dim(plgpu.load(stats_smem.at[slot, 1], layout=_COL), shape, [1])
                plgpu.barrier_wait(p_full.at[p_slot])
                p = plgpu.load(p_smem.at[p_slot], layout=_TILE)
                plgpu.barrier_arrive(p_consumed.at[p_slot])
                dp = _read(dp_acc)
                plgpu.barrier_arrive(do_consumed.at[slot])
                return p.astype(jnp.float32) * (dp - delta)

            ds = _accumulate(gradients, shape)
            _product(dk_acc, ds.astype(problem.dtype), q_smem.at[slot])
            _read(dk_acc)
            plgpu.barrier_arrive(q_consumed.at[slot])

        _walk_queries(problem, span, step, dk_acc)
        _store(dk_acc, problem.scale, staging.at[1], target)

    _accumulate(walk, (_ROWS, problem.H))
