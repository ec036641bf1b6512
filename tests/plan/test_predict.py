"""Plans: what they add up, that they agree with what was measured, and what they choose."""

import dataclasses
import json

import pytest
from flax import nnx

from ring_jax import plan
from ring_jax._hardware import H100, H200
from ring_jax.cli import main
from ring_jax.data import passkey
from ring_jax.models.qwen3_5 import Config, Qwen3_5
from ring_jax.plan.machine import Machine
from ring_jax.plan.sizes import weights_of

# Before the gated delta rule had kernels: docs/measurements/model.md, 2026-11-25 and -26. GPU, model, tokens, ranks, pass, ms.
LOOPS = {
    "H100": dataclasses.replace(H100, gdn_chunk_seconds=None, gdn_backward=None),
    "H200": dataclasses.replace(H200, gdn_chunk_seconds=None, gdn_backward=None),
}
MEASURED = [
    ("H200", "qwen3.5-9b", 8192, 1, "prefill", 320.0),
    ("H200", "qwen3.5-9b", 32768, 1, "prefill", 1355.0),
    ("H100", "qwen3.5-9b", 8192, 1, "prefill", 336.0),
    ("H100", "qwen3.5-9b", 32768, 1, "prefill", 1402.0),
    ("H100", "qwen3.5-9b", 131072, 1, "prefill", 6781.0),
    ("H100", "qwen3.5-9b", 32768, 2, "prefill", 898.0),
    ("H100", "qwen3.5-9b", 131072, 2, "prefill", 4173.0),
    ("H100", "qwen3.5-0.8b", 2048, 1, "prefill", 30.1),
    ("H200", "qwen3.5-0.8b", 8192, 1, "train", 569.0),
    ("H200", "qwen3.5-4b", 8192, 1, "train", 1282.0),
]


# With kernels throughout: docs/measurements/2026-11-27_cards.md.
KERNELS = [
    ("h100", "qwen3.5-9b", 8192, 1, "prefill", 186.7),
    ("h100", "qwen3.5-9b", 32768, 1, "prefill", 826.0),
    ("h100", "qwen3.5-9b", 131072, 1, "prefill", 4367.0),
    ("h200", "qwen3.5-9b", 32768, 1, "prefill", 842.1),
    ("h200", "qwen3.5-9b", 131072, 1, "prefill", 4446.7),
    ("h200", "qwen3.5-9b", 32768, 2, "prefill", 441.6),
    ("h200", "qwen3.5-9b", 131072, 2, "prefill", 2324.7),
    ("h100", "qwen3.5-9b", 1024, 1, "decode", 6.19),
    ("h100", "qwen3.5-9b", 131072, 1, "decode", 7.85),
    ("h100", "qwen3.5-0.8b", 2048, 1, "decode", 1.127),
    ("h200", "qwen3.5-9b", 1024, 1, "decode", 4.64),
    ("h200", "qwen3.5-9b", 1024, 2, "decode", 5.44),
    ("h200", "qwen3.5-4b", 8192, 1, "train", 534.7),
]


@pytest.mark.parametrize("gpu, model, tokens, ranks, what, milliseconds", MEASURED + KERNELS)
def test_agrees_with_what_was_measured(gpu, model, tokens, ranks, what, milliseconds):
    found = plan.predict(
        model, tokens=tokens, mesh={"context": ranks}, gpu=LOOPS.get(gpu, gpu), gdn_strategy="head", strategy="ring"
    )
    one = getattr(found, what)
    seconds = one.seconds - one.terms.get("optimizer", 0.0)  # the bench takes loss and gradients alone
    assert 1e3 * seconds == pytest.approx(milliseconds, rel=0.15)


@pytest.mark.parametrize("tokens, measured", [(32768, 5.95), (131072, 22.2e9 / 2**30 + 0.2)])
def test_memory_agrees_with_what_was_measured(tokens, measured):
    """GiB beside weights and cache: a peak on an H200, and what XLA's compiler says for a described H100."""
    kinds = plan.predict("qwen3.5-9b", tokens=tokens).memory["prefill"].kinds
    assert kinds["activations"] / 2**30 == pytest.approx(measured, rel=0.15)


def test_weights_are_those_of_the_model():
    config = Config.preset("qwen3.5-35b-a3b")
    count = sum(x.get_value().size for _, x in nnx.to_flat_state(nnx.state(Qwen3_5(config, rngs=None), nnx.Param)))
    one = weights_of(config, Machine.of(None, "h100"), None, ())
    assert one.held == count
    over = Machine.of({"context": 8}, "h100")
    spread = weights_of(config, over, "context", ("context",))
    assert count / 8 <= spread.held < 1.01 * count / 8  # norms and gates stay whole
    assert spread.layers == one.layers and spread.routed == pytest.approx([x / 8 for x in one.routed])


