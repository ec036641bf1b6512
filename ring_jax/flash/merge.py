"""Merging partial attention results, and the pieces of the online softmax that all backends share.

A partial result is (out, lse): out normalised over the keys seen so far, lse the natural log of their
sum of exponentials, -inf where none was seen. Two partials over disjoint keys merge exactly:

    lse = logaddexp(lse_a, lse_b),   out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ring_jax._checks import check_array


def partial_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Dtype of partial results and products of inputs of `dtype`: float32, float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def weight(lse_part: jax.Array, lse: jax.Array) -> jax.Array:
    """e^(lse_part - lse), the share of a partial in the whole; 0 where the part is empty, never NaN."""
    empty = jnp.isneginf(lse_part)
    return jnp.where(empty, 0, jnp.exp(jnp.where(empty, 0, lse_part) - jnp.where(empty, 0, lse)))


def merge_partials(
    out_a: Float[Array, "B T N H"],
    lse_a: Float[Array, "B T N"],
    out_b: Float[Array, "B T N H"],
    lse_b: Float[Array, "B T N"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

        lse = log(e^lse_a + e^lse_b),   out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b

    Args:
        out_a, out_b: normalised outputs [B, T, N, H]; keep them float32 between merges.
        lse_a, lse_b: natural-log LSE [B, T, N]; -inf where a partial saw no key.

    Returns:
        (out, lse) in the promoted dtypes. Rows empty in both stay 0 and -inf. Gradients are finite everywhere.

    Example:
        >>> import jax.numpy as jnp
        >>> one, empty = jnp.ones((1, 1, 1, 2)), jnp.full((1, 1, 1), -jnp.inf)
        >>> merge_partials(one, jnp.zeros((1, 1, 1)), 0 * one, empty)[0].tolist()
        [[[[1.0, 1.0]]]]

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv 1805.02867.
    """
    for name, x in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        check_array(name, x)
    if out_a.ndim == 0 or out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or lse_a.shape != out_a.shape[:-1]:
        raise ValueError(
            f"merge_partials expects out [B, T, N, H] and lse [B, T, N] of equal shapes, got out_a {out_a.shape} and out_b "
            f"{out_b.shape}, lse_a {lse_a.shape} and lse_b {lse_b.shape}"
        )
    lse = log_add_exp(lse_a, lse_b)
    out = weight(lse_a, lse)[..., None] * out_a + weight(lse_b, lse)[..., None] * out_b
    return out, lse


def log_add_exp(a: jax.Array, b: jax.Array) -> jax.Array:
    """logaddexp whose gradient at (-inf, -inf) is 0, not NaN."""
    top = jax.lax.stop_gradient(jnp.maximum(a, b))
    empty = jnp.isneginf(top)
    top = jnp.where(empty, 0, top)
    total = weight(a, top) + weight(b, top)
    return jnp.where(empty, -jnp.inf, top + jnp.log(jnp.where(empty, 1, total)))


def carry_gradient(
    carry: tuple[jax.Array, jax.Array], lse: jax.Array, delta: jax.Array, dout: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of the carry that a block resumed from.

    With w = e^(lse_in - lse):  dO_in = w dO,   dlse_in = w (dO . O_in - delta),  delta = rowsum(dO . O) - dLSE.
    """
    out_in, lse_in = carry
    w = weight(lse_in, lse)
    dout = dout.astype(out_in.dtype)
    dlse = w * (jnp.sum(dout * out_in, axis=-1) - delta)
    return w[..., None] * dout, dlse.astype(lse_in.dtype)
