"""Rotary position embedding (Su et al., RoFormer, arXiv:2104.09864), half-rotation form, optionally partial."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from ring_jax._checks import check_array, check_number


def apply_rope(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "T"] | Int[Array, "B T"],
    *,
    theta: float = 10_000.0,
    rotary_fraction: float = 1.0,
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (x_i, x_{i+R/2}) of the first R = rotary_fraction * H features by positions * theta^(-2i/R).

    The rest passes unchanged. Angles are float32 whatever the dtype of `x`.

    Args:
      x: queries or keys [B, T, N, H], any float dtype.
      positions: int [T] or [B, T], the position of each token in its sequence. Under a layout they are
        ``context.positions(seq_len)``; in packed batches they start again with each document.
      theta: base of the wave lengths.
      rotary_fraction: share of the features that rotate, in (0, 1].

    Returns:
      The rotated array, shape and dtype of `x`.

    Raises:
      TypeError, ValueError: where rotary_fraction * H is not a positive even number, or positions do not match `x`.

    Example:
      >>> apply_rope(jnp.ones((1, 3, 2, 8)), jnp.arange(3)).shape
      (1, 3, 2, 8)
    """
    check_array("x", x, "B T N H")
    check_positions(positions, x)
    rotary = check_rotary(x.shape[-1], theta, rotary_fraction)

    cos, sin = angles(positions, rotary, theta)
    return rotate(x, cos[:, :, None], sin[:, :, None])


def angles(
    positions: Int[Array, "T"] | Int[Array, "B T"], rotary: int, theta: float
) -> tuple[Float32[Array, "#B T half"], Float32[Array, "#B T half"]]:
    """(cos, sin) of the angles of `rotary` features, [1 or B, T, rotary / 2]."""
    # In NumPy, once, and as checkpoints were trained: far out, one more rounding turns an angle by a hundredth.
    frequency = 1 / float(theta) ** (np.arange(0, rotary, 2, dtype=np.float32) / rotary)
    positions = positions if positions.ndim == 2 else positions[None]
    angle = positions.astype(jnp.float32)[..., None] * frequency[None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "#B T 1 half"], sin: Float[Array, "#B T 1 half"]
) -> Float[Array, "B T N H"]:
    """x with its first pairs of features turned, in x's dtype."""
    rotary = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :rotary].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    rotated = rotated.astype(x.dtype)
    return rotated if rotary == x.shape[-1] else jnp.concatenate([rotated, x[..., rotary:]], axis=-1)


def check_rotary(head_size: int, theta: float, rotary_fraction: float) -> int:
    """How many features of a head rotate; raises unless that is a positive even number."""
    check_number("theta", theta, above=0)
    check_number("rotary_fraction", rotary_fraction, above=0, high=1)
    rotary = round(head_size * rotary_fraction)
    if not 0 < rotary <= head_size or rotary % 2:
        raise ValueError(
            f"RoPE rotates pairs: rotary_fraction * head size must be even and in (0, {head_size}], got "
            f"{rotary_fraction} * {head_size} = {rotary}"
        )
    return rotary


def check_positions(positions: Array, x: Array) -> None:
    """Raises unless these are positions [T], [1, T] or [B, T] for x [B, T, ...]."""
    check_array("positions", positions, kind="integer")
    if positions.shape not in ((x.shape[1],), x.shape[:2], (1, x.shape[1])):
        raise ValueError(f"positions must be [{x.shape[1]}] or {list(x.shape[:2])} as x, got {list(positions.shape)}")
