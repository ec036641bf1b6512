"""cuDNN as a block: the hand-over of delta, the cut hops of the ring with a stand-in kernel, lowering for CUDA; and on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import ring_jax
from ring_jax.flash import backends, cudnn
from ring_jax.flash.backends import select, unsupported_reason
from ring_jax.flash.kv import pack
from ring_jax.flash.operands import BlockOptions
from tests.flash.calls import flat_backward, flat_forward, reference_backward, reference_forward
from tests.support.hopper import on_hopper
from tests.support.numbers import relative

CASES = [("full", "zigzag"), ("causal", "zigzag"), ("causal", "contiguous")]


def bounds(whole, T, S):
    end = jnp.arange(1, T + 1) if whole == "causal" else jnp.full(T, S)
    return jnp.zeros((1, T), jnp.int32), jnp.broadcast_to(end.astype(jnp.int32), (1, T))


def test_delta_is_handed_over_whatever_it_is():
    rng = np.random.default_rng(0)
    dout = jnp.asarray(rng.standard_normal((2, 9, 3, 64)), jnp.bfloat16).at[0, :4].set(0)
    delta = jnp.asarray(rng.standard_normal((2, 9, 3)) * 10, jnp.float32)
    got, out = cudnn.with_row_sum(dout, delta)
    np.testing.assert_allclose(jnp.sum(got.astype(jnp.float32) * out.astype(jnp.float32), -1), delta, rtol=4e-3)
    np.testing.assert_allclose(got.astype(jnp.float32), dout.astype(jnp.float32), atol=1e-17)


def stand_in(monkeypatch):
    """The reference in place of cuDNN's two primitives, in the input's dtype; lets the rest run on a CPU."""

    def attend(query, key, value, *, scale, causal):
        rows = bounds("causal" if causal else "full", query.shape[1], key.shape[1])
        out, lse = reference_forward(query, pack(key, value), *rows, None, scale=scale)
        return out.astype(query.dtype), jnp.moveaxis(lse, 2, 1)

    def pull(query, key, value, lse, out, dout, *, scale, causal):
        rows = bounds("causal" if causal else "full", query.shape[1], key.shape[1])
        delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
        kv = pack(key, value)
        dq, dkv = reference_backward(query, kv, *rows, jnp.moveaxis(lse, 1, 2), delta, dout, scale=scale)
        return tuple(x.astype(query.dtype) for x in (dq, *dkv))

    monkeypatch.setattr(cudnn, "_attend", attend)
    monkeypatch.setattr(cudnn, "_pull", pull)
    for whole, backend in list(backends.CUDNN.items()):
        able = dataclasses.replace(backend, unsupported_reason=lambda query, kv, options: None)
        monkeypatch.setitem(backends.CUDNN, whole, able)
    monkeypatch.setitem(backends.BACKENDS, "cudnn", backends.CUDNN["full"])


def compare_ring(ranks, whole, layout, strategy, devices, length=64, heads=(4, 2), head_size=16):
    """(out, lse) and gradients, dLSE included, of implementation="cudnn" against the float32 reference."""
    mesh = jax.make_mesh((ranks,), ("context",), axis_types=(AxisType.Auto,), devices=devices[:ranks])
    cp = ring_jax.ContextParallel("context", layout=layout, mesh=mesh, strategy=strategy)
    rng = np.random.default_rng(1)
    x = [jnp.asarray(rng.standard_normal((1, length, n, head_size)), jnp.bfloat16) for n in (heads[0], *[heads[1]] * 2)]
    dout = jnp.asarray(rng.standard_normal(x[0].shape), jnp.float32)
    dlse = jnp.asarray(rng.standard_normal(x[0].shape[:3]), jnp.float32)

    def ours(*x):
        out, lse = ring_jax.ring_attention(
            *(cp.to_layout(a) for a in x), is_causal=whole == "causal", context=cp, implementation="cudnn", return_residual=True
        )  # fmt: skip
        return cp.from_layout(out, length).astype(jnp.float32), cp.from_layout(lse, length)

    def theirs(*x):
        rows = bounds(whole, length, length)
        query, key, value = (a.astype(jnp.float32) for a in x)
        return reference_forward(query, pack(key, value), *rows, None, scale=head_size**-0.5)

    @functools.partial(jax.jit, static_argnums=0)
    def everything(f, *x):
        out, transpose = jax.vjp(f, *x)
        return *out, *transpose((dout, dlse))

    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), everything(ours, *x), everything(theirs, *x), strict=True):
        assert relative(a, b) < 1.5e-2, name


@pytest.mark.parametrize(
    ("whole", "layout"), [CASES[1], *(pytest.param(*case, marks=pytest.mark.slow) for case in (CASES[0], CASES[2]))]
)
def test_hops_cut_into_whole_halves(monkeypatch, cpu_devices, whole, layout):
    stand_in(monkeypatch)
    compare_ring(3, whole, layout, "ring", cpu_devices, length=48)


def test_a_layout_that_derives_from_one_it_serves_is_another(monkeypatch, cpu_devices):
    """Or the ring would leave out the hops that see nothing in the order of the base class."""

    class Mirrored(ring_jax.Contiguous):
        def position(self, index, rank, length, ranks):
            return super().position(index, ranks - 1 - rank, length, ranks)

        def count_below(self, g, rank, length, ranks):
            return super().count_below(g, ranks - 1 - rank, length, ranks)

    stand_in(monkeypatch)
    with pytest.raises(NotImplementedError, match="a causal one needs"):
        compare_ring(2, "causal", Mirrored(), "ring", cpu_devices, length=16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whole", "layout", "strategy"), [("causal", "zigzag", "ulysses"), ("full", "striped", "all_gather")]
)
def test_strategies_with_whole_blocks(monkeypatch, cpu_devices, whole, layout, strategy):
    stand_in(monkeypatch)
    compare_ring(2, whole, layout, strategy, cpu_devices, length=32)


def test_says_when_a_mask_is_not_known_to_be_whole(monkeypatch):
    stand_in(monkeypatch)
    x = jnp.zeros((1, 8, 2, 16), jnp.bfloat16)
    kv = jnp.zeros((2, 1, 8, 2, 16), jnp.bfloat16)
    assert select("cudnn", x, kv, BlockOptions(1.0), "causal").fixed_mask == "causal"
    with pytest.raises(NotImplementedError, match="full or causal"):
        ring_jax.flash_attention(x, x, x, jnp.zeros(8, int), jnp.full(8, 5), implementation="cudnn")
    jax.eval_shape(
        lambda x: ring_jax.flash_attention(x, x, x, np.zeros(8, int), np.arange(1, 9), implementation="cudnn"), x
    )


def test_says_what_it_cannot_do():
    def reason(shape, dtype=jnp.bfloat16, cap=None):
        query, kv = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((2, *shape), dtype)
        return unsupported_reason("cudnn", query, kv, BlockOptions(1.0, cap), "full")

    with on_hopper():
        assert reason((1, 8, 2, 64)) is None
        assert "bfloat16" in reason((1, 8, 2, 64), jnp.float16)
        assert "soft cap" in reason((1, 8, 2, 64), cap=3.0)
        assert "multiples of 8" in reason((1, 8, 2, 60))
    assert "NVIDIA GPU" in reason((1, 8, 2, 64))


@pytest.mark.parametrize("whole", ["full", "causal"])
def test_lowers_for_cuda(whole):
    backend = backends.CUDNN[whole]
    forward, backward = flat_forward(backend.forward), flat_backward(backend.backward)

    def both(query, kv, start, end, lse, dout):
        out, lse_ = forward(query, kv, start, end, (jnp.zeros(query.shape), lse), scale=0.1)
        return out, backward(query, kv, start, end, lse_, lse, dout, scale=0.1)

    like = jax.ShapeDtypeStruct
    query, rows = like((2, 64, 4, 64), jnp.bfloat16), like((2, 64), jnp.int32)
    args = query, like((2, 2, 64, 2, 64), jnp.bfloat16), rows, rows, like((2, 64, 4), jnp.float32), query
    text = jax.jit(both).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("whole", ["full", "causal"])
def test_gpu(whole, head_size):
    compare_ring(1, whole, "contiguous", "ring", jax.devices(), length=520, heads=(8, 2), head_size=head_size)


@pytest.mark.multi_gpu
@pytest.mark.parametrize(("whole", "layout"), CASES)
def test_gpu_hops_cut_into_whole_halves(whole, layout):
    compare_ring(2, whole, layout, "ring", jax.devices(), length=1024, heads=(8, 2), head_size=128)
