"""Register layouts of vectors."""

from typing import Any

from jax.experimental.mosaic.gpu import fragmented_array

from ring_jax.mosaic import compat

_WARPS, _LANES = 4, 32  # of a warpgroup; of a warp


def channel_layout(size: int) -> Any:
    """[size], a channel a thread; of fewer than 128, several warps hold the same."""
    replicated = fragmented_array.Replicated(128 // min(size, 128))
    warps = (-3,) if size >= 128 else (replicated, -3)
    return compat.tiled_layout(((min(size, 128),), (_LANES,), (1,)), warps, (-2,))


def whole_layout(size: int) -> Any:
    """[size] in every warp."""
    return compat.tiled_layout(
        ((_LANES * (size // _LANES),), (size // _LANES,)), (fragmented_array.Replicated(_WARPS),), (-2,)
    )
