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


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        Config.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Config.from_hf(tmp_path)


def test_pattern_without_repetition_is_one_group():
    config = Config.preset("qwen3.5-0.8b")
    types = ("full_attention",) + config.layer_types[1:]
    assert dataclasses.replace(config, layer_types=types).groups == 1
