"""Ring attention and context parallelism for JAX."""

from ring_jax.context import ContextParallel as ContextParallel
from ring_jax.context import ring_attention as ring_attention
from ring_jax.flash import flash_attention as flash_attention
from ring_jax.flash import merge_partials as merge_partials
from ring_jax.layout import Contiguous as Contiguous
from ring_jax.layout import Striped as Striped
from ring_jax.layout import Zigzag as Zigzag
from ring_jax.mask import Mask as Mask
from ring_jax.mask import causal as causal
from ring_jax.mask import documents as documents
from ring_jax.mask import lengths as lengths
from ring_jax.mask import prefix as prefix
from ring_jax.mask import window as window
