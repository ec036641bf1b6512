"""Keys in parts, in the Hopper kernels and in the form for other backends, against the dense formula over all parts."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ring_jax.flash import kv as packed
from ring_jax.flash.hopper.backward_launch import BackwardConfig
from ring_jax.flash.hopper.config import ForwardConfig, forward_config
from ring_jax.flash.merge import merge_partials
from ring_jax.mosaic import compat
from tests.flash.calls import hopper_backward, hopper_forward, of_backend, reference_forward
from tests.support import oracle
from tests.support.hopper import on_hopper
from tests.support.marks import interpreted


@dataclasses.dataclass(frozen=True)
class Case:
    P: int = 3
    B: int = 1
    T: int = 130
    S: int = 104  # of each part
    N: int = 2
    K: int = 1
    H: int = 64
    Hv: int = 64
    mask: str = "random"
    carried: bool = False
    soft_cap: float | None = None
    dtype: str = "bfloat16"

    def __str__(self):
        names = f"p{self.P}-b{self.B}-t{self.T}-s{self.S}-h{self.H}-v{self.Hv}-{self.mask}"
        return names + "-carried" * self.carried + "-capped" * (self.soft_cap is not None)

    @property
    def options(self):
        return {"scale": self.H**-0.5, "logits_soft_cap": self.soft_cap}

    def bounds(self, rng):
        """[P, B, T] twice."""
        shape = (self.P, self.B, self.T)
        row, part = np.arange(self.T), np.arange(self.P)[:, None, None]
        if self.mask == "full":
            start, end = 0, self.S + 0 * row
        elif self.mask == "causal":  # the queries lie in the middle of the parts: full ones, an edge, empty ones
            start, end = 0, row + self.P * self.S // 2 - part * self.S
        elif self.mask == "nothing":
            start = end = self.S // 2
        else:
            start = np.sort(rng.integers(0, self.S + 1, shape), axis=-1)
            end = np.sort(rng.integers(0, self.S + 1, shape), axis=-1)
            if self.mask == "holes":  # a whole part, and some rows, see nothing
                end = np.where((part == self.P - 2) | (row < self.T // 4), start, end)
        start, end = (np.broadcast_to(np.clip(x, 0, self.S), shape) for x in (start, end))
        return jnp.asarray(start, jnp.int32), jnp.asarray(np.maximum(start, end), jnp.int32)

    def inputs(self, seed=0):
        """query, key and value [P, B, S, K, H], bounds, carry."""
        rng = np.random.default_rng(seed)

        def draw(*shape):
            return jnp.asarray(rng.standard_normal(shape), self.dtype)

        query = draw(self.B, self.T, self.N, self.H)
        key, value = (draw(self.P, self.B, self.S, self.K, size) for size in (self.H, self.Hv))
        carry = None
        if self.carried:
            lse = rng.standard_normal(query.shape[:3]) + 4
            lse[:, ::7] = -np.inf
            out = np.where(np.isneginf(lse)[..., None], 0, rng.standard_normal((*query.shape[:3], self.Hv)))
            carry = jnp.asarray(out, jnp.float32), jnp.asarray(lse, jnp.float32)
        return query, key, value, self.bounds(rng), carry


def visible(case, start, end):
    """[B, T, P S] of the keys of all parts one after the other."""
    index = np.arange(case.S)
    parts = [
        (index >= a[..., None]) & (index < b[..., None]) for a, b in zip(np.array(start), np.array(end), strict=True)
    ]
    return np.concatenate(parts, axis=-1)


def in_one(x):
    """[P, B, S, K, H] to [B, P S, K, H]."""
    return np.concatenate(list(np.asarray(x, np.float64)), axis=1)


def packed_parts(key, value):
    return jnp.stack([packed.pack(k, v) for k, v in zip(key, value, strict=True)])


def check_forward(case, forward, out_dtype=jnp.float32):
    """Against the dense formula, with twice the error of the plain form in the input's precision allowed."""
    query, key, value, (start, end), carry = case.inputs()
    kv = packed_parts(key, value)
    got, got_lse = forward(query, kv, start, end, carry, out_dtype=out_dtype, **case.options)
    assert got.dtype == out_dtype and got_lse.dtype == jnp.float32
    want = oracle.attention(
        query, in_one(key), in_one(value), visible(case, start, end), scale=case.H**-0.5, cap=case.soft_cap
    )
    same, plain = carry, jax.jit(functools.partial(reference_forward, **case.options))
    if case.mask == "full":  # in one piece: of a part with a single key the plain form rounds nothing
        whole = packed.pack(*(jnp.concatenate(list(x), axis=1) for x in (key, value)))
        same = plain(query, whole, jnp.sum(start, axis=0), jnp.sum(end, axis=0), same)
    else:
        for part in range(case.P):
            same = plain(query, kv[part], start[part], end[part], same)
    if carry is None:
        want = want["out"], want["lse"]
    else:
        want = merge_partials(*carry, *(jnp.asarray(want[name], jnp.float32) for name in ("out", "lse")))
    allowed = max(2 * oracle.relative(same[0].astype(out_dtype), want[0]), 1e-3)
    assert oracle.relative(got, want[0]) <= allowed, f"{oracle.relative(got, want[0])} exceeds {allowed}"
    seen = ~np.isneginf(want[1])
    np.testing.assert_array_equal(~np.isneginf(got_lse), seen)
    np.testing.assert_allclose(np.asarray(got_lse)[seen], np.asarray(want[1])[seen], atol=2e-3, rtol=1e-3)
    assert not np.asarray(got)[~seen].any()


