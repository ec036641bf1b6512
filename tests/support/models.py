"""The smallest model that has both kinds of layers: it compiles in seconds."""

from typing import Any

from ring_jax.gdn import Heads

SMALLEST: dict[str, Any] = dict(
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    linear=Heads(2, 2, 8, 8),
    mlp_size=16,
    max_positions=256,
    layer_types=("linear_attention", "full_attention"),
)
