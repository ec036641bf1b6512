"""Against transformers itself: new weights, longer texts, and checkpoints that travel both ways.

Needs the extra `parity`. `test_parity.py` checks the same mathematics from stored results, without torch.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="needs torch (extra `parity`)")
transformers = pytest.importorskip("transformers", reason="needs transformers (extra `parity`)")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="needs safetensors (extra `parity`)")

from ring_jax.models.qwen3_5 import Config, Qwen3_5  # noqa: E402
from tests.gdn.helpers import jit  # noqa: E402
from tests.models.qwen3_5 import hf, tiny  # noqa: E402
from tests.models.qwen3_5.harness import Spread, close, ranks  # noqa: E402

LAYERS, LENGTH = 8, 1000
# Router near-ties flip experts when sums are reordered: these seeds have none below MARGIN.
MARGIN, SEEDS = 1e-4, {"dense": 100, "moe": 100, "next": 114}
LONG_MOST, LONG_RELATIVE = 3e-4, 2e-5
SHARD = 100_000  # bytes; cuts the tiny models into several files


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def text(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, length, dtype=np.int32)


def tiny_checkpoint(folder: pathlib.Path, family: str, seed: int, layers: int = 4) -> pathlib.Path:
    config = tiny.config(family, layers=layers)
    return tiny.write(folder, config, tiny.weights(config, seed))


def our_logits(directory: pathlib.Path, tokens: np.ndarray, spread: Spread, dtype=None) -> np.ndarray:
    graph, state = nnx.split(Qwen3_5.from_pretrained(directory, sharding=spread.sharding(), dtype=dtype))
    run = jit(lambda state, tokens: nnx.merge(graph, state)(tokens).logits)
    return np.asarray(run(state, tokens[None]))[0]


@pytest.mark.parametrize(
    "family, count",
    [
        ("dense", 1),
        ("moe", 1),
        ("next", 1),
        *(pytest.param(family, 8, marks=pytest.mark.slow) for family in SEEDS),
    ],
)
def test_long_text(tmp_path, family, count):
    """8 layers, 1000 tokens, weights that no golden file has seen."""
    folder, tokens = tiny_checkpoint(tmp_path, family, SEEDS[family], LAYERS), text(SEEDS[family], LENGTH)
    wanted = hf.prefill(hf.load(folder), tokens)
    assert wanted.router_margin > MARGIN, f"take another seed, this one's margin is {wanted.router_margin:.1e}"
    close("logits", our_logits(folder, tokens, ranks(count)), wanted.logits, most=LONG_MOST, relative=LONG_RELATIVE)


@pytest.mark.parametrize("family", ["dense", "moe", "next", "head256"])
def test_loss_and_gradients(tmp_path, family):
    """Of every parameter; the routers' loss included. Gradients travel to our tree as a checkpoint does."""
    folder, tokens = tiny_checkpoint(tmp_path / "tiny", family, 0), text(2, 100)
    loss, gradients = hf.loss_and_gradients(hf.load(folder), tokens)
    wanted = Qwen3_5.from_pretrained(tiny.write(tmp_path / "gradients", tiny.config(family), gradients))
    graph, state = nnx.split(Qwen3_5.from_pretrained(folder))
    ours = jit(jax.value_and_grad(lambda state: nnx.merge(graph, state).loss(jnp.asarray(tokens)[None])))
    found_loss, found = ours(state)
    close("loss", found_loss, loss)
    for (path, a), (_, b) in zip(*(nnx.to_flat_state(x) for x in (found, nnx.state(wanted))), strict=True):
        close(f"gradient of {path}", a[...], b[...], most=None, relative=1e-4)


@pytest.mark.parametrize("shard", [SHARD, "1GB"])
@pytest.mark.parametrize("family", ["dense", "moe", "next", "head256"])
def test_checkpoint_of_transformers_loads(tmp_path, family, shard):
    """In one file and in several; every parameter is there, bit for bit."""
    model = hf.load(tiny_checkpoint(tmp_path / "tiny", family, 0))
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard)
    files = list((tmp_path / "saved").glob("*.safetensors"))
    assert len(files) == 1 if shard == "1GB" else len(files) > 2
    assert_equal_parameters(tmp_path / "saved", tmp_path / "tiny")


