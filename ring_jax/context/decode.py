"""Decode: a few new queries, the same on all ranks, against keys that lie spread over a mesh axis.

Each rank attends to the keys that it has (`ring_jax.flash.few`); the partial results meet once, weighted by their LSEs:

    out = sum_r w_r out_r / sum_r w_r,   w_r = exp(lse_r - max_r lse_r)

Two small collectives however long the keys are and however many ranks there are. `context.paged` has other ways to merge.

Source: vLLM RFC 37995 (decode context parallelism).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from ring_jax._mesh import Axis, axis_names
from ring_jax._vma import pcast_to
from ring_jax.flash.few import attend_few as attend_few
from ring_jax.flash.few import attend_parts as attend_parts


def merge_ranks(
    out: Float32[Array, "B T N H"], lse: Float32[Array, "B T N"], axis: Axis
) -> tuple[Float32[Array, "B T N H"], Float32[Array, "B T N"]]:
    """The partial results of all ranks of `axis` as one, the same on all of them; inside a shard_map."""
    axes = axis_names(axis)
    out, lse = pcast_to((out, lse), axes)
    top = lax.pmax(lse, axes)
    finite = jnp.where(jnp.isneginf(top), 0, top)
    weight = jnp.exp(lse - finite)[..., None]
    packed = lax.psum(jnp.concatenate([out * weight, weight], axis=-1), axes)
    total = packed[..., -1]
    return packed[..., :-1] / jnp.where(total == 0, 1, total)[..., None], finite + jnp.log(total)
