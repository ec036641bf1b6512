"""Flax modules and adapters on top of the attention and gated-delta-rule primitives."""

from ring_jax.context.attention_fn import AttentionFn as AttentionFn
from ring_jax.context.attention_fn import attention_fn as attention_fn
from ring_jax.nn.attention import Attention as Attention
from ring_jax.nn.gdn import GatedDeltaNet as GatedDeltaNet
from ring_jax.nn.gdn import split_fused_projections as split_fused_projections
from ring_jax.nn.rope import apply_rope as apply_rope
