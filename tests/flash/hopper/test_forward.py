"""The Hopper forward kernel: lowered for CUDA and interpreted on the CPU, compared with the oracle on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ring_jax
from ring_jax.flash import kv as packed
from ring_jax.flash.hopper import support
from ring_jax.flash.hopper.config import SHARED_MEMORY_BYTES, ForwardConfig, forward_config
from ring_jax.flash.hopper.schedule import Problem
from ring_jax.flash.operands import BlockOptions
from ring_jax.mosaic import compat, in_place
from tests.flash.calls import hopper_forward, reference_forward
from tests.support.hopper import on_hopper
from tests.support.marks import interpreted


def bounds(kind: str, batch: int, length: int, kv_length: int, rng) -> tuple[jax.Array, jax.Array]:
    row = np.arange(length)
    if kind == "full":
        start, end = np.zeros(length), np.full(length, kv_length)
    elif kind == "causal":
        start, end = np.zeros(length), row + 1 + kv_length - length
    elif kind == "window":
        start, end = row - length // 5, row + length // 7
    elif kind == "documents":
        size = max(1, length // 3)
        start, end = row // size * size, row + 1
    elif kind == "documents-full":
        size = max(1, length // 3)
        start, end = row // size * size, (row // size + 1) * size
    elif kind == "empty":
        start = end = np.full(length, kv_length // 2)
    elif kind == "late":  # a causal hop whose first rows see nothing
        start, end = np.zeros(length), row - length // 2
    else:
        start = np.sort(rng.integers(0, kv_length + 1, (batch, length)), axis=1)
        end = np.maximum(start, np.sort(rng.integers(0, kv_length + 1, (batch, length)), axis=1))
    start, end = (np.broadcast_to(np.clip(x, 0, kv_length), (batch, length)) for x in (start, end))
    return jnp.asarray(start, jnp.int32), jnp.asarray(np.maximum(start, end), jnp.int32)


def inputs(seed, batch, length, kv_length, heads, kv_heads, head_size, dtype, value_size=None):
    rng = np.random.default_rng(seed)
    value_size = value_size or head_size

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    query = draw(batch, length, heads, head_size)
    key, value = draw(batch, kv_length, kv_heads, head_size), draw(batch, kv_length, kv_heads, value_size)
    return query, packed.pack(key, value), rng


def random_carry(rng, batch, length, heads, value_size):
    lse = rng.standard_normal((batch, length, heads)) + 4
    lse[:, ::7] = -np.inf
    out = np.where(np.isneginf(lse)[..., None], 0, rng.standard_normal((batch, length, heads, value_size)))
    return jnp.asarray(out, jnp.float32), jnp.asarray(lse, jnp.float32)


def error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-6))


def compare(query, kv, start, end, carry, *, config=None, out_dtype=jnp.float32, **options) -> None:
    """Against the float32 oracle, with twice the error of the same formula in the input's precision allowed."""
    options.setdefault("scale", query.shape[-1] ** -0.5)
    got, got_lse = hopper_forward(query, kv, start, end, carry, config=config, out_dtype=out_dtype, **options)
    assert got.dtype == out_dtype and got_lse.dtype == jnp.float32
    exact = functools.partial(reference_forward, query.astype(jnp.float32), kv.astype(jnp.float32), start, end, carry)
    want, want_lse = exact(**options)
    same, _ = reference_forward(query, kv, start, end, carry, **options)
    allowed = max(2 * error(same.astype(out_dtype), want), 1e-3)
    assert error(got, want) <= allowed
    np.testing.assert_array_equal(np.isneginf(got_lse), np.isneginf(want_lse))
    seen = ~np.isneginf(np.asarray(want_lse))
    np.testing.assert_allclose(np.asarray(got_lse)[seen], np.asarray(want_lse)[seen], atol=2e-3, rtol=1e-3)
    assert not np.asarray(got)[~seen].any()


# Lowering for CUDA, on the CPU.