@pytest.mark.parametrize("family", ["dense", "moe"])
def test_multimodal_checkpoint_loads(tmp_path, family):
    """The wrapper's names, and a vision model that is left aside."""
    text_model = hf.load(tiny_checkpoint(tmp_path / "tiny", family, 0))
    wrapper = multimodal(family)
    wrapper.model.language_model.load_state_dict(text_model.model.state_dict())
    wrapper.lm_head.load_state_dict(text_model.lm_head.state_dict())
    wrapper.save_pretrained(tmp_path / "saved", max_shard_size=SHARD)
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert any(name.startswith("model.visual.") for name in index["weight_map"])
    assert_equal_parameters(tmp_path / "saved", tmp_path / "tiny")


def multimodal(family: str):
    prefix = {"dense": "Qwen3_5", "moe": "Qwen3_5Moe"}[family]
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}
    config = getattr(transformers, f"{prefix}Config")(text_config=tiny.config(family), vision_config=vision)
    return getattr(transformers, f"{prefix}ForConditionalGeneration")(config)


@pytest.mark.parametrize("shard", [SHARD, 1 << 30])
@pytest.mark.parametrize("family", ["dense", "moe", "next", "head256"])
def test_our_checkpoint_loads_in_transformers(tmp_path, family, shard):
    """Nothing missing, nothing unexpected, and the very same logits as from the original."""
    original = tiny_checkpoint(tmp_path / "tiny", family, 0)
    Qwen3_5.from_pretrained(original).save_pretrained(tmp_path / "saved", max_shard_size=shard)
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) > 1) == (shard == SHARD)
    tokens = text(0, 40)
    found, wanted = (hf.prefill(hf.load(folder), tokens) for folder in (tmp_path / "saved", original))
    np.testing.assert_array_equal(found.logits, wanted.logits)


@pytest.mark.parametrize("family", ["dense", "next"])
def test_bfloat16_travels_both_ways(tmp_path, family):
    """Bit for bit, and what has to stay float32 does."""
    model = hf.load(tiny_checkpoint(tmp_path / "tiny", family, 0), torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    ours = Qwen3_5.from_pretrained(tmp_path / "theirs")
    mixer = ours.groups.layers[0].mixer
    assert mixer.A_log.dtype == mixer.norm.dtype == jnp.float32
    assert ours.embed.dtype == mixer.in_proj.dtype == mixer.dt_bias.dtype == jnp.bfloat16
    ours.save_pretrained(tmp_path / "ours")
    back = hf.load(tmp_path / "ours", torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize("family", ["dense", "next"])
def test_bfloat16_model(tmp_path, family):
    """No further from float32 on the same weights than transformers' own bfloat16 model: KL and first choices."""
    hf.load(tiny_checkpoint(tmp_path / "tiny", family, 0), torch.bfloat16).save_pretrained(tmp_path / "half")
    tokens = text(1, 500)
    exact = hf.prefill(hf.load(tmp_path / "half", torch.float32), tokens).logits
    theirs = hf.prefill(hf.load(tmp_path / "half", torch.bfloat16), tokens).logits
    ours = our_logits(tmp_path / "half", tokens, ranks(1))
    assert divergence(exact, ours) <= 1.5 * divergence(exact, theirs)
    agreement = [np.mean(found.argmax(-1) == exact.argmax(-1)) for found in (ours, theirs)]
    assert agreement[0] >= agreement[1] - 0.02, agreement


def divergence(exact: np.ndarray, found: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of next-token distributions, nats."""
    exact, found = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (exact.astype(float), found.astype(float)))
    return float((np.exp(exact) * (exact - found)).sum(-1).mean())


def assert_equal_parameters(one: pathlib.Path, other: pathlib.Path) -> None:
    assert Config.from_hf(one) == Config.from_hf(other)
    found, wanted = (nnx.to_flat_state(nnx.state(Qwen3_5.from_pretrained(x), nnx.Param)) for x in (one, other))
    for (path, a), (_, b) in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))
