"""Qwen3.5 (dense and mixture of experts) and Qwen3-Next: model, checkpoints, sharding rules."""

from ring_jax.models.qwen3_5.cache import Cache as Cache
from ring_jax.models.qwen3_5.config import PRESETS as PRESETS
from ring_jax.models.qwen3_5.config import Config as Config
from ring_jax.models.qwen3_5.config import Experts as Experts
from ring_jax.models.qwen3_5.forward import Output as Output
from ring_jax.models.qwen3_5.modeling import Qwen3_5 as Qwen3_5
from ring_jax.models.qwen3_5.past import Chunk as Chunk
from ring_jax.models.qwen3_5.past import Chunks as Chunks
from ring_jax.models.qwen3_5.past import Past as Past
from ring_jax.models.qwen3_5.program import COMPILER_OPTIONS as COMPILER_OPTIONS
from ring_jax.models.qwen3_5.program import Program as Program
from ring_jax.models.qwen3_5.sharding import Sharding as Sharding
