"""Ring attention and context parallelism for JAX."""

import importlib
from typing import Any

from ring_jax._segment_ids import contiguous_segments as contiguous_segments
from ring_jax.context import ContextParallel as ContextParallel
from ring_jax.context import ring_attention as ring_attention
from ring_jax.flash import flash_attention as flash_attention
from ring_jax.flash import merge_partials as merge_partials
from ring_jax.gdn import gated_delta_rule as gated_delta_rule
from ring_jax.layout import Contiguous as Contiguous
from ring_jax.layout import Layout as Layout
from ring_jax.layout import Striped as Striped
from ring_jax.layout import Zigzag as Zigzag
from ring_jax.mask import Mask as Mask
from ring_jax.mask import causal as causal
from ring_jax.mask import documents as documents
from ring_jax.mask import lengths as lengths
from ring_jax.mask import prefix as prefix
from ring_jax.mask import window as window

__version__ = "0.1.0"

# What semantic versioning covers, with the public names of the packages that it lists; docs/public_api.md has a line for each.
__all__ = [
    "ContextParallel",
    "Contiguous",
    "Layout",
    "Mask",
    "Striped",
    "Zigzag",
    "causal",
    "contiguous_segments",
    "documents",
    "flash_attention",
    "gated_delta_rule",
    "lengths",
    "merge_partials",
    "prefix",
    "ring_attention",
    "window",
    "data",
    "distributed",
    "gdn",
    "inference",
    "models",
    "moe",
    "nn",
    "pages",
    "plan",
    "plot",
    "training",
]

_PACKAGES = ("data", "distributed", "inference", "models", "moe", "nn", "pages", "plan", "plot", "training")


def __getattr__(name: str) -> Any:
    # Imported where they are used: Flax is slow to import, and not everybody needs it.
    if name in _PACKAGES:
        return importlib.import_module(f"ring_jax.{name}")
    raise AttributeError(f"module 'ring_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PACKAGES})
