"""The training script: it learns, spreads over a mesh, resumes, and writes a checkpoint with a tokenizer."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.gdn import Heads
from ring_jax.models.qwen3_5 import Config, Qwen3_5

SCRIPT = Path(__file__).parents[2] / "examples" / "train_qwen3_5.py"


@pytest.fixture(scope="module")
def script():
    for name in ("matplotlib", "optax", "tokenizers", "tqdm"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location("train_qwen3_5", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def standard_promotion():
    """optax mixes dtypes. For all threads, because the script compiles in one of its own."""
    before = jax.config.jax_numpy_dtype_promotion
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", before)


@pytest.fixture
def smallest(script, monkeypatch, standard_promotion):
    """A recipe that compiles in seconds."""
    model = Config(
        **script.BYTES,
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
    recipe = script.Recipe(model, (script.Stage(1.0, 128, 4),), 8, 1e-2, ())
    monkeypatch.setattr(script, "TINY", recipe)
    monkeypatch.setattr(script, "LOG_EVERY", 1)
    monkeypatch.setattr(script, "training_text", script.held_out_text)  # reading all docstrings takes seconds
    return recipe


def test_interrupted_run_resumes_on_another_mesh(script, smallest, monkeypatch, tmp_path):
    out = tmp_path / "run"
    whole = script.main(["--config", "tiny", "--save-every", "4", "--out", str(out)])
    losses = np.asarray(whole["losses"])
    assert losses.shape == (8, 2)
    assert losses[-1, 1] < losses[0, 1] - 0.3

    checkpoints = out / "checkpoints"
    assert sorted(int(p.name) for p in checkpoints.iterdir()) == [4, 8]
    with pytest.raises(SystemExit, match="--resume"):
        script.main(["--config", "tiny", "--out", str(out)])

    # As if it had been stopped after step 4; it goes on over two texts x two ranks.
    (checkpoints / "8").rename(tmp_path / "gone")
    monkeypatch.setattr(script, "TINY", dataclasses.replace(smallest, checks=((128, 4),)))
    again = script.main(["--config", "tiny", "--data", "2", "--context", "2", "--resume", "--out", str(out)])
    np.testing.assert_array_equal(np.asarray(again["losses"])[:4], losses[:4])
    np.testing.assert_allclose(np.asarray(again["losses"])[4:], losses[4:], rtol=2e-4)

    assert {path.name for path in out.iterdir()} == {"checkpoints", "model", "loss.png", "metrics.json"}
    assert json.loads((out / "metrics.json").read_text())["retrieval"][0]["texts"] == 4
    assert Qwen3_5.from_pretrained(out / "model").dtype == jnp.bfloat16


def test_texts_of_a_step(script):
    stage = script.Stage(1.0, 200, 3)
    tokens, weights = script.texts(np.random.default_rng(0), stage, "some words " * 50)
    assert tokens.shape == weights.shape == (3, 200)
    for row, weight in zip(tokens, weights, strict=True):
        text = bytes(row[:-1].astype(np.uint8)).decode()
        key = text[-6:-1]
        assert key.isdigit() and text.endswith(f"What is the pass key? The pass key is {key}.")
        assert f"\n\nThe pass key is {key}. Remember it.\n\n" in text
        assert row[-1] == script.END
        assert weight[:-7].tolist() == [1] * 193
        assert weight[-7:].sum() == pytest.approx(0.5 * 200)


def test_stages_follow_progress(script):
    stages = (script.Stage(3, 1, 1), script.Stage(1, 2, 1))
    found = [script.stage_at(p, stages).length for p in (0, 0.7, 0.75, 0.9, 1)]
    assert found == [1, 1, 2, 2, 2]


@pytest.mark.slow
def test_any_mesh_trains_alike(script, standard_promotion, monkeypatch, tmp_path):
    """The tiny recipe as it is, on one device and with texts over two times four of them."""
    monkeypatch.setattr(script, "TINY", dataclasses.replace(script.TINY, checks=()))
    short = ["--config", "tiny", "--steps", "20", "--out"]
    here = script.main([*short, str(tmp_path / "here")])["losses"]
    spread = script.main([*short, str(tmp_path / "spread"), "--data", "2", "--context", "4"])["losses"]
    np.testing.assert_allclose(spread[0], here[0], rtol=1e-5)
    np.testing.assert_allclose(spread[1], here[1], rtol=1e-3)  # Adam's first steps amplify roundings
    assert here[-1][1] < here[0][1] - 1
