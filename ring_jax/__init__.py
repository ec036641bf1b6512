"""Ring attention and context parallelism for JAX."""

import importlib

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


def __getattr__(name: str):
    # Flax is imported only by those who use it.
    if name == "nn":
        return importlib.import_module("ring_jax.nn")
    raise AttributeError(f"module 'ring_jax' has no attribute {name!r}")
