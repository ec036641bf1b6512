"""A block's two functions with flat arguments, as tests like to write them."""

from typing import Any

from ring_jax.flash import backends, reference
from ring_jax.flash.hopper import backward_launch, forward_launch
from ring_jax.flash.operands import BlockOptions, Bounds, RowGradients


def options(scale: float, logits_soft_cap: float | None = None, deterministic: bool | None = None) -> BlockOptions:
    return BlockOptions(scale, logits_soft_cap, deterministic)


def flat_forward(forward):
    def call(query, kv, start, end, carry=None, *, scale, logits_soft_cap=None, **more: Any):
        return forward(query, kv, Bounds(start, end), carry, options(scale, logits_soft_cap), **more)

    return call


def flat_backward(backward):
    def call(
        query, kv, start, end, lse, delta, dout, dq=None, *,
        scale, logits_soft_cap=None, deterministic=None, **more: Any,
    ):  # fmt: skip
        rows = RowGradients(lse, delta, dout)
        if dq is not None:
            more["dq"] = dq
        static = options(scale, logits_soft_cap, deterministic)
        return backward(query, kv, Bounds(start, end), rows, static, **more)

    return call


hopper_forward, hopper_backward = flat_forward(forward_launch.forward), flat_backward(backward_launch.backward)
reference_forward, reference_backward = flat_forward(reference.forward), flat_backward(reference.backward)


def of_backend(name: str):
    """(forward, backward) of a registered backend."""
    backend = backends.BACKENDS[name]
    return flat_forward(backend.forward), flat_backward(backend.backward)
