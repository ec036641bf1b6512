"""Context parallelism: sequences spread over a mesh axis."""

from ring_jax.context.attention import ring_attention as ring_attention
from ring_jax.context.parallel import ContextParallel as ContextParallel