def check_backward(case, backward, part_by_part=True):
    """Against the dense formula, and against the same backward part by part: no part knows of the others."""
    query, key, value, (start, end), _ = case.inputs()
    kv = packed_parts(key, value)
    rng = np.random.default_rng(9)
    dout = jnp.asarray(rng.standard_normal((*query.shape[:3], case.Hv)), case.dtype)
    dlse = rng.standard_normal(query.shape[:3])
    seen = visible(case, start, end)
    dlse = np.where(seen.any(-1)[..., None], dlse, 0)
    want = oracle.attention(
        query, in_one(key), in_one(value), seen, scale=case.H**-0.5, cap=case.soft_cap, dout=dout, dlse=dlse
    )
    delta = jnp.asarray(np.sum(np.asarray(dout, np.float64) * want["out"], -1) - dlse, jnp.float32)
    rows = jnp.asarray(want["lse"], jnp.float32), delta, dout
    dq, dkv = backward(query, kv, start, end, *rows, **case.options)
    assert dq.dtype == dkv.dtype == jnp.float32 and dq.shape == query.shape and dkv.shape == kv.shape
    dk, dv = (jnp.stack(x) for x in zip(*(packed.unpack(part, case.H) for part in dkv), strict=True))
    got = {"dq": dq, "dk": in_one(dk), "dv": in_one(dv)}
    oracle.assert_close(got, want, max(float(jnp.finfo(case.dtype).eps), 2e-6))
    if not part_by_part:
        return
    total = 0
    for part in range(case.P):
        own, dkv_own = backward(query, kv[part], start[part], end[part], *rows, **case.options)
        total = total + own
        # Not to the bit: how many programs share the query heads of a KV tile depends on how many tiles there are.
        assert oracle.relative(dkv[part], dkv_own) < 1e-6
    assert oracle.relative(dq, total) < 1e-5


def jitted(f, **options):
    parameters = inspect.signature(f).parameters
    static = [name for name in ("scale", "logits_soft_cap") if name in parameters]
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) or "out_dtype" in parameters:
        static.append("out_dtype")
    return jax.jit(functools.partial(f, **options), static_argnames=static)


# The form for backends that take keys in one piece.


@pytest.mark.parametrize(
    ("P", "Hv", "carried"),
    [(4, 12, True), *(pytest.param(P, 8, True, marks=pytest.mark.slow) for P in (1, 2, 3))],
)
def test_other_backends_go_from_part_to_part(P, Hv, carried):
    case = Case(P=P, B=2, T=21, S=13, N=4, K=2, H=8, Hv=Hv, mask="holes" if P > 1 else "random", dtype="float32")
    case = dataclasses.replace(case, carried=carried, soft_cap=2.0 if carried else None)
    forward, backward = map(jitted, of_backend("xla"))
    check_forward(case, forward)
    check_backward(case, backward, part_by_part=False)