def lower(shape, dtype=jnp.bfloat16, *, value_size=None, carry=False, wrap=lambda f: f, **options):
    batch, length, kv_length, heads, kv_heads, head_size = shape
    kv_shape = (2, batch, kv_length, kv_heads, head_size)
    if value_size is not None:
        kv_shape = (batch, kv_length, kv_heads, head_size + value_size)
    rows = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    arguments = [jax.ShapeDtypeStruct((batch, length, heads, head_size), dtype), jax.ShapeDtypeStruct(kv_shape, dtype)]
    arguments += [rows, rows]
    if carry:
        out = jax.ShapeDtypeStruct((batch, length, heads, value_size or head_size), jnp.float32)
        arguments.append((out, jax.ShapeDtypeStruct(out.shape[:3], jnp.float32)))
    call = jax.jit(wrap(functools.partial(hopper_forward, scale=0.1, **options)))
    with on_hopper(axis=None):
        return call.trace(*arguments).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("head_size", [64, 128, 192, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_lowers_every_config(head_size, dtype):
    text = lower((1, 512, 512, 4, 2, head_size), dtype, carry=head_size == 128, out_dtype=dtype).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 1001, 777, 6, 3, 96), {"carry": True, "logits_soft_cap": 30.0}),
        ((1, 3, 5, 2, 2, 64), {}),
        ((1, 256, 256, 4, 1, 192), {"value_size": 128}),
        ((1, 256, 256, 4, 1, 128), {"config": ForwardConfig(block_kv=176, stages=2, lazy_rescale=True)}),
        ((1, 256, 256, 4, 1, 128), {"config": ForwardConfig(block_kv=64, stages=3, overlap=False, tiles_per_block=3)}),
        ((1, 256, 256, 4, 1, 64), {"config": ForwardConfig(block_kv=64, stages=3)}),
    ],
    ids=["odd", "tiny", "value-size", "lazy", "in-turn", "unrolled"],
)
def test_lowers_other_shapes_and_options(shape, options):
    lower(shape, **options)


