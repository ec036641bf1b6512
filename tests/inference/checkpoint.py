"""A tiny checkpoint directory with random weights and a byte-level tokenizer, as tests of generation need it."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import tokenizers
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tokenizers import decoders, models, pre_tokenizers

from ring_jax.gdn import Heads
from ring_jax.models.qwen3_5 import Config, Experts, Qwen3_5

EOS = 256
CONFIG = Config(
    family="qwen3_5",
    vocab_size=257,
    hidden_size=32,
    num_layers=4,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    linear=Heads(1, 2, 8, 8),
    mlp_size=48,
    rotary_fraction=0.5,
    max_positions=512,
    tie_embeddings=True,
    eos_token_ids=(EOS,),
)


# Two groups of layers, and heads and experts for a tensor and an expert axis of two.
_WIDE = dataclasses.replace(
    CONFIG,
    num_heads=4,
    num_kv_heads=2,
    linear=Heads(2, 4, 8, 8),
    layer_types=("linear_attention", "full_attention") * 2,
)
_MOE = dataclasses.replace(_WIDE, mlp_size=None, experts=Experts(8, 2, 16, 16), tie_embeddings=False)
FAMILIES = {
    "qwen3_5": _WIDE,
    "qwen3_5_moe": dataclasses.replace(_MOE, family="qwen3_5_moe"),
    "qwen3_next": dataclasses.replace(_MOE, family="qwen3_next", linear=Heads(2, 2, 8, 8)),
}


@functools.cache
def _values(config: Config):
    return Qwen3_5(config, rngs=nnx.Rngs(0), dtype=jnp.float32).split()[1]


def tiny_model(config: Config = CONFIG, **options) -> Qwen3_5:
    """The same random weights each time: making them takes seconds."""
    model, values = Qwen3_5(config, rngs=None, dtype=jnp.float32, **options), _values(config)
    if model.sharding is not None:
        mesh = model.sharding.resolve_mesh()
        is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
        specs = model.param_specs(model.sharding, mesh)
        values = jax.device_put(values, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec))
    model.set_parameters(values)
    return model


def tiny_checkpoint(directory: Path, *, chat_template: str | None = None) -> Path:
    tiny_model().save_pretrained(directory)
    alphabet = {char: token for token, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    assert tokenizer.token_to_id("<|end|>") == EOS
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, object] = {"eos_token": {"content": "<|end|>"}}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
