"""What the layers' projections accept, checked when a layer is made: Flax would find out at its first call."""

from __future__ import annotations

from typing import Any

from flax import nnx

from ring_jax._checks import check_callable, check_dtype, check_instance, check_precision


def check_projections(dtype: Any, param_dtype: Any, precision: Any, kernel_init: Any, rngs: Any) -> None:
    """Raises unless these are what `nnx.Linear` can work with."""
    check_dtype("dtype", dtype, optional=True)
    check_dtype("param_dtype", param_dtype)
    check_precision("precision", precision)
    check_callable("kernel_init", kernel_init, "an initialiser (key, shape, dtype) -> array", optional=True)
    check_instance("rngs", rngs, nnx.Rngs, "flax.nnx.Rngs")