@pytest.mark.parametrize("P", [2, 3])
def test_other_backends_keep_float32_between_parts_and_add_to_dq(P):
    case = Case(P=P, T=21, S=13, H=8, Hv=8)
    query, key, value, bounds, _ = case.inputs()
    forward, backward = (functools.partial(f, **case.options) for f in of_backend("reference"))
    kv = packed_parts(key, value)
    rounded, exact = (
        jax.jit(functools.partial(forward, out_dtype=dtype))(query, kv, *bounds) for dtype in (query.dtype, None)
    )
    assert rounded[0].dtype == query.dtype and exact[0].dtype == jnp.float32
    for ours, theirs in zip(rounded, exact, strict=True):
        np.testing.assert_array_equal(ours, theirs.astype(ours.dtype))
    before = jnp.full(query.shape, 10, jnp.float32)
    rows = exact[1], jnp.zeros_like(exact[1]), query
    (dq, _), (more, _) = jax.jit(lambda *x: (backward(*x[:-1]), backward(*x)))(query, kv, *bounds, *rows, before)
    assert np.abs(dq).max() > 0.1
    np.testing.assert_allclose(more, dq + before, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_other_backends_inside_shard_map(check_vma):
    case = Case(P=3, T=20, S=12, H=8, Hv=8, dtype="float32")
    query, key, value, (start, end), _ = case.inputs()
    forward, backward = (functools.partial(f, **case.options) for f in of_backend("xla"))
    kv = packed_parts(key, value)
    mesh = jax.make_mesh((2,), ("c",), devices=jax.devices("cpu")[:2], axis_types=(jax.sharding.AxisType.Auto,))

    def both(query, kv, start, end):
        out, lse = forward(query, kv, start, end, None)
        return out, lse, *backward(query, kv, start, end, lse, lse * 0, out)

    rows = PartitionSpec(None, "c")
    specs = dict(in_specs=(rows, PartitionSpec(), *[PartitionSpec(None, None, "c")] * 2))
    # dkv of each rank's queries, side by side.
    specs["out_specs"] = (rows, rows, rows, PartitionSpec(None, None, None, "c"))
    sharded = jax.jit(jax.shard_map(both, mesh=mesh, check_vma=check_vma, **specs))(query, kv, start, end)
    *whole, dkv = both(query, kv, start, end)
    for ours, theirs in zip(sharded, whole, strict=False):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    halves = jnp.split(sharded[3], 2, axis=3)
    np.testing.assert_allclose(halves[0] + halves[1], dkv, rtol=1e-5, atol=1e-5)


# The Hopper kernels, lowered for CUDA.

# 64 and 192 also below.
SIZES = [(128, 128), (256, 256)]
SIZES += [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((64, 64), (192, 192), (192, 128), (64, 128))]


def lowered(case, f, mesh=None, wrap=lambda f: f):
    kv = (2, case.B, case.S, case.K, case.H) if case.H == case.Hv else (case.B, case.S, case.K, case.H + case.Hv)
    rows = (case.B, case.T, case.N)
    shapes = [((*rows, case.H), case.dtype), ((case.P, *kv), case.dtype)]
    shapes += [((case.P, *rows[:2]), jnp.int32)] * 2 + [(rows, jnp.float32)] * 2 + [((*rows, case.Hv), case.dtype)]
    shapes += [((*rows, case.Hv), jnp.float32)]
    with on_hopper(axis=None) if mesh is None else jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(wrap(f)).trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def forward_of(case):
    def f(query, kv, start, end, lse, delta, dout, out):
        return hopper_forward(query, kv, start, end, (out, lse) if case.carried else None, **case.options)

    return f


def backward_of(case, deterministic):
    return lambda *x: hopper_backward(*x[:-1], **case.options, deterministic=deterministic)


@pytest.mark.parametrize(("H", "Hv"), SIZES)
def test_lowers_for_cuda(H, Hv):
    case = Case(B=2, T=300, S=515, N=4, K=2, H=H, Hv=Hv, carried=H == 128)
    assert lowered(case, forward_of(case)).count("flash_attention_forward") > 0
    assert lowered(case, backward_of(case, True)).count("flash_backward_dq") > 0


def test_fused_form_lowers_for_cuda():
    case = Case(B=2, T=300, S=512, N=4, K=2, H=128, Hv=128)
    text = lowered(case, backward_of(case, False))
    assert ("flash_backward_fused" in text) == compat.INTERPRET_AVAILABLE


def test_odd_head_sizes_lower_for_cuda():
    case = Case(P=2, T=30, S=20, H=40, Hv=56)
    lowered(case, forward_of(case))
    lowered(case, backward_of(case, True))


def test_more_parts_than_one_kernel_takes_are_a_chain():
    case = Case(P=9, T=128, S=64)
    assert lowered(case, forward_of(case)).count("stablehlo.custom_call @mosaic_gpu") == 2


def test_lowers_inside_shard_map():
    mesh = jax.make_mesh((2,), ("c",), devices=jax.devices("cpu")[:2], axis_types=(jax.sharding.AxisType.Auto,))
    rows, parts = PartitionSpec(None, "c"), PartitionSpec(None, None, "c")
    case = Case(T=256, S=104, N=2, H=192, Hv=192, carried=True)
    inside = dict(mesh=mesh, in_specs=(rows, PartitionSpec(), parts, parts, *[rows] * 4))
    wrap = functools.partial(jax.shard_map, **inside, out_specs=(rows, rows))
    lowered(case, forward_of(case), mesh.abstract_mesh, wrap)
    wrap = functools.partial(jax.shard_map, **inside, out_specs=(rows, PartitionSpec(None, None, None, "c")))
    lowered(case, backward_of(case, True), mesh.abstract_mesh, wrap)


def test_shapes_that_do_not_fit():
    case = Case()
    query, key, value, (start, end), _ = case.inputs()
    with pytest.raises(ValueError, match=r"in segments need kv \[P, 2, B, S, K, H\].*got \(2, 2, 1, 104, 1, 64\)"):
        hopper_forward(query, packed_parts(key, value)[:2], start, end, scale=1.0)


# Interpreted on the CPU.

SMALL = ForwardConfig(block_kv=64, stages=2)
IN_TURN = ForwardConfig(block_kv=32, stages=3, overlap=False, warpgroups=1, tiles_per_block=3)


@interpreted
@pytest.mark.parametrize(
    ("case", "config"),
    [
        (Case(mask="holes", B=2, T=64, N=1, carried=True), dataclasses.replace(SMALL, warpgroups=1)),
        pytest.param(Case(mask="causal", N=2, T=200), IN_TURN, marks=pytest.mark.slow),
        pytest.param(Case(mask="full", P=2, Hv=128, soft_cap=5.0), SMALL, marks=pytest.mark.slow),
        pytest.param(Case(mask="causal", P=9, T=70, N=1, S=40), IN_TURN, marks=pytest.mark.slow),
        pytest.param(Case(mask="random", P=9, T=70, N=1, S=24), SMALL, marks=pytest.mark.slow),
        pytest.param(Case(mask="nothing", P=2, T=64, N=1, carried=True), IN_TURN, marks=pytest.mark.slow),
        pytest.param(Case(mask="causal", P=1, T=64, N=1, H=40, Hv=40), IN_TURN, marks=pytest.mark.slow),
    ],
    ids=lambda x: str(x) if isinstance(x, Case) else "",
)
def test_forward_interpreted(case, config):
    with compat.interpret_mode():
        check_forward(case, jitted(hopper_forward, config=config))


SMALL_BACKWARD = BackwardConfig(block_q_dkv=64, stages=2, block_kv_dq=64, slots=3)


@interpreted
@pytest.mark.parametrize(
    ("case", "config"),
    [
        (Case(mask="holes", P=2, B=2, T=56, N=1), SMALL_BACKWARD),
        pytest.param(Case(mask="holes", T=136), SMALL_BACKWARD, marks=pytest.mark.slow),
        pytest.param(Case(mask="causal", P=2, T=136, soft_cap=5.0), SMALL_BACKWARD, marks=pytest.mark.slow),
        pytest.param(Case(mask="random", Hv=128), SMALL_BACKWARD, marks=pytest.mark.slow),
        pytest.param(Case(mask="nothing", P=2, T=64, N=1), SMALL_BACKWARD, marks=pytest.mark.slow),
    ],
    ids=lambda x: str(x) if isinstance(x, Case) else "",
)
def test_backward_interpreted(case, config):
    with compat.interpret_mode():
        backward = jitted(hopper_backward, config=config)
        check_backward(case, backward, part_by_part=case.mask == "causal")


@interpreted
@pytest.mark.slow
def test_odd_head_sizes_interpreted():
    case = Case(P=2, T=64, S=40, H=40, Hv=56)
    with compat.interpret_mode():
        check_forward(case, jitted(hopper_forward))
        check_backward(case, jitted(hopper_backward))


# On a GPU.

MASKS = ["full", "causal", "random", "holes", "nothing"]
GPU = Case(B=2, T=300, S=150, N=4, K=2)


def gpu_case(P, H, Hv=None, **changes):
    return dataclasses.replace(GPU, P=P, S=1350 // (3 * P), H=H, Hv=Hv or H, **changes)


GPU_CASES = [gpu_case(P, H, mask=mask) for P in (3, 9) for H in (64, 128, 256) for mask in MASKS]
GPU_CASES += [gpu_case(2, H, mask="random", carried=True, soft_cap=20.0, dtype="float16") for H in (64, 128, 256)]
GPU_CASES += [gpu_case(3, H, Hv, mask="holes") for H, Hv in ((192, 128), (64, 128), (128, 64), (40, 72))]
GPU_CASES += [Case(P=9, T=768, S=50, N=4, H=H, Hv=H, mask="random", carried=True) for H in (64, 128)]  # in place
GPU_CASES += [Case(P=8, B=3, T=1, S=5, N=8, K=1, H=64), Case(P=5, T=700, S=1, N=2, H=128, Hv=128, mask="full")]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_forward(case):
    check_forward(case, jitted(hopper_forward))
    check_forward(case, jitted(hopper_forward), out_dtype=jnp.dtype(case.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
@pytest.mark.parametrize("deterministic", [True, False])
def test_gpu_backward(case, deterministic):
    check_backward(case, jitted(hopper_backward, deterministic=deterministic))


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("H", [64, 128, 256])
def test_gpu_forward_configs(H, tiles, overlap):
    config = dataclasses.replace(forward_config(H, H), tiles_per_block=tiles, overlap=overlap)
    case = gpu_case(6, H, mask="random", T=1200, N=16)
    check_forward(case, jitted(hopper_forward, config=config))


@pytest.mark.gpu
@pytest.mark.parametrize("H", [64, 128, 256])
def test_gpu_natural_order_cut_in_parts(H):
    """Parts one after the other are the keys in one piece; the forward must also repeat bit by bit."""
    case = Case(P=8, T=1000, S=512, N=8, K=2, H=H, Hv=H, mask="causal")
    query, key, value, (start, end), _ = case.inputs()
    kv = packed_parts(key, value)
    forward = jax.jit(functools.partial(hopper_forward, **case.options))
    out, lse = forward(query, kv, start, end)
    for _ in range(3):
        jax.tree.map(np.testing.assert_array_equal, (out, lse), forward(query, kv, start, end))
    whole = packed.pack(*(jnp.concatenate(list(x), axis=1) for x in (key, value)))
    expected = forward(query, whole, start[0], jnp.sum(end - start, axis=0))
    # Tiles are cut elsewhere, so P is rounded after other maxima: half an ulp in each.
    assert oracle.relative(out, expected[0]) < float(jnp.finfo(jnp.bfloat16).eps) / 2
    np.testing.assert_allclose(lse, expected[1], atol=1e-4)


@pytest.mark.gpu
def test_gpu_kv_is_not_copied():
    case = Case(P=8, T=256, S=256, H=128, Hv=128, mask="full")
    query, key, value, (start, end), _ = case.inputs()
    arguments = query, packed_parts(key, value), start, end
    text = jax.jit(functools.partial(hopper_forward, **case.options)).lower(*arguments).compile().as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 1
    assert " copy(" not in text and "fusion(" not in text
