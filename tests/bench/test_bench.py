"""The benchmarks' own arithmetic, on a CPU: shares read from a trace, tables, what is searched; and one emulated run."""

import argparse
import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import pytest

from ring_jax.bench import attention, experts, flash_backward, flash_forward, gdn, gdn_cases, model, ring, trace
from ring_jax.cli import main
from ring_jax.flash.hopper.backward_common import default_config
from ring_jax.flash.hopper.config import SHARED_MEMORY_BYTES
from ring_jax.gdn import Heads
from ring_jax.models.qwen3_5 import Config

NCCL, PEER, KERNEL = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "MemcpyP2P", "flash_attention_forward"


def test_transfer_counts_as_hidden_while_the_gpu_computes():
    activity = trace.activity_of(
        "GPU:0", [(0, 4, KERNEL), (3, 5, NCCL), (6, 8, KERNEL), (7, 7.5, PEER), (4.5, 5.5, NCCL)]
    )
    assert activity.compute == ((0, 4), (6, 8)) and activity.transfer == ((3, 5.5), (7, 7.5))
    assert activity.hidden_share == pytest.approx(1.5 / 3)
    assert activity.transfer_share == pytest.approx(3 / activity.length)
    assert activity.idle_share == pytest.approx(0.5 / 8)
    facts = activity.summary()
    assert (facts["compute_ms"], facts["transfer_ms"]) == (6, 3)
    assert facts["kernels"][0] == {"name": KERNEL, "calls": 2, "ms": 6}


def test_copies_inside_one_gpu_are_no_transfer():
    activity = trace.activity_of("GPU:0", [(0, 1, "MemcpyD2D"), (1, 2, KERNEL)])
    assert activity.transfer == () and activity.hidden_share == 1


def test_a_trace_without_gpus_has_no_activity(tmp_path):
    assert trace.record(lambda: jnp.ones(3) + 1) == []


def test_kinds_of_kernels():
    names = {
        "gemm_fusion_dot_12": "matrix products", "nvjet_tst_192x192": "matrix products", "MemcpyD2D": "copies",
        "loop_dynamic_slice_fusion": "copies", "input_reduce_fusion_3": "reductions", "loop_add_fusion": "other fusions",
        KERNEL: "attention", NCCL: "transfers", "gated_delta_rule_forward": "gated delta rule", "void what()": "other kernels",
    }  # fmt: skip
    events = [(float(i), i + 0.5, name) for i, name in enumerate(names)]
    found = trace.activity_of("GPU:0", [*events, (20, 22, "nvjet_tst_64x8")]).by_kind()
    assert found.keys() == set(names.values())
    assert next(iter(found.items())) == ("matrix products", {"ms": 3.0, "alone_ms": 3.0, "calls": 3})
    both = trace.activity_of("GPU:0", [(0, 3, "MemcpyD2D"), (1, 2, KERNEL)]).by_kind()
    assert both["copies"]["alone_ms"] == 2 and both["attention"]["alone_ms"] == 0


def test_timeline_is_drawn(tmp_path):
    activities = [trace.activity_of(f"GPU:{i}", [(0, 2, KERNEL), (1, 3, NCCL)]) for i in range(2)]
    trace.draw(activities, tmp_path / "timeline.png", "two GPUs", (0, 3))
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_the_search_keeps_to_what_fits(head_size):
    forward = attention.tuned_forward(head_size)
    assert len(forward) > 3
    assert all(c.shared_memory_bytes(head_size, head_size) <= SHARED_MEMORY_BYTES for c in forward.values())
    for form, deterministic in flash_backward.FORMS.items():
        backward = attention.tuned_backward(head_size, form)
        found = flash_backward.candidates(head_size, backward, deterministic).values()
        assert len(found) > 3 and default_config(head_size, head_size, deterministic=deterministic) not in found


def test_table_beside_the_pull_requests(capsys):
    row = {"mask": "causal", "length": 16384, "ranks": 4, "speed_up": 3.25}
    ring.print_table([row, row | {"speed_up": 3.0}, row | {"length": 4096, "ranks": 2}])
    table = capsys.readouterr().out
    assert "| causal | 16384 | 4 | 1.54x | 3.25x |" in table and "| causal | 4096 | 2 | - | 3.25x |" in table


@pytest.mark.parametrize("bench", ["attention", "experts", "gdn", "model", "ring"])
def test_says_which_gpu_it_needs(bench, capsys):
    assert main(["bench", bench]) == 2
    assert "GPU" in capsys.readouterr().err


