"""Attention on one device: blocks over key intervals that resume and merge."""

from ring_jax.flash.api import flash_attention as flash_attention
from ring_jax.flash.merge import merge_partials as merge_partials