@pytest.mark.parametrize("check_vma", [True, False])
def test_lowers_inside_shard_map(check_vma):
    mesh = jax.make_mesh((2,), ("c",), devices=jax.devices("cpu")[:2], axis_types=(jax.sharding.AxisType.Auto,))
    spec = P(None, "c")
    wrap = functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(spec, P(None, None, "c"), spec, P(), (spec, spec)),
        out_specs=(spec, spec),
        check_vma=check_vma,
    )
    query = jax.ShapeDtypeStruct((1, 256, 4, 128), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((2, 1, 256, 2, 128), jnp.bfloat16)
    carry = (jax.ShapeDtypeStruct((1, 256, 4, 128), jnp.float32), jax.ShapeDtypeStruct((1, 256, 4), jnp.float32))
    rows, local_rows = (jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (256, 128))
    call = jax.jit(wrap(functools.partial(hopper_forward, scale=0.1)))
    text = call.trace(query, kv, rows, local_rows, carry).lower(lowering_platforms=("cuda",)).as_text()
    # out and lse are resumed in the carry's own buffers, wherever Refs are to be had.
    assert text.count("output_operand_alias<") == (2 if in_place.AVAILABLE else 0)


# Configs and refusals.


@pytest.mark.parametrize("head_size", [64, 128, 192, 256])
def test_config_fits_shared_memory(head_size):
    config = forward_config(head_size, head_size)
    assert config.shared_memory_bytes(head_size, head_size) <= SHARED_MEMORY_BYTES


@pytest.mark.parametrize(
    "change", [{"block_kv": 40}, {"block_kv": 272}, {"stages": 1}, {"warpgroups": 4}, {"tiles_per_block": 0}]
)
def test_config_refuses(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(forward_config(128, 128), **change)


def test_tiles_of_a_block():
    """As many as cost no round of the multiprocessors more; one of what may run beside transfers."""
    whole = Problem(
        batch=1,
        query_len=8192,
        heads=32,
        kv_heads=8,
        head_size=128,
        value_size=128,
        packed=True,
        carry=False,
        in_place=False,
        rounded=True,
        options=BlockOptions(1.0),
        heads_per_section=32,
        config=ForwardConfig(block_kv=128, stages=2),
    )
    assert (whole.tiles_per_block, whole.blocks) == (4, 512)
    assert dataclasses.replace(whole, query_len=32768).tiles_per_block == 3  # 63 rounds, with four 64
    assert dataclasses.replace(whole, query_len=128).tiles_per_block == 1
    for part in ({"carry": True}, {"segments": 2}, {"rounded": False}, {"head_size": 256, "value_size": 256}):
        assert dataclasses.replace(whole, **part).tiles_per_block == 1
    asked = dataclasses.replace(whole, carry=True, config=dataclasses.replace(whole.config, tiles_per_block=5))
    assert (asked.tiles_per_block, asked.blocks) == (5, 410)


def test_unsupported_reasons():
    def reason(query_shape, kv_shape, dtype=jnp.bfloat16, scale=1.0):
        query, kv = (jax.ShapeDtypeStruct(shape, dtype) for shape in (query_shape, kv_shape))
        return support.operand_reason(query, kv, BlockOptions(scale))

    shapes = (1, 8, 4, 64), (2, 1, 8, 2, 64)
    assert reason(*shapes) is None
    assert "bfloat16" in reason(*shapes, dtype=jnp.float32)
    assert "head sizes" in reason((1, 8, 4, 320), (2, 1, 8, 2, 320))
    assert "multiple" in reason((1, 8, 3, 64), (2, 1, 8, 2, 64))
    assert "scale" in reason(*shapes, scale=-1.0)
    query, kv = (jnp.zeros(shape, jnp.bfloat16) for shape in shapes)
    rows = jnp.zeros((1, 8), jnp.int32)
    with pytest.raises(ValueError, match="out_dtype must be float32 or bfloat16, got float16"):
        hopper_forward(query, kv, rows, rows, scale=1.0, out_dtype=jnp.float16)


# Interpreted on the CPU: barriers, slots, order of the tiles, edges, carries.

SMALL = ForwardConfig(block_kv=64, stages=2, tiles_per_block=2)


@interpreted
@pytest.mark.parametrize(
    ("kind", "carried", "config"),
    [
        ("random", True, SMALL),
        ("causal", False, dataclasses.replace(SMALL, overlap=False, warpgroups=1, tiles_per_block=1)),
        ("window", False, dataclasses.replace(SMALL, stages=3, lazy_rescale=True, ping_pong=False)),
        ("late", True, dataclasses.replace(SMALL, block_kv=16, tiles_per_block=None)),
        ("full", False, dataclasses.replace(SMALL, block_kv=16, stages=3)),
        pytest.param("late", True, dataclasses.replace(SMALL, overlap=False, block_kv=80), marks=pytest.mark.slow),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_interpreted(kind, carried, config):
    # Two batches or two heads, to see the order of the work; lengths that no tile divides.
    batch, heads = (2, 1) if kind == "random" else (1, 2)
    query, kv, rng = inputs(1, batch, 130, 141, heads, 1, 64, jnp.bfloat16)
    carry = random_carry(rng, batch, 130, heads, 64) if carried else None
    with compat.interpret_mode():
        compare(query, kv, *bounds(kind, batch, 130, 141, rng), carry, config=config)


@interpreted
@pytest.mark.parametrize("tiles", [1, 3])
def test_interpreted_rounded_out(tiles):
    """By way of shared memory: its own, or the query tile's."""
    query, kv, rng = inputs(8, 1, 260, 100, 2, 1, 64, jnp.bfloat16)
    config = dataclasses.replace(SMALL, tiles_per_block=tiles)
    with compat.interpret_mode():
        compare(query, kv, *bounds("late", 1, 260, 100, rng), None, config=config, out_dtype=jnp.bfloat16)


@interpreted
def test_interpreted_in_place():
    """Whole query tiles, some of them empty: the carry's buffers are updated, and the caller's arrays are not."""
    query, kv, rng = inputs(5, 1, 256, 64, 1, 1, 64, jnp.bfloat16)
    carry = random_carry(rng, 1, 256, 1, 64)
    before = jax.tree.map(np.array, carry)
    with compat.interpret_mode():
        compare(query, kv, *bounds("late", 1, 256, 64, rng), carry, config=SMALL)
    jax.tree.map(np.testing.assert_array_equal, carry, before)


@interpreted
@pytest.mark.parametrize("staged", [True, False])
def test_interpreted_nan_in_a_carry_stays(staged, monkeypatch):
    if not staged:
        monkeypatch.setattr(Problem, "stages_carry", False)
    query, kv, rng = inputs(6, 1, 128, 64, 1, 1, 64, jnp.bfloat16)
    out, lse = random_carry(rng, 1, 128, 1, 64)
    carry = out.at[:, 5].set(jnp.nan), lse.at[:, 5].set(jnp.nan)
    with compat.interpret_mode():
        out, lse = hopper_forward(query, kv, *bounds("full", 1, 128, 64, rng), carry, scale=0.1, config=SMALL)
    assert np.isnan(out[:, 5]).all() and np.isnan(lse[:, 5]).all()
    assert np.isfinite(np.delete(out, 5, axis=1)).all() and np.isfinite(np.delete(lse, 5, axis=1)).all()


@interpreted
def test_interpreted_padding_and_soft_cap():
    query, kv, rng = inputs(2, 1, 1, 70, 1, 1, 40, jnp.float16, value_size=56)
    with compat.interpret_mode():
        compare(query, kv, *bounds("full", 1, 1, 70, rng), None, config=SMALL, logits_soft_cap=3.0)


@interpreted
@pytest.mark.parametrize("carried", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_interpreted_empty(carried):
    query, kv, rng = inputs(3, 1, 128, 64, 1, 1, 64, jnp.bfloat16)
    carry = random_carry(rng, 1, 128, 1, 64) if carried else None
    with compat.interpret_mode():
        out, lse = hopper_forward(query, kv, *bounds("empty", 1, 128, 64, rng), carry, scale=1.0, config=SMALL)
    want_out, want_lse = carry or (np.zeros_like(out), np.full_like(lse, -np.inf))
    np.testing.assert_array_equal(out, want_out)
    np.testing.assert_array_equal(lse, want_lse)


# On a GPU.

KINDS = ["full", "causal", "window", "documents", "documents-full", "late", "empty", "random"]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_gpu(head_size, kind, dtype):
    length, kv_length = (1000, 1000) if kind.startswith("doc") else (777, 1111)
    query, kv, rng = inputs(4, 2, length, kv_length, 8, 2, head_size, dtype)
    compare(query, kv, *bounds(kind, 2, length, kv_length, rng), None, out_dtype=dtype)
    compare(query, kv, *bounds(kind, 2, length, kv_length, rng), random_carry(rng, 2, length, 8, head_size))


@pytest.mark.gpu
@pytest.mark.parametrize("lazy_rescale", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_gpu_configs(head_size, tiles, overlap, lazy_rescale):
    config = forward_config(head_size, head_size)
    config = dataclasses.replace(config, tiles_per_block=tiles, overlap=overlap, lazy_rescale=lazy_rescale)
    query, kv, rng = inputs(5, 1, 2000, 2000, 8, 2, head_size, jnp.bfloat16)
    # Large logits, so that the running maximum moves late and far.
    compare(4 * query, kv, *bounds("random", 1, 2000, 2000, rng), None, config=config)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["random", "full"])
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_gpu_rounded_out(head_size, kind):
    query, kv, rng = inputs(5, 1, 2000, 2000, 8, 2, head_size, jnp.bfloat16)
    rows = bounds(kind, 1, 2000, 2000, rng)
    for tiles in (1, 3, 4):  # the last block of three has fewer
        config = dataclasses.replace(forward_config(head_size, head_size), tiles_per_block=tiles)
        compare(query, kv, *rows, None, config=config, out_dtype=jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "value_size", "cap"),
    [
        ((1, 1, 5, 4, 4, 128), None, None),
        ((3, 63, 1, 4, 1, 64), None, None),
        ((1, 129, 4097, 16, 2, 80), None, 20.0),
        ((2, 500, 300, 4, 2, 192), 128, None),
        ((2, 321, 654, 4, 4, 40), 200, 5.0),
    ],
)
def test_gpu_odd_shapes(shape, value_size, cap):
    query, kv, rng = inputs(6, *shape, jnp.bfloat16, value_size)
    compare(query, kv, *bounds("random", *shape[:3], rng), None, logits_soft_cap=cap)


@pytest.mark.gpu
@pytest.mark.parametrize("hops", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_gpu_carry_chain_is_as_exact_as_one_call(hops, head_size):
    length, size = 768, 768 // 8  # whole query tiles at every head size: resumed in place
    query, kv, _ = inputs(7, 1, length, size * hops, 8, 2, head_size, jnp.bfloat16)
    position = jnp.arange(length, dtype=jnp.int32)[None] * hops // 8
    carry = None
    for hop in range(hops):
        end = jnp.clip(position + 1 - hop * size, 0, size)
        block = kv[:, :, hop * size : (hop + 1) * size]
        carry = hopper_forward(query, block, jnp.zeros_like(end), end, carry, scale=0.1)
    whole = hopper_forward(query, kv, jnp.zeros_like(position), position + 1, scale=0.1)
    # Tiles are cut elsewhere, so P is rounded after other maxima: half an ulp in each.
    assert error(carry[0], whole[0]) < float(jnp.finfo(jnp.bfloat16).eps) / 2
    np.testing.assert_allclose(carry[1], whole[1], atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_gpu_gradient_through_a_carry(head_size):
    """The carry is saved for the backward and updated in place: XLA must copy it first."""
    query, kv, rng = inputs(9, 1, 768, 500, 4, 2, head_size, jnp.bfloat16)
    carry = random_carry(rng, 1, 768, 4, head_size)
    rows = bounds("late", 1, 768, 500, rng)

    def gradients(implementation, query, kv, carry):
        def loss(query, kv, carry):
            out, lse = ring_jax.flash_attention(query, *kv, *rows, carry=carry, implementation=implementation)
            return jnp.sum(out**2) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0) ** 2)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, kv, carry)

    got = gradients("mosaic", query, kv, carry)
    want = gradients("reference", query.astype(jnp.float32), kv.astype(jnp.float32), carry)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert error(ours, theirs) < 1e-2


@pytest.mark.gpu
def test_gpu_repeats_bit_by_bit():
    query, kv, rng = inputs(8, 2, 3001, 3001, 8, 2, 128, jnp.bfloat16)
    rows = bounds("causal", 2, 3001, 3001, rng)
    first, *others = (jax.jit(functools.partial(hopper_forward, scale=0.1))(query, kv, *rows) for _ in range(4))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


@pytest.mark.gpu
def test_gpu_scan_over_layers_runs_the_kernel_once_a_layer():
    """XLA used to clone the forward kernel into the write of its residual: twice the work in training."""
    x, kv = jnp.ones((1, 256, 2, 64), jnp.bfloat16), jnp.ones((3, 1, 256, 2, 64), jnp.bfloat16)
    rows = np.zeros((1, 256), np.int32), np.full((1, 256), 256, np.int32)

    def loss(query, keys):
        def layer(query, key):
            out, _ = ring_jax.flash_attention(query, key, key, *rows, implementation="mosaic")
            return out.astype(query.dtype), None

        return jnp.sum(jax.lax.scan(layer, query, keys)[0].astype(jnp.float32) ** 2)

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, kv).compile().as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 3  # forward, dq, dkv
