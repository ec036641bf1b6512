"""Other packages' kernels and models, timed in a process of their own: here with stand-ins for PyTorch and transformers."""

import argparse

import pytest

from ring_jax.bench import model, torch_peers
from ring_jax.models.qwen3_5 import Config

TORCH = """
import contextlib, time
bfloat16 = "bfloat16"
set_default_dtype = device = lambda *_: contextlib.nullcontext()
inference_mode = lambda: lambda f: f
randint = lambda low, high, shape, device: Tokens(shape)
class Tokens:
    def __init__(self, shape): self.shape = shape
    def __getitem__(self, at): return Tokens((self.shape[0], 1))
class cuda:
    synchronize = staticmethod(lambda: None)
    class Event:
        def __init__(self, enable_timing): pass
        def record(self): self.at = time.perf_counter()
        def elapsed_time(self, end): return 1e3 * (end.at - self.at)
"""
TRANSFORMERS = """
import time, types
class AutoConfig:
    for_model = staticmethod(lambda model_type, **values: types.SimpleNamespace(model_type=model_type, **values))
class Model:
    device = "cuda"
    def __init__(self, config): self.config = config
    def eval(self): return self
    def __call__(self, tokens, past_key_values=None, *, use_cache, logits_to_keep):
        assert use_cache and logits_to_keep == 1 and self.config.model_type == "qwen3_5_text"
        if tokens.shape[1] > 4096: raise MemoryError("no room")
        # A decode has the prompt's cache, and takes a tenth of its time.
        assert (tokens.shape == (2, 1)) == (past_key_values == "cache")
        time.sleep(2e-4 if past_key_values else 2e-3)
        return types.SimpleNamespace(past_key_values="cache")
class AutoModelForCausalLM:
    from_config = staticmethod(Model)
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    for name, text, version in (("torch", TORCH, "2.11.0"), ("transformers", TRANSFORMERS, "5.17.0")):
        (tmp_path / f"{name}.py").write_text(text)
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def arguments(*flags):
    parser = argparse.ArgumentParser()
    model.add_arguments(parser)
    return parser.parse_args(["--peer", "transformers", "--batch", "2", *flags])


def test_a_whole_model(packages, capsys):
    rows = model.peer(Config.preset("qwen3.5-0.8b"), arguments("--prefill", "512", "--decode", "256"))
    assert [(row["what"], row["length"], row["name"]) for row in rows] == [
        ("prefill", 512, "transformers 5.17.0, without fla"),
        ("decode", 256, "transformers 5.17.0, without fla"),
    ]
    prefill, decode = (row["ms"] for row in rows)
    assert prefill > 2 and 0.2 < decode < prefill / 2
    assert "prefill          2 x     512 tokens, transformers 5.17.0, without fla:" in capsys.readouterr().out


def test_a_length_that_does_not_fit_leaves_the_others(packages, capsys):
    rows = model.peer(Config.preset("qwen3.5-0.8b"), arguments("--prefill", "512", "8192", "--decode"))
    assert "ms" in rows[0] and rows[1]["failure"] == "MemoryError: no room"


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(torch_peers, "__file__", "/nowhere/torch_peers.py")
    (row,) = torch_peers.run("fla", "bfloat16", ["1x64x2x1x64"])
    assert row["name"] == "fla" and "No such file" in row["failure"]
