"""The Hopper kernels on a share of the heads at a time: the same as on all of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from ring_jax.flash import kv as packed
from ring_jax.flash.hopper import support
from ring_jax.mosaic import compat
from tests.flash.calls import hopper_backward, hopper_forward
from tests.flash.hopper.test_parts import (
    SMALL,
    SMALL_BACKWARD,
    Case,
    check_backward,
    check_forward,
    jitted,
    lowered,
    packed_parts,
)
from tests.support.marks import interpreted, needs_in_place


def forward_by_heads(forward, **fixed):
    """The halves of the heads one after the other, into the same arrays."""

    def both(query, kv, start, end, carry, *, out_dtype, scale, logits_soft_cap):
        result, options = None, {"scale": scale, "logits_soft_cap": logits_soft_cap, "out_dtype": out_dtype} | fixed
        for heads, share in packed.halve_heads(kv):
            result = forward(query, share, start, end, carry, heads=heads, into=result, **options)
        return result

    return both


def backward_by_heads(backward, **fixed):
    def both(query, kv, start, end, lse, delta, dout, *, scale, logits_soft_cap):
        options = {"scale": scale, "logits_soft_cap": logits_soft_cap} | fixed
        dq, dkv = None, []
        for heads, share in packed.halve_heads(kv):
            dq, part = backward(query, share, start, end, lse, delta, dout, dq, heads=heads, **options)
            dkv.append(part)
        return dq, jnp.concatenate(dkv, axis=-2)

    return both


@interpreted
@pytest.mark.parametrize(
    "case",
    [
        Case(P=2, T=130, N=4, K=2, mask="holes", carried=True),
        pytest.param(Case(P=2, T=70, N=3, K=3, H=40, Hv=40, mask="causal"), marks=pytest.mark.slow),
        pytest.param(Case(P=9, T=64, S=16, N=4, K=2, mask="causal", carried=True), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_interpreted(case):
    with compat.interpret_mode():
        check_forward(case, jitted(forward_by_heads(hopper_forward)))


@interpreted
def test_forward_interpreted_with_few_keys_a_tile():
    case = Case(P=2, T=130, N=4, K=2, mask="random", carried=True)
    with compat.interpret_mode():
        check_forward(case, jitted(forward_by_heads(hopper_forward, config=SMALL)), jnp.bfloat16)


@interpreted
@pytest.mark.parametrize(
    "case",
    [
        Case(P=2, T=64, S=72, N=4, K=2, mask="causal"),
        pytest.param(Case(P=2, T=64, S=72, N=3, K=3, H=192, Hv=192, mask="holes"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_backward_interpreted(case):
    with compat.interpret_mode():
        backward = backward_by_heads(hopper_backward, config=SMALL_BACKWARD)
        check_backward(case, jitted(backward), part_by_part=False)


@needs_in_place
@pytest.mark.parametrize("H", [64, 128, 256])
def test_lowers_for_cuda(H):
    case = Case(B=2, T=300, S=520, N=8, K=4, H=H, Hv=H, carried=True)

    def forward(query, kv, start, end, lse, delta, dout, out):
        by_heads = forward_by_heads(hopper_forward)
        return by_heads(query, kv, start, end, (out, lse), out_dtype=query.dtype, **case.options)

    def backward(*operands):
        return backward_by_heads(hopper_backward)(*operands[:-1], **case.options)

    assert lowered(case, forward).count("stablehlo.custom_call @mosaic_gpu") == 2
    # Two more in the repeatable form, of two kernels.
    assert lowered(case, backward).count("stablehlo.custom_call @mosaic_gpu") == (2 if H == 128 else 4)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "length", "suffice"),
    [
        (32, 8, 128, 2048, True),  # 8K over four ranks
        (32, 8, 128, 1024, False),
        (32, 2, 256, 2048, False),
        (32, 2, 256, 4096, True),
        (24, 8, 128, 2048, False),  # three query heads are not halved
        (8, 1, 128, 1 << 20, False),
    ],
)
def test_halves_of_short_shards_are_too_few_programs(heads, kv_heads, head_size, length, suffice):
    query = jax.ShapeDtypeStruct((1, length, heads, head_size), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((2, 1, length, kv_heads, head_size), jnp.bfloat16)
    assert support.can_split_heads(query, kv) == (suffice and compat.INTERPRET_AVAILABLE)


GPU_CASES = [
    Case(P=2, B=2, T=300, S=264, N=8, K=4, mask="random", carried=True),
    Case(P=1, T=512, S=512, N=6, K=3, H=128, Hv=128, mask="causal"),
    Case(P=3, T=520, S=520, N=8, K=2, H=128, Hv=128, mask="holes", carried=True),
    Case(P=3, T=256, S=256, N=16, K=2, H=256, Hv=256, mask="causal", carried=True),
    Case(P=2, T=200, S=136, N=4, K=2, H=128, Hv=64, mask="random", soft_cap=5.0),
    Case(P=2, T=100, S=77, N=6, K=3, H=40, Hv=40, mask="full", dtype="float16"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", None], ids=["float32", "rounded"])
def test_gpu_forward(case, dtype):
    check_forward(case, jitted(forward_by_heads(hopper_forward)), jnp.dtype(dtype or case.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
@pytest.mark.parametrize("deterministic", [True, False])
def test_gpu_backward(case, deterministic):
    case = dataclasses.replace(case, carried=False)
    check_backward(case, jitted(backward_by_heads(hopper_backward, deterministic=deterministic)), part_by_part=False)


def both_shares(query, first, second, start, end, carry, *, scale, logits_soft_cap):
    """Of arrays that hold half of the heads each."""
    result, options = None, {"scale": scale, "logits_soft_cap": logits_soft_cap}
    for i, share in enumerate((first, second)):
        heads = packed.HeadSlice(i * share.shape[-2], 2 * share.shape[-2])
        result = hopper_forward(query, share, start, end, carry, heads=heads, into=result, **options)
    return result


@pytest.mark.gpu
def test_gpu_nothing_is_copied_to_write_into_an_array():
    case = Case(P=2, T=256, S=256, N=8, K=2, H=128, Hv=128, mask="full", carried=True)
    query, key, value, bounds, carry = case.inputs()
    kv = packed_parts(key, value)
    compiled = jax.jit(functools.partial(both_shares, **case.options)).lower(query, kv, kv, *bounds, carry).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 2
    assert " copy(" not in text and "fusion(" not in text
