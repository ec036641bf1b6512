"""Whole models on top of the layers: `ring_jax.models.qwen3_5`."""

import importlib
import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "checkpoint":
        warnings.warn(
            "ring_jax.models.checkpoint is ring_jax.training.checkpoint now", DeprecationWarning, stacklevel=2
        )
        return importlib.import_module("ring_jax.training.checkpoint")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
