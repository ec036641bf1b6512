"""Config: published sizes, Hugging Face's names both ways, and what it refuses."""

import dataclasses
import json

import pytest

from ring_jax.models.qwen3_5 import PRESETS, Config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_hugging_face(name):
    config = Config.preset(name)
    assert config.period == 4 and config.groups * 4 == config.num_layers
    assert Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_wrapper_holds_the_text_model(tmp_path):
    text = Config.preset("qwen3.5-2b").to_hf()
    tied = text.pop("tie_word_embeddings")
    wrapper = {"model_type": "qwen3_5", "text_config": text, "vision_config": {}, "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(wrapper))
    assert Config.from_hf(tmp_path) == Config.preset("qwen3.5-2b")


def test_old_files_have_rope_at_top_level():
    old = Config.preset("qwen3-next-80b-a3b").to_hf()
    rope = old.pop("rope_parameters")
    old |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope["partial_rotary_factor"]}
    del old["layer_types"]
    assert Config.from_hf(old) == Config.preset("qwen3-next-80b-a3b")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"model_type": "llama"}, ValueError, "'llama'.*qwen3_next"),
        ({"hidden_size": None}, ValueError, "lacks hidden_size"),
        ({"attention_bias": True}, NotImplementedError, "attention_bias=True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, NotImplementedError, "'yarn'"),
        ({"num_key_value_heads": 3}, ValueError, "num_kv_heads must divide"),
        ({"layer_types": ["full_attention"] * 24}, ValueError, "hybrid"),
    ],
)
def test_refuses_with_the_reason(change, error, match):
    with pytest.raises(error, match=match):
        Config.from_hf({**Config.preset("qwen3.5-0.8b").to_hf(), **change})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_size": "32"}, "hidden_size must be an integer, got '32'"),
        ({"hidden_size": 32.0}, "hidden_size must be an integer, got 32.0"),
        ({"hidden_size": True}, "hidden_size must be an integer, got True"),
        ({"hidden_size": [32]}, r"hidden_size must be an integer, got \[32\]"),
        ({"vocab_size": 0}, "vocab_size must be in .*, got 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be in .*, got 1000000000"),
        ({"num_attention_heads": 2**40}, "num_attention_heads must be in"),
        ({"linear_num_key_heads": 0}, "linear_num_key_heads must be in"),
        ({"linear_num_key_heads": 3}, "linear key heads must divide"),
        ({"max_position_embeddings": -5}, "max_position_embeddings must be in"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be finite and > 0, got -1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be one number, got '1e-6'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be True or False.*, got 'false'"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings must be True or False"),
        ({"rope_parameters": []}, r"rope_parameters must be a JSON object, got \[\]"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_parameters: rope_theta must be finite and > 0, got -1"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta must be finite"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta must be finite"),
        ({"rope_parameters": {"rope_theta": None}}, "lacks rope_parameters.rope_theta"),
        ({"rope_parameters": {"rope_type": 3}}, "rope_type must be text, got 3"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 2}}, "partial_rotary_factor must be"),
        (
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.003}},
            "rotary_fraction . head_dim must be even",
        ),
        ({"layer_types": "full_attention"}, "layer_types must be a list, got 'full_attention'"),
        ({"layer_types": [1] * 24}, "layer_types must be a name, got 1"),
        ({"layer_types": None, "full_attention_interval": 0}, "full_attention_interval must be in"),
        ({"text_config": None}, "text_config lacks vocab_size"),
        ({"text_config": "x"}, "text_config must be a JSON object, got 'x'"),
        ({"model_type": ["qwen3_5"]}, r"a model of type \['qwen3_5'\]"),
        ({"eos_token_id": "a"}, "eos_token_id must be an integer, got 'a'"),
        ({"eos_token_id": [1, 1.5]}, "eos_token_id: 1 must be an integer, got 1.5"),
        ({"eos_token_id": 10**9}, "eos_token_id must be in"),
        ({"intermediate_size": None}, "lacks intermediate_size"),
    ],
)
@pytest.mark.parametrize("from_file", [False, True], ids=["dict", "file"])
def test_every_entry_is_checked(tmp_path, change, match, from_file):
    """ValueErrors that name file and entry, whatever is wrong."""
    values = {**Config.preset("qwen3.5-0.8b").to_hf(), **change}
    (tmp_path / "config.json").write_text(json.dumps(values))
    where = f"{tmp_path / 'config.json'}" if from_file else "config"
    with pytest.raises(ValueError, match=match) as error:
        Config.from_hf(tmp_path if from_file else values)
    assert str(error.value).startswith(where)


@pytest.mark.parametrize("name", ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"])
def test_entries_of_experts(name):
    values = Config.preset("qwen3.5-35b-a3b").to_hf()
    for bad in ("a", -1, 1.5):
        with pytest.raises(ValueError, match=f"config: {name} must be"):
            Config.from_hf(values | {name: bad})
    with pytest.raises(ValueError, match="a token goes to 1 ... 256 experts, got 257"):
        Config.from_hf(values | {"num_experts_per_tok": 257})


def test_sources():
    for bad in (3, None, b"config.json", ["a"]):
        with pytest.raises(TypeError, match="source must be a path"):
            Config.from_hf(bad)
    with pytest.raises(ValueError, match="source must be the name of a file"):
        Config.from_hf("")


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        Config.from_hf(tmp_path)
    for text in (b"{", b"", b"\xff\xfe", b"[" * 10**5, b'{"vocab_size": ' + b"1" * 5000 + b"}"):
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(ValueError, match="config.json is not valid JSON"):
            Config.from_hf(tmp_path)
    for text in ("[]", "null", "3", '"a"'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json must be a JSON object, got"):
            Config.from_hf(tmp_path)


def test_pattern_without_repetition_is_one_group():
    config = Config.preset("qwen3.5-0.8b")
    types = ("full_attention",) + config.layer_types[1:]
    assert dataclasses.replace(config, layer_types=types).groups == 1
