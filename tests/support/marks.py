"""What tests need of jax beyond the oldest version that the package takes."""

import pytest

from ring_jax.mosaic import compat, in_place

interpreted = pytest.mark.skipif(
    not compat.INTERPRET_AVAILABLE, reason="Mosaic GPU interpret mode needs jax 0.11 or later"
)
needs_in_place = pytest.mark.skipif(
    not in_place.AVAILABLE, reason="kernels that update arrays in place need jax 0.11 or later"
)
