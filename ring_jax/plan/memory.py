"""Bytes on the fullest rank, by kind."""

from ring_jax.models.qwen3_5.config import FULL
from ring_jax.plan.layers import Setting
from ring_jax.plan.result import Memory

# What a CUDA context, NCCL's buffers and loaded programs take beside arrays.
RESERVED = 1.5 * 2**30


def prefill(at: Setting) -> Memory:
    """Weights, the cache that is left, and what one layer holds."""
    kinds = {"weights": 2.0 * at.weights.held, **_cache(at), "activations": _layer(at), **_keys(at)}
    return Memory(kinds | _gathered(at) | {"reserved": RESERVED}, at.machine.gpu.memory_bytes)


def training(at: Setting, optimizer_bytes: float) -> Memory:
    """Weights, gradients and the optimizer's moments; one input a group and attention's results; one group's backward."""
    config, held = at.config, at.weights.held
    attended = at.local * config.num_heads / at.tensor * (2.0 * config.head_dim + 4)
    full = sum(kind == FULL for kind in config.layer_types)
    kinds = {
        "weights": 2.0 * held,
        "gradients": 2.0 * held,
        "optimizer": optimizer_bytes * held,
        "saved": config.groups * 2.0 * at.local * config.hidden_size + full * attended,
        # Every layer of a group is computed again before the group's backward, which reads it (compiled: 4B 620 KB, 9B 650 KB a token).
        "activations": 1.1 * config.period * _layer(at),
        **_keys(at, 3.0),
        **_gathered(at, 2.0),
        "reserved": RESERVED,
    }
    return Memory(kinds, at.machine.gpu.memory_bytes)


def decode(at: Setting) -> Memory:
    """Weights and the cache."""
    kinds = {"weights": 2.0 * at.weights.held, **_cache(at), "reserved": RESERVED}
    return Memory(kinds, at.machine.gpu.memory_bytes)


def _cache(at: Setting) -> dict[str, float]:
    config = at.config
    full = sum(kind == FULL for kind in config.layer_types)
    keys = 2.0 * 2 * at.local * config.num_kv_heads * config.head_dim / at.tensor
    heads = config.linear
    state = at.rows * (4.0 * heads.value_heads * heads.key_size * heads.value_size + 2 * 3 * heads.features) / at.tensor
    return {"keys and values": full * keys, "states": (config.num_layers - full) * state}


def _layer(at: Setting) -> float:
    """What a layer holds at once: its input and sums, and what goes into and comes out of its widest part. Compiled for an H100, Qwen3.5-9B
    holds 185 KB a token, of which this gives 172."""
    config = at.config
    linear = 2 * (config.linear.features + config.linear.parts[2]) + 2 * config.linear.parts[2]
    widest = max(linear, 3 * (config.mlp_size or 0), 5 * config.num_heads * config.head_dim) / at.tensor
    token = 2.0 * (3 * config.hidden_size + 2 * widest)
    if config.experts is not None:  # a row of hidden features for each assignment, and of results
        token += 2.0 * config.experts.per_token * (config.experts.size + config.hidden_size)
    return at.local * token


def _keys(at: Setting, times: float = 1.0) -> dict[str, float]:
    """Keys and values that travel: one shard beside a rank's own, or all of them; float32 gradients too in training."""
    ranks = at.machine.size("context")
    if ranks == 1:
        return {}
    shard = 2.0 * 2 * at.local * at.config.num_kv_heads * at.config.head_dim / at.tensor
    return {"travelling keys": times * shard * (ranks if at.strategy == "all_gather" else 2)}


def _gathered(at: Setting, times: float = 1.0) -> dict[str, float]:
    """The weights of one layer, whole, where they lie over an axis besides."""
    if not at.weight_axes:
        return {}
    return {"gathered weights": times * 2.0 * max(map(sum, zip(at.weights.layers, at.weights.routed, strict=True)))}