def test_more_ranks_take_less_of_everything():
    plans = [plan.predict("qwen3.5-9b", tokens=1 << 20, mesh={"context": ranks}) for ranks in (2, 4, 8, 64)]
    for fewer, more in zip(plans[:-1], plans[1:], strict=True):
        assert more.prefill.seconds < fewer.prefill.seconds
        assert more.memory["prefill"].kinds["keys and values"] < fewer.memory["prefill"].kinds["keys and values"]
    assert plans[-1].prefill.traffic["network"] > 0 == plans[-2].prefill.traffic["network"]
    assert plans[-1].assumed and not plans[-2].assumed


def test_terms_add_up():
    found = plan.predict("qwen3.5-35b-a3b", tokens=1 << 17, mesh={"context": 8, "data": 2}, gpu="h200")
    for one in found.passes:
        assert sum(one.terms.values()) == pytest.approx(one.seconds)
        assert 0 <= one.hidden_share <= 1 and one.share_of_peak < 0.8
    assert found.choices["expert_strategy"][0] in ("gather", "ragged") and found.batch == 2
    assert found.prefill.tokens == 2 << 17
    assert str(found).count("memory") == 3 and "does not fit" not in str(found).lower()
    assert "prefill" in repr(found) and "<table>" in found._repr_html_()


def test_choices_are_those_of_auto():
    found = plan.predict("qwen3.5-9b", tokens=1 << 17, mesh={"context": 8})
    assert found.choices["gdn_strategy"][0] == "state" and "MiB" in found.choices["gdn_strategy"][1]
    asked = plan.predict("qwen3.5-9b", tokens=1 << 17, mesh={"context": 8}, strategy="ulysses", gdn_strategy="head")
    assert asked.choices["strategy"] == ("ulysses", "asked for") and asked.prefill.seconds > found.prefill.seconds


def test_what_does_not_fit_and_the_smallest_mesh_that_does():
    one = plan.predict("qwen3.5-27b", tokens=1 << 20, gpu="h100")
    assert not one.fits["prefill"] and "DOES NOT FIT" in str(one)
    mesh = plan.smallest_mesh("qwen3.5-27b", tokens=1 << 20, gpu="h100")
    assert mesh is not None and plan.predict("qwen3.5-27b", tokens=1 << 20, mesh=mesh).fits["prefill"]
    fewer = {"context": mesh["context"] // 2}
    assert not plan.predict("qwen3.5-27b", tokens=1 << 20, mesh=fewer).fits["prefill"]
    assert plan.smallest_mesh("qwen3.5-27b", tokens=1 << 20, most=1) is None


def test_axes_on_hosts():
    machine = Machine.of({"context": 8, "data": 8}, "h100")
    assert (machine.link("context"), machine.link("data"), machine.hosts) == ("NVLink", "network", 8)
    assert Machine.of({"tensor": 2, "context": 8}, "h100").link("context") == "network"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"mesh": {"ring": 8}}, "mesh"),
        ({"mesh": {"context": 0}}, "context"),
        ({"gpu": "b200"}, "gpu"),
        ({"strategy": "fast"}, "strategy"),
        ({"tokens": 0}, "tokens"),
        ({"mesh": {"tensor": 3}}, "does not divide"),
        ({"weights": "tensor"}, "weights"),
        ({"batch": -1}, "batch"),
    ],
)
def test_bad_arguments(change, words):
    with pytest.raises(ValueError, match=words):
        plan.predict("qwen3.5-9b", **({"tokens": 4096} | change))


def test_a_checkpoint_and_a_config_are_models_too():
    found = plan.predict(passkey.MODEL, tokens=16384, mesh={"context": 8})
    same = plan.predict(Config.from_hf(passkey.MODEL), tokens=16384, mesh={"context": 8})
    assert found.prefill.seconds == same.prefill.seconds and found.choices["gdn_strategy"][0] == "state"


def test_the_command(tmp_path, capsys):
    files = {name: tmp_path / f"plan.{name}" for name in ("json", "png")}
    options = ["--model", "qwen3.5-9b", "--tokens", "1M", "--mesh", "context=8,data=8", "--gpu", "h100"]
    assert main(["plan", *options, "--json", str(files["json"]), "--png", str(files["png"])]) == 0
    text = capsys.readouterr().out
    assert "64 H100 on 8 hosts" in text and "strategy: ring" in text and "prefill" in text
    found = json.loads(files["json"].read_text())
    assert found["mesh"] == {"data": 8, "context": 8} and set(found["passes"]) == {"prefill", "train", "decode"}
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert main(["plan", "--model", "qwen3.5-27b", "--tokens", "512K"]) == 0
    assert "prefill does not fit: the smallest mesh over which it does" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--tokens", "many"], ["--mesh", "context"], ["--mesh", "context=2,context=2"]])
def test_wrong_command_lines(options, capsys):
    with pytest.raises(SystemExit):
        main(["plan", *options])
    assert "usage: ring-jax plan" in capsys.readouterr().err


def test_wrong_values_have_no_traceback(capsys):
    assert main(["plan", "--mesh", "ring=8"]) == 2 and "mesh" in capsys.readouterr().err
    assert main(["plan", "--check"]) == 2 and "--check needs GPUs" in capsys.readouterr().err
