"""Tiny Qwen3.5 and Qwen3-Next checkpoints from a NumPy seed, under the tensor names of Hugging Face.

transformers and ring_jax read the same tensors, so golden files need not carry weights. The usual initialisation lets the
GDN state die within one token, which would hide every fault of context parallelism; this one keeps it alive for many.
"""

import json
import pathlib
import struct
from collections.abc import Iterator

import numpy as np

Tensors = dict[str, np.ndarray]

_COMMON = {
    "dtype": "float32",
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25}
_MROPE = _ROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
_EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_DENSE = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "intermediate_size": 128,
    "rope_parameters": _MROPE,
}
_MOE = {"architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text", "rope_parameters": _MROPE}
_NEXT = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "intermediate_size": 128,
    "rope_parameters": _ROPE,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_HEAD_256 = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-3,  # large enough that no norm can leave it out unnoticed
    "rope_parameters": _ROPE | {"mrope_section": [11, 11, 10], "mrope_interleaved": True},
}

_CONFIGS = {
    "dense": _COMMON | _DENSE,
    "moe": _COMMON | _MOE | _EXPERTS,
    "next": _COMMON | _NEXT | _EXPERTS,
    "next_raw": _COMMON | _NEXT | _EXPERTS | {"norm_topk_prob": False},
    "head256": _COMMON | _DENSE | _HEAD_256,
}
FAMILIES = tuple(_CONFIGS)


def config(family: str, *, layers: int = 4, period: int = 4, dtype: str = "float32") -> dict:
    """What config.json holds. `family` is one of FAMILIES; layer `period` of each `period` is full attention."""
    types = ["linear_attention" if (n + 1) % period else "full_attention" for n in range(layers)]
    return _CONFIGS[family] | {"num_hidden_layers": layers, "layer_types": types, "dtype": dtype}


def weights(config: dict, seed: int, *, decays: bool = True) -> Tensors:
    """Every tensor of a checkpoint, float32. `decays=False` makes all log decays exactly 0."""
    make = _Initializer(np.random.default_rng(seed), decays)
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    tied = config["tie_word_embeddings"]
    tensors = {"model.embed_tokens.weight": make.linear(vocabulary, width) if tied else make.normal(vocabulary, width)}
    for n, kind in enumerate(config["layer_types"]):
        layer = dict(_full_attention(config, make) if kind == "full_attention" else _linear_attention(config, make))
        layer |= dict(_experts(config, make) if "num_experts" in config else _mlp(config, make))
        layer |= {f"{name}_layernorm.weight": make.norm(width, 0.0) for name in ("input", "post_attention")}
        tensors |= {f"model.layers.{n}.{name}": tensor for name, tensor in layer.items()}
    tensors["model.norm.weight"] = make.norm(width, 0.0)
    if not tied:
        tensors["lm_head.weight"] = make.linear(vocabulary, width)
    return tensors


def write(directory: pathlib.Path, config: dict, tensors: Tensors) -> pathlib.Path:
    """A checkpoint of one file: config.json and model.safetensors. Returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    header, start = {}, 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.astype("<f4").tobytes())
    return directory


def fingerprint(tensors: Tensors) -> np.ndarray:
    """Mean absolute value of each tensor, in order of name: tells whether another NumPy drew other weights."""
    return np.array([np.abs(tensors[name], dtype=np.float64).mean() for name in sorted(tensors)])


class _Initializer:
    """Draws of one generator, in float32."""

    def __init__(self, rng: np.random.Generator, decays: bool):
        self.rng, self.decays = rng, decays

    def normal(self, *shape: int, mean=0.0, scale=1.0) -> np.ndarray:
        return self.rng.normal(mean, scale, shape).astype(np.float32)

    def linear(self, *shape: int, scale=1.0) -> np.ndarray:
        """Kernel [..., out, in] whose products with unit inputs have variance scale^2."""
        return self.normal(*shape, scale=scale * shape[-1] ** -0.5)

    def norm(self, size: int, start: float) -> np.ndarray:
        return (start + self.rng.uniform(-0.2, 0.2, size)).astype(np.float32)

    def a_log(self, heads: int) -> np.ndarray:
        drawn = np.log(4 * self.rng.uniform(size=heads) + 0.01).astype(np.float32)
        return drawn if self.decays else np.full_like(drawn, -200.0)  # exp(-200) is 0 in float32


def _full_attention(config: dict, make: _Initializer) -> Iterator[tuple[str, np.ndarray]]:
    width, size = config["hidden_size"], config["head_dim"]
    queries, keys = (config[f"num_{kind}_heads"] * size for kind in ("attention", "key_value"))
    for name, rows in (("q", 2 * queries), ("k", keys), ("v", keys)):
        yield f"self_attn.{name}_proj.weight", make.linear(rows, width)
    yield "self_attn.o_proj.weight", make.linear(width, queries)
    for name in "qk":
        yield f"self_attn.{name}_norm.weight", make.norm(size, 0.0)


def _linear_attention(config: dict, make: _Initializer) -> Iterator[tuple[str, np.ndarray]]:
    width, heads = config["hidden_size"], config["linear_num_value_heads"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = heads * config["linear_value_head_dim"]
    mixed, name = 2 * keys + values, "linear_attn.in_proj_"
    if config["model_type"] == "qwen3_next":
        yield f"{name}qkvz.weight", make.linear(mixed + values, width)
        yield f"{name}ba.weight", make.linear(2 * heads, width)
    else:
        for part, rows in (("qkv", mixed), ("z", values), ("b", heads), ("a", heads)):
            yield f"{name}{part}.weight", make.linear(rows, width)
    yield "linear_attn.conv1d.weight", make.normal(mixed, 1, config["linear_conv_kernel_dim"], scale=0.5)
    yield "linear_attn.A_log", make.a_log(heads)
    yield "linear_attn.dt_bias", make.normal(heads, mean=-2.0)
    yield "linear_attn.norm.weight", make.norm(config["linear_value_head_dim"], 1.0)
    yield "linear_attn.out_proj.weight", make.linear(width, values)


def _mlp(config: dict, make: _Initializer, size: int | None = None) -> Iterator[tuple[str, np.ndarray]]:
    width, size = config["hidden_size"], size or config["intermediate_size"]
    for name, shape in (("gate", (size, width)), ("up", (size, width)), ("down", (width, size))):
        yield f"mlp.{name}_proj.weight", make.linear(*shape)


def _experts(config: dict, make: _Initializer) -> Iterator[tuple[str, np.ndarray]]:
    width, count, size = config["hidden_size"], config["num_experts"], config["moe_intermediate_size"]
    yield "mlp.gate.weight", make.linear(count, width, scale=2.0)
    if config["model_type"] == "qwen3_next":
        for expert in range(count):
            for name, tensor in _mlp(config, make, size):
                yield name.replace("mlp.", f"mlp.experts.{expert}."), tensor
    else:
        yield "mlp.experts.gate_up_proj", make.linear(count, 2 * size, width)
        yield "mlp.experts.down_proj", make.linear(count, width, size)
    for name, tensor in _mlp(config, make, config["shared_expert_intermediate_size"]):
        yield name.replace("mlp.", "mlp.shared_expert."), tensor
    yield "mlp.shared_expert_gate.weight", make.linear(1, width)
