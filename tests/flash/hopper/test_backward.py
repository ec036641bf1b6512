"""The Hopper backward kernels: lowering for CUDA on any machine, interpret mode on jax 0.11+, the matrix on a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ring_jax.flash.hopper import backward_launch as hopper
from ring_jax.flash.hopper.backward_common import Problem, default_config, span_of
from ring_jax.flash.kv import pack, unpack
from ring_jax.flash.operands import BlockOptions
from ring_jax.mosaic import compat
from tests.flash.calls import hopper_backward
from tests.support.hopper import on_hopper
from tests.support.marks import interpreted
from tests.support.numbers import relative

Config = hopper.BackwardConfig


@dataclasses.dataclass(frozen=True)
class Case:
    B: int = 1
    T: int = 128
    S: int = 128
    N: int = 1
    K: int = 1
    H: int = 64
    Hv: int = 64
    mask: str = "causal"
    dtype: str = "bfloat16"
    soft_cap: float | None = None
    blocks: int = 1
    config: Config | None = None

    def __str__(self):
        return f"h{self.H}-v{self.Hv}-{self.mask}-{self.dtype}-t{self.T}-s{self.S}-blocks{self.blocks}"

    def bounds(self, rng):
        t = np.arange(self.T)
        if self.mask == "full":
            start, end = 0 * t, 0 * t + self.S
        elif self.mask == "causal":
            start, end = 0 * t, t + 1
        elif self.mask == "window":
            start, end = t - 70, t + 1
        elif self.mask == "documents":
            start = t // 90 * 90
            end = start + 90
        elif self.mask == "empty":
            # The first half of the rows sees nothing, the rest a growing prefix.
            start, end = 0 * t, t - self.T // 2
        elif self.mask == "nothing":
            start, end = 0 * t, 0 * t
        else:
            starts, ends = np.sort(rng.integers(0, self.S + 1, (2, self.T)), axis=1)
            start, end = np.minimum(starts, ends), ends
        return tuple(
            jnp.broadcast_to(jnp.asarray(np.clip(x, 0, self.S), jnp.int32), (self.B, self.T)) for x in (start, end)
        )

    def inputs(self, seed):
        rng = np.random.default_rng(seed)

        def normal(*shape):
            return jnp.asarray(rng.normal(size=shape), self.dtype)

        query, dout = normal(self.B, self.T, self.N, self.H), normal(self.B, self.T, self.N, self.Hv)
        key, value = normal(self.B, self.S, self.K, self.H), normal(self.B, self.S, self.K, self.Hv)
        return query, key, value, dout, jnp.asarray(rng.normal(size=query.shape[:3]), jnp.float32), *self.bounds(rng)


def gradients(case, query, key, value, dout, dlse, start, end, round_):
    """(dq, dk, dv, lse, delta) of the materialised formula in float64; `round_` rounds what a kernel keeps in 16 bits."""
    G = case.N // case.K
    key, value = (np.repeat(x, G, axis=2) for x in (key, value))
    index = np.arange(case.S)
    visible = ((index >= start[..., None]) & (index < end[..., None]))[:, None]
    s = round_(np.einsum("btnh,bsnh->bnts", query, key, optimize=True) * case.H**-0.5)
    cap = case.soft_cap
    s = s if cap is None else cap * np.tanh(s / cap)
    seen = visible.any(axis=-1)
    top = np.where(visible, s, -1e30).max(axis=-1)
    with np.errstate(divide="ignore"):
        lse = np.log(np.where(visible, np.exp(np.minimum(s - top[..., None], 0)), 0).sum(axis=-1)) + top
    lse = np.where(seen, lse, -np.inf)
    p = np.where(visible, np.exp(np.minimum(s - np.where(seen, lse, 0)[..., None], 0)), 0)
    delta = np.einsum("bnts,bsnh,btnh->btn", p, value, dout, optimize=True) - dlse
    p = round_(p)
    ds = p * (round_(np.einsum("btnh,bsnh->bnts", dout, value, optimize=True)) - np.moveaxis(delta, 2, 1)[..., None])
    ds = round_(ds if cap is None else ds * (1 - (s / cap) ** 2))
    dq = np.einsum("bnts,bsnh->btnh", ds, key, optimize=True) * case.H**-0.5
    dk = np.einsum("bnts,btnh->bsnh", ds, query, optimize=True) * case.H**-0.5
    dv = np.einsum("bnts,btnh->bsnh", p, dout, optimize=True)
    dk, dv = (x.reshape(*x.shape[:2], case.K, G, -1).sum(axis=3) for x in (dk, dv))
    return dq, dk, dv, np.moveaxis(lse, 1, 2), delta


def run(case, seed, backward):
    """Our gradients, those of the formula with operands rounded to the input dtype, and the exact ones.

    With several blocks, each is called with its own keys and the final LSE of all.
    """
    query, key, value, dout, dlse, start, end = case.inputs(seed)
    wide = [np.asarray(x, np.float64) for x in (query, key, value, dout, dlse)]
    bounds = [np.asarray(x) for x in (start, end)]
    *expected, lse, delta = gradients(case, *wide, *bounds, lambda x: x)
    *rounded, _, _ = gradients(case, *wide, *bounds, lambda x: x.astype(query.dtype).astype(np.float64))
    lse, delta = jnp.asarray(lse, jnp.float32), jnp.asarray(delta, jnp.float32)
    size = case.S // case.blocks
    dq, parts = None, []
    for low in range(0, case.S, size):
        block = slice(low, low + size)
        inside = [jnp.clip(x - low, 0, size) for x in (start, end)]
        kv = pack(key[:, block], value[:, block])
        options = dict(scale=case.H**-0.5, logits_soft_cap=case.soft_cap)
        dq, dkv = backward(query, kv, *inside, lse, delta, dout, dq, **options)
        parts.append(dkv)
    dkv = jnp.concatenate(parts, axis=-3)
    assert dq.dtype == dkv.dtype == jnp.float32
    return (dq, *unpack(dkv, case.H)), rounded, expected


def check(case, seed=0, backward=None):
    if backward is None:

        def backward(*x, **options):
            return jax.jit(lambda *x: hopper_backward(*x, **options, config=case.config))(*x)

    got, same, expected = run(case, seed, backward)
    for name, ours, theirs, exact in zip(("dq", "dk", "dv"), got, same, expected, strict=True):
        assert ours.shape == exact.shape
        # At least an ulp: a single row or key can be exact by luck.
        error, allowed = relative(ours, exact), max(2 * relative(theirs, exact), float(jnp.finfo(case.dtype).eps))
        assert error <= allowed, f"{case}: {name} error {error:.2e}, allowed {allowed:.2e}"
    return got


FUSED = Config(fused=True)
CONFIGS = [(64, 64), (128, 128), (256, 256), (192, 128), (64, 128)]


@pytest.mark.parametrize("H,Hv", CONFIGS)
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_lowers_for_cuda(H, Hv, dtype):
    case = Case(B=2, T=300, S=515, N=4, K=2, H=H, Hv=Hv, dtype=dtype, soft_cap=30.0 if H == 64 else None)
    assert "mosaic_gpu" in lower(case, lambda *x: hopper_backward(*x, scale=0.1, logits_soft_cap=case.soft_cap))


@pytest.mark.parametrize(("H", "queries", "fits"), [(64, 64, True), (128, 64, True), (64, 128, True), (64, 32, False)])
def test_fused_form_lowers_for_cuda(H, queries, fits):
    case = Case(B=2, T=300, S=515, N=4, K=2, H=H, Hv=H)
    config = dataclasses.replace(FUSED, block_q_dkv=queries)
    text = lower(case, lambda *x: hopper_backward(*x, scale=0.1, deterministic=False, config=config))
    # Refs as kernel arguments need jax 0.11; before that, and where the tiles do not fit, the two kernels stand in.
    assert ("flash_backward_fused" in text) == (fits and compat.INTERPRET_AVAILABLE)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(("H", "N"), [(64, 4), (128, 4), (128, 2)])
def test_lowers_inside_shard_map(check_vma, H, N):
    def wrapped(mesh, *x):
        spec = PartitionSpec("context")
        return jax.shard_map(
            lambda *x: hopper_backward(*x, x[0].astype(jnp.float32), scale=0.1),
            mesh=mesh,
            in_specs=(spec, PartitionSpec(None, "context"), *[spec] * 5),
            out_specs=(spec, PartitionSpec(None, "context")),
            check_vma=check_vma,
        )(*x)

    text = lower(Case(B=2, T=256, S=256, N=N, K=2, H=H, Hv=H), wrapped, mesh_axis="context")
    # dq is added to in its own buffer, by the form that is the default at this head size; so is dkv, where two programs
    # share a tile.
    assert text.count("output_operand_alias<") == (N // 2 if compat.INTERPRET_AVAILABLE else 0)
    assert ("flash_backward_fused" in text) == (H == 128 and compat.INTERPRET_AVAILABLE)


def lower(case, f, mesh_axis=None):
    """The module for an H200, lowered without one."""
    rows = (case.B, case.T)
    kv = (2, case.B, case.S, case.K, case.H) if case.H == case.Hv else (case.B, case.S, case.K, case.H + case.Hv)
    shapes = [
        ((*rows, case.N, case.H), case.dtype),
        (kv, case.dtype),
        (rows, jnp.int32),
        (rows, jnp.int32),
        ((*rows, case.N), jnp.float32),
        ((*rows, case.N), jnp.float32),
        ((*rows, case.N, case.Hv), case.dtype),
    ]
    shapes = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    with on_hopper(2, mesh_axis):
        mesh = jax.sharding.get_abstract_mesh()
        traced = jax.jit(lambda *x: f(mesh, *x) if mesh_axis else f(*x)).trace(*shapes)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("H", [64, 256])
@pytest.mark.parametrize("mask", ["full", "causal", "window", "documents", "empty", "random"])
def test_tiles_that_are_visited_and_tiles_that_go_unmasked(H, mask):
    case = Case(T=472, S=376, mask=mask, H=H, Hv=H)
    config = default_config(H, H)
    problem = Problem(1, case.T, case.S, 1, 1, H, H, False, jnp.dtype(case.dtype), BlockOptions(1.0), config)
    start, end = case.bounds(np.random.default_rng(0))
    keys = np.arange(case.S)
    visible = (keys >= np.asarray(start)[0, :, None]) & (keys < np.asarray(end)[0, :, None])

    def tile(i, j, rows, columns):
        return visible[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns], (j + 1) * columns <= case.S

    def check_span(span, tiles):
        first, last, u, v = (int(x) for x in span)
        for n, (seen, whole) in enumerate(tiles):
            assert first <= n < last or not seen.any()
            assert not u <= n < v or (seen.all() and whole)
        needed = [n for n, (seen, _) in enumerate(tiles) if seen.any()]
        if mask in ("full", "causal", "documents"):  # others have rows that see nothing, whose tiles may be visited
            assert (first, last) == (needed[0], needed[-1] + 1) if needed else last <= first

    q_rows, kv_rows = config.block_q_dkv, 64 if H == 256 else 128
    q_tiles, kv_tiles = -(-case.T // q_rows), -(-case.S // config.block_kv_dq)
    dq_rows = 64 * config.warpgroups_dq
    for i, span in enumerate(np.asarray(hopper._dq_table(problem, start, end))[0]):
        check_span(span, [tile(i, j, dq_rows, config.block_kv_dq) for j in range(kv_tiles)])
    table = np.asarray(hopper._dkv_table(problem, start, end))
    for j in range(table.shape[1]):
        check_span(span_of(table, 0, j), [tile(i, j, q_rows, kv_rows) for i in range(q_tiles)])


SMALL = Config(block_q_dkv=64, stages=2, block_kv_dq=64, slots=2)
PIPELINED = Config(
    block_q_dkv=64, stages=3, block_kv_dq=48, slots=5, warpgroups_dq=3, pipeline_dkv=True, mask_first=True
)


@interpreted
@pytest.mark.parametrize(
    "case",
    [
        Case(T=136, S=256, N=2, mask="random", soft_cap=5.0, blocks=2, config=SMALL),
        pytest.param(Case(T=200, S=136, mask="empty", dtype="float16", config=SMALL), marks=pytest.mark.slow),
        Case(T=200, S=136, N=2, mask="causal", config=PIPELINED),
        Case(T=70, S=128, H=256, Hv=256, mask="window", config=SMALL),
    ],
    ids=str,
)
def test_interpreted(case):
    with compat.interpret_mode():
        check(case)


GPU_CASES = [
    Case(B=2, T=300, S=300, N=4, K=2, H=H, Hv=H, mask=mask, dtype=dtype)
    for H in (64, 128, 256)
    for mask in ("full", "causal", "window", "documents", "empty", "random")
    for dtype in ("bfloat16", "float16")
]
GPU_CASES += [
    Case(T=T, S=S, N=8, K=1, H=H, Hv=H, mask="random", blocks=blocks)
    for H in (64, 128, 256)
    for T, S, blocks in ((1, 1, 1), (1, 700, 1), (700, 1, 1), (129, 383, 1), (1000, 1030, 2), (640, 640, 2))
]
GPU_CASES += [Case(T=500, S=500, N=2, K=1, H=H, Hv=H, mask="causal", soft_cap=20.0) for H in (64, 128, 256)]
GPU_CASES += [Case(T=500, S=400, N=2, K=1, H=H, Hv=Hv, mask="causal") for H, Hv in ((192, 128), (64, 128), (128, 64))]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_matches_the_formula(case):
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in GPU_CASES if case.H == case.Hv < 256], ids=str)
def test_fused_form_matches_the_formula(case):
    config = default_config(case.H, case.Hv, deterministic=False)
    assert config.fused
    check_fused(case, config)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in GPU_CASES if case.H == case.Hv == 64], ids=str)
def test_fused_form_with_128_queries_matches_the_formula(case):
    check_fused(case, dataclasses.replace(FUSED, block_q_dkv=128))


def check_fused(case, config):
    check(case, backward=lambda *x, **options: hopper_backward(*x, **options, deterministic=False, config=config))


@pytest.mark.gpu
@pytest.mark.parametrize("H", [64, 128, 256])
def test_repeats_bitwise(H):
    case = Case(T=1111, S=1111, N=8, K=2, H=H, Hv=H)

    def backward(*x, **options):
        return jax.jit(lambda *x: hopper_backward(*x, **options, deterministic=True))(*x)

    first, *others = (check(case, backward=backward) for _ in range(4))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


@pytest.mark.gpu
def test_rows_that_see_nothing_get_zeros():
    case = Case(T=300, S=300, N=2, mask="nothing")
    query, key, value, dout, dlse, start, end = case.inputs(0)
    lse = jnp.full(query.shape[:3], -jnp.inf)
    for x in hopper_backward(query, pack(key, value), start, end, lse, dlse, dout, scale=1.0):
        assert not np.asarray(x).any()


@interpreted  # before jax 0.11 no kernel adds to a buffer
@pytest.mark.parametrize(
    ("heads", "kv_heads", "keys", "fused", "split"),
    [
        (32, 8, 8192, True, 1),
        (32, 8, 2048, True, 4),
        (32, 8, 2048, False, 2),
        (8, 8, 2048, True, 1),
        (36, 6, 2048, True, 6),
    ],
)
def test_short_shards_split_the_query_heads_of_a_program(heads, kv_heads, keys, fused, split):
    config = default_config(128, 128)
    problem = Problem(1, keys, keys, heads, kv_heads, 128, 128, False, jnp.dtype("bfloat16"), BlockOptions(1.0), config)
    assert hopper._split(problem, fused) == split


def test_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="shared memory"):
        Config(block_q_dkv=128, stages=4).check(256, 256)
