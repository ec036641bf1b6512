"""What tests need of jax beyond the oldest version that the package takes."""

import pytest

from ring_jax.flash import mosaic_compat, mosaic_update

interpreted = pytest.mark.skipif(
    not mosaic_compat.INTERPRET_AVAILABLE, reason="Mosaic GPU interpret mode needs jax 0.11 or later"
)
in_place = pytest.mark.skipif(
    not mosaic_update.AVAILABLE, reason="kernels that update arrays in place need jax 0.11 or later"
)
