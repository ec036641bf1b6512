"""What the Hopper kernels can run: devices, dtypes and sizes."""

import jax.experimental.pallas as pl
import jax.numpy as jnp

from ring_jax._arrays import Shaped
from ring_jax.flash.hopper.backward_common import keys_of_a_program
from ring_jax.flash.hopper.backward_launch import splits
from ring_jax.flash.kv import HeadSlice, value_size
from ring_jax.flash.operands import BlockOptions
from ring_jax.mosaic import in_place
from ring_jax.mosaic.device import hopper_reason

# Thread blocks that come near to giving each of a Hopper GPU's 132 multiprocessors one.
_ONE_EACH = 128


def unsupported_reason(query: Shaped, kv: Shaped, options: BlockOptions) -> str | None:
    """Why the kernels cannot run these inputs here, or None."""
    return hopper_reason() or operand_reason(query, kv, options)


def operand_reason(query: Shaped, kv: Shaped, options: BlockOptions, heads: HeadSlice | None = None) -> str | None:
    """Why the kernels cannot take these operands on any device, or None."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, got {query.dtype}"
    if kv.dtype != query.dtype:
        return f"query and kv must share a dtype, got {query.dtype} and {kv.dtype}"
    sizes = query.shape[-1], value_size(kv, query.shape[-1])
    if min(sizes) < 1 or max(sizes) > 256:
        return f"head sizes must be between 1 and 256, got {sizes[0]} for keys and {sizes[1]} for values"
    kv_heads = heads.total if heads else kv.shape[-2]
    if 0 in query.shape or 0 in kv.shape:
        return f"empty arrays, got {query.shape} and {kv.shape}"
    if query.shape[2] % kv_heads:
        return f"query heads must be a multiple of key-value heads, got {query.shape[2]} and {kv_heads}"
    if options.scale <= 0:
        return f"scale must be positive, got {options.scale}"
    return None


def can_split_heads(query: Shaped, kv: Shaped) -> bool:
    """Whether half of the KV heads of one block are programs enough for the multiprocessors."""
    if not in_place.AVAILABLE:
        return False
    batch, _, heads, head_size = query.shape
    kv_len, kv_heads = kv.shape[-3:-1]
    tiles = pl.cdiv(kv_len, keys_of_a_program(head_size, value_size(kv, head_size)))
    return batch * (kv_heads // 2) * splits(heads // kv_heads, fused=False)[-1] * tiles >= _ONE_EACH
