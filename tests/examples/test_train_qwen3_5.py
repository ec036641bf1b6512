"""The training script: it learns, spreads over a mesh, resumes, and writes a checkpoint with a tokenizer."""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.inference.tokenizer import Tokenizer
from ring_jax.models.qwen3_5 import Config, Qwen3_5
from tests.support.models import SMALLEST

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
    model = Config(**script.BYTES, **SMALLEST)
    recipe = script.Recipe(model, (script.Stage(1.0, 128, 4),), 8, 1e-2, ())
    monkeypatch.setattr(script, "TINY", recipe)
    monkeypatch.setattr(script, "LOG_EVERY", 1)
    monkeypatch.setattr(script, "training_text", script.held_out_text)  # reading all docstrings takes seconds
    return recipe


def test_a_signal_saves_and_the_run_resumes_on_another_mesh(script, smallest, monkeypatch, tmp_path):
    """Ended between two logged losses, a run that goes on logs what the undisturbed one did, for the same steps."""
    monkeypatch.setattr(script, "LOG_EVERY", 2)
    whole = script.main(["--config", "tiny", "--save-every", "4", "--out", str(tmp_path / "whole")])
    losses = np.asarray(whole["losses"])
    assert losses[:, 0].tolist() == [2, 4, 6, 8]
    assert losses[-1, 1] < losses[0, 1] - 0.3
    assert sorted(int(p.name) for p in (tmp_path / "whole" / "checkpoints").iterdir()) == [4, 8]
    with pytest.raises(SystemExit, match="--resume"):
        script.main(["--config", "tiny", "--out", str(tmp_path / "whole")])

    out, made = tmp_path / "run", []

    def interrupted(*args, texts=script.texts):
        made.append(args)
        if len(made) == 3:
            signal.raise_signal(signal.SIGTERM)
        return texts(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script, "texts", interrupted)
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped:
            script.main(["--config", "tiny", "--save-every", "100", "--out", str(out)])
        assert stopped.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["3"]

    # It goes on over two texts x two ranks.
    monkeypatch.setattr(script, "TINY", dataclasses.replace(smallest, checks=((128, 4),)))
    again = script.main(["--config", "tiny", "--data", "2", "--context", "2", "--resume", "--out", str(out)])
    np.testing.assert_array_equal(np.asarray(again["losses"])[:1], losses[:1])
    np.testing.assert_allclose(np.asarray(again["losses"]), losses, rtol=2e-4)

    assert {path.name for path in out.iterdir()} == {"checkpoints", "model", "loss.png", "metrics.json"}
    assert json.loads((out / "metrics.json").read_text())["retrieval"][0]["texts"] == 4
    model = Qwen3_5.from_pretrained(out / "model")
    assert model.dtype == jnp.bfloat16
    model.save_pretrained(tmp_path / "again")
    assert Tokenizer(tmp_path / "again").eos_token_ids == (script.END,)
    assert len(list((out / "checkpoints").iterdir())) == 3, "by default a tenth of the run lies between two"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--steps", "0"], "--steps: expected a number above 0, got 0"),
        (["--save-every", "-3"], "--save-every: expected a number above 0"),
        (["--learning-rate", "nan"], "--learning-rate: expected a number above 0, got nan"),
        (["--seed", "-1"], "--seed: expected a number from 0"),
        (["--data", "3", "--context", "5"], "need 15 devices, this machine has 8"),
        (["--config", "nowhere.json"], "--config nowhere.json: no config.json at nowhere.json"),
        (["--resume"], "no checkpoint to resume from"),
    ],
)
def test_refuses(script, options, match, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        script.main(["--out", str(tmp_path), *options])
    assert match in f"{error.value}{capsys.readouterr().err}"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_within_seconds(script, number, tmp_path):
    """As a user ends it, the second stage still being compiled: saved, no traceback, the usual exit status."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, str(SCRIPT), "--config", "tiny", "--out", str(tmp_path), "--save-every", "1"]
    run = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begin = time.monotonic()
    while not (tmp_path / "checkpoints" / "1").exists():
        assert run.poll() is None and time.monotonic() - begin < 300
        time.sleep(0.1)
    run.send_signal(number)
    sent = time.monotonic()
    _, errors = run.communicate(timeout=60)
    assert time.monotonic() - sent < 10
    assert run.returncode == 128 + number and "--resume" in errors and "Traceback" not in errors
    assert max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal()) >= 1


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