def test_alone_says_what_it_takes(monkeypatch):
    monkeypatch.setattr(ring.jax, "devices", lambda: [types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")])
    parser = argparse.ArgumentParser()
    ring.add_arguments(parser)
    reasons = {
        "": "at least two GPUs (one suffices for --alone), found 1 x NVIDIA H200",
        "--alone": "--alone needs --ranks",
        "--alone --ranks 4 --strategies pass_q": "of --strategies ring, all_gather or auto",
        "--alone --ranks 4 --table pr39875": "no --table",
    }
    for flags, reason in reasons.items():
        assert reason in ring.unavailable(parser.parse_args(flags.split()))
    assert ring.unavailable(parser.parse_args("--alone --ranks 4".split())) is None


def test_attention_bench_reports_every_case(monkeypatch, tmp_path, capsys):
    def rows(case, *_):
        case = dataclasses.asdict(case)
        ours = {"case": case, "name": "ours", "seconds": 1e-3, "tflops": 600.0, "ratio_to_cudnn": 1.2}
        return [ours | {"name": "base"}, {"case": case, "name": "cudnn", "failure": "no cuDNN here"}, ours]

    monkeypatch.setattr(attention, "matmul_tflops", lambda dtype: 800.0)
    monkeypatch.setattr(attention.flash_forward, "measure", rows)
    monkeypatch.setattr(attention.flash_backward, "measure", rows)
    parser = argparse.ArgumentParser()
    attention.add_arguments(parser)
    files = ["--json", str(tmp_path / "rows.json"), "--png", str(tmp_path / "bars.png")]
    assert (
        attention.run(parser.parse_args(["--lengths", "64", "--forms", "default", "repeatable", "--tune", *files])) == 0
    )
    out = capsys.readouterr().out
    assert "600 TFLOP/s, 75% of matmul, 1.20 of cuDNN" in out and "no cuDNN here" in out and "repeatable base" in out
    report = json.loads((tmp_path / "rows.json").read_text())
    assert {(row["what"], row["case"]["mask"]) for row in report["rows"]} == {
        (what, mask) for what in ("forward", "forward+backward") for mask in ("full", "causal")
    }
    assert report["matmul_tflops"] == 800 and report["environment"]["jax"] == jax.__version__
    assert (tmp_path / "bars.png").stat().st_size > 0


def test_flops_of_the_model():
    """Qwen3.5-9B, 8192 tokens, by hand."""
    width, tokens, mlp = 4096, 8192, 3 * 4096 * 12288
    linear = width * (2048 + 2048 + 4096 + 4096 + 32 + 32) + 4096 * width
    full = width * (2 * 4096 + 1024 + 1024) + 4096 * width
    products = 2 * tokens * (32 * mlp + 24 * linear + 8 * full)
    flops = products + 8 * 2 * tokens**2 * 4096 + 24 * 1.7e11 * tokens / 32768
    assert model.model_flops(Config.preset("qwen3.5-9b"), tokens) == pytest.approx(flops, rel=1e-3)  # norms, decays
    experts = model.sizes(Config.preset("qwen3.5-35b-a3b"))["groups.layers.0.mlp.down"]
    assert experts == 10 * 8 * 512 * 2048  # of ten groups the experts of one token


@pytest.mark.slow
def test_model_bench_on_a_small_model(monkeypatch, tmp_path, capsys):
    config = Config.preset("qwen3.5-0.8b")
    small = {"vocab_size": 64, "hidden_size": 32, "num_layers": 4, "layer_types": (), "num_heads": 2, "num_kv_heads": 1}
    small |= {"head_dim": 16, "linear": Heads(2, 2, 8, 8), "mlp_size": 32}
    monkeypatch.setitem(model.PRESETS, "qwen3.5-0.8b", dataclasses.replace(config, **small))
    parser = argparse.ArgumentParser()
    model.add_arguments(parser)
    flags = "--preset qwen3.5-0.8b --prefill --decode 201 --steps 2 --repeats 1 --profile"
    assert model.run(parser.parse_args([*flags.split(), "--json", str(tmp_path / "rows.json")])) == 0
    out = capsys.readouterr().out
    assert "relative error of the logits" in out and "decode" in out
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["what"] == "decode" and row["ms"] > 0 and row["gigabytes_read"] > 0 and row["share_of_bandwidth"] is None


def test_bytes_and_flops_of_a_gdn_layer():
    """1 x 32768 tokens, 16 / 32 heads of 128: figures of the published cost model (20 products a chunk, 64 x 64 x 128 each)."""
    case = gdn_cases.Case.parse("1x32768x32", 16, 128)
    rule, step = gdn_cases.rule(case, None), gdn_cases.decode_step(gdn_cases.Case(32, 1, case.heads))
    assert rule.flops == 8192 * 32768 * (4 * 16 + 16 * 32) and rule.bytes == pytest.approx(0.81e9, rel=0.01)
    assert step.bytes == 2 * 32 * 32 * 128 * 128 * 4 and step.calls == 2
    assert gdn_cases.convolution(case, False).bytes == 2 * 2 * 32768 * 8192


def test_what_tuning_tries_fits():
    case = gdn_cases.Case.parse("1x32768x32", 16, 128)
    names = [part.name for part in gdn_cases.tuned_rules(case)]
    assert len(names) == len(set(names)) > 20
    assert len(gdn_cases.tuned_decode_steps(case)) == 4 and len(gdn_cases.tuned_convolutions(case, True)) > 30
    forms = experts.tuned_forms(experts.Case(16)), experts.tuned_forms(experts.Case(32768))
    assert all(len(found) > 10 for found in forms) and not forms[0].keys() & forms[1].keys()


@pytest.mark.slow
def test_gdn_bench_on_emulated_devices(monkeypatch, tmp_path, capsys):
    times = {"kernels_ms": 1.0, "span_ms": 2.0, "each_ms": {"gated_delta_forward": 1.0}}
    monkeypatch.setattr(trace, "device_times", lambda call, repeats: (jax.block_until_ready(call()), times)[1])
    parser = argparse.ArgumentParser()
    gdn.add_arguments(parser)
    flags = ["--shapes", "2x130x4", "--key-heads", "2", "--head-size", "32", "--json", str(tmp_path / "rows.json")]
    parts = ["--only", "forward", "backward", "convolution", "--peer", "fla"]
    assert gdn.run(parser.parse_args([*flags, *parts])) == 0
    out = capsys.readouterr().out
    assert "forward + backward" in out and "1.0000 (2.0000) ms" in out and "NotImplementedError" in out and "fla" in out
    assert gdn.run(parser.parse_args([*flags, "--ranks", "2", "--layers", "2"])) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["one GPU", *(f"{way} over 2 GPUs" for way in ("batch", "head", "state"))]
    assert all(row["error"] < 1e-2 for row in rows[1:])


@pytest.mark.slow
def test_ring_bench_over_emulated_devices(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    ring.add_arguments(parser)
    flags = "--lengths 64 --ranks 2 --heads 2 --kv-heads 1 --head-size 16 --layers 2 --repeats 1 --gradients no --no-transfer"
    args = parser.parse_args([*flags.split(), "--strategies", "ring", "--json", str(tmp_path / "rows.json")])
    assert ring.run(args) == 0
    out = capsys.readouterr().out
    assert "worst relative error" in out and "one GPU" in out and "no transfer" in out
    assert (tmp_path / "rows.json").stat().st_size > 0
    alone = [
        *flags.replace("--ranks 2", "--ranks 4").split()[:-3],
        "--alone",
        "--strategies",
        "ring",
        "all_gather",
        "auto",
    ]
    assert ring.run(parser.parse_args(alone)) == 0
    out = capsys.readouterr().out
    assert all(f"one of 4 GPU(s), {name}, no transfer" in out for name in ("ring", "all_gather", "auto"))
    assert "forward+backward" in out
    # Left as it was found: the next program rotates again.
    text = jax.jit(ring.stack(ring.make_context(2, "ring"), True, 1, False)).lower(
        *ring.draw(ring.make_context(2, "ring"), 64, 2, 1, 16, 1)
    )
    assert "collective_permute" in text.as_text()


def test_turns_wait_for_a_peer_and_time_half_of_its_calls():
    waits, calls = [], []

    def call():
        calls.append(len(waits))
        return flash_forward.Queued(lambda: waits.append(len(calls)))

    found = flash_forward.seconds({"peer": call}, budget=1e-6, rounds=2)
    assert found["peer"] > 0
    # One call to compile, three to count how many fill the budget, then two rounds of three untimed and three timed ones.
    assert len(calls) == 1 + 3 + 2 * 2 * 3
    assert waits == [1, *[4] * 3, 7, 10, 13, 16]


def test_ratios_to_cudnn_and_a_peer_that_ran():
    rows = {"cudnn": {"tflops": 400.0}, "fa4": {"failure": "not here"}, "base": {"tflops": 500.0}}
    flash_forward.add_ratios(rows)
    assert flash_forward.ratios(rows["base"]) == "  / cudnn 1.250"
    rows["fa4"] = {"tflops": 625.0}
    flash_forward.add_ratios(rows)
    assert flash_forward.ratios(rows["base"]) == "  / cudnn 1.250  / fa4 0.800"
