"""Checkpoints under Hugging Face's names: every tensor where it belongs, read shard by shard, written back bit for bit."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import save_file

from ring_jax.models import checksums, publish
from ring_jax.models.qwen3_5.config import PRESETS, Config
from ring_jax.models.qwen3_5.hf import mapping, safetensors_io
from ring_jax.models.qwen3_5.hf import save as saving
from ring_jax.models.qwen3_5.hf.load import checkpoint_dtype, load
from ring_jax.models.qwen3_5.hf.safetensors_io import Meter
from ring_jax.models.qwen3_5.hf.save import save
from ring_jax.models.qwen3_5.modeling import Qwen3_5
from tests.models.qwen3_5 import tiny

FAMILIES = ("dense", "moe", "next", "head256")
BF16 = ml_dtypes.bfloat16
FLOAT32 = re.compile(r"linear_attn\.(A_log|norm\.weight)$")


def checkpoint(directory, family="dense", dtype=np.float32, layers=8):
    """A checkpoint of one file, as transformers would write it: its config, directory and tensors."""
    hf = tiny.config(family, layers=layers)
    held = tiny.weights(hf, seed=3)
    held = {name: x if FLOAT32.search(name) else x.astype(dtype) for name, x in held.items()}
    write(directory, hf, held)
    return Config.from_hf(hf), directory, held


def write(directory, hf, held, file="model.safetensors"):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf))
    save_file({name: np.ascontiguousarray(x) for name, x in held.items()}, directory / file, metadata={"format": "pt"})


def read(directory):
    held = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            assert file.metadata()["format"] == "pt"
            held |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return held


def expected(hf, held):
    """The model's tree, by plain transposition of whole tensors."""
    period = next(p for p in range(1, 9) if hf["layer_types"] == hf["layer_types"][:p] * (len(hf["layer_types"]) // p))
    layers = [layer_params(hf, held, n) for n in range(hf["num_hidden_layers"])]
    stacked = {i: jax.tree.map(lambda *x: np.stack(x), *layers[i::period]) for i in range(period)}
    tree = {"embed": held["model.embed_tokens.weight"], "final_norm": held["model.norm.weight"]}
    if not hf["tie_word_embeddings"]:
        tree["lm_head"] = held["lm_head.weight"].T
    return tree | {"groups": {"layers": stacked}}


def layer_params(hf, held, n):
    t = {
        name.removeprefix(f"model.layers.{n}."): x for name, x in held.items() if name.startswith(f"model.layers.{n}.")
    }
    mixer = attention(hf, t) if hf["layer_types"][n] == "full_attention" else linear_attention(hf, t)
    mlp = experts(t) if "num_experts" in hf else {"gate_up": pair(t, "mlp."), "down": t["mlp.down_proj.weight"].T}
    norms = {"input_norm": t["input_layernorm.weight"], "post_norm": t["post_attention_layernorm.weight"]}
    return norms | {"mixer": mixer, "mlp": mlp}


def pair(t, prefix):
    return np.stack([t[f"{prefix}gate_proj.weight"].T, t[f"{prefix}up_proj.weight"].T], axis=-2)


def attention(hf, t):
    heads = hf["num_key_value_heads"]
    in_proj = by_head(heads, *(t[f"self_attn.{x}_proj.weight"] for x in "qkv"))
    norms = {f"{x}_norm": t[f"self_attn.{x}_norm.weight"] for x in "qk"}
    return norms | {"in_proj": in_proj, "o": t["self_attn.o_proj.weight"].T}


def by_head(heads, *rows):
    """Projections [out, in] as one [in, out], its columns head by head."""
    width = rows[0].shape[-1]
    return np.concatenate([x.reshape(heads, x.shape[0] // heads, width) for x in rows], axis=1).reshape(-1, width).T


def linear_attention(hf, t):
    t = {name.removeprefix("linear_attn."): x for name, x in t.items()}
    nk, nv = hf["linear_num_key_heads"], hf["linear_num_value_heads"]
    dk, dv, r, width = hf["linear_key_head_dim"], hf["linear_value_head_dim"], nv // nk, hf["hidden_size"]
    cuts = [nk * dk, 2 * nk * dk]
    if "in_proj_qkvz.weight" in t:
        grouped = t["in_proj_qkvz.weight"].reshape(nk, 2 * dk + 2 * r * dv, width)
        parts = np.split(grouped, [dk, 2 * dk, 2 * dk + r * dv], axis=1)
        b, a = np.split(t["in_proj_ba.weight"].reshape(nk, 2 * r, width), 2, axis=1)
        rows = dict(zip("qkvzba", (x.reshape(-1, width) for x in (*parts, b, a)), strict=True))
    else:
        rows = dict(zip("qkv", np.split(t["in_proj_qkv.weight"], cuts), strict=True))
        rows |= {x: t[f"in_proj_{x}.weight"] for x in "zba"}
    conv = np.split(t["conv1d.weight"][:, 0], cuts)
    unused = -(2 * dk + 2 * r * dv + 2 * r) % 8  # zeros up to a multiple of eight
    in_proj = by_head(nk, *(rows[x] for x in "qkvzba"), np.zeros((nk * unused, width), t["dt_bias"].dtype))
    return {f"conv_{x}": w.T for x, w in zip("qkv", conv, strict=True)} | {
        "in_proj": in_proj,
        "A_log": t["A_log"],
        "dt_bias": t["dt_bias"],
        "norm": t["norm.weight"],
        "o": t["out_proj.weight"].T,
    }


def experts(t):
    if "mlp.experts.gate_up_proj" in t:
        gate, up = np.split(t["mlp.experts.gate_up_proj"], 2, axis=1)
        gate_up = np.stack([gate, up], axis=-1).transpose(0, 2, 3, 1)
        down = t["mlp.experts.down_proj"].transpose(0, 2, 1)
    else:
        count = sum(name.endswith(".gate_proj.weight") and ".experts." in name for name in t)
        gate_up = np.stack([pair(t, f"mlp.experts.{e}.") for e in range(count)])
        down = np.stack([t[f"mlp.experts.{e}.down_proj.weight"].T for e in range(count)])
    return {
        "router": t["mlp.gate.weight"].T,
        "gate_up": gate_up,
        "down": down,
        "shared_gate_up": pair(t, "mlp.shared_expert."),
        "shared_down": t["mlp.shared_expert.down_proj.weight"].T,
        "shared_gate": t["mlp.shared_expert_gate.weight"][0],
    }


def assert_same(got, want):
    """Equal trees: same paths, shapes, dtypes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)

    def compare(path, x, y):
        x, where = np.asarray(x), jax.tree_util.keystr(path)
        assert (x.shape, x.dtype) == (y.shape, y.dtype), where
        assert x.tobytes() == np.ascontiguousarray(y).tobytes(), where

    jax.tree_util.tree_map_with_path(compare, got, want)


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values(tmp_path, family, dtype):
    config, directory, held = checkpoint(tmp_path / "hf", family, dtype)
    params = load(directory, config)
    assert_same(params, expected(tiny.config(family, layers=8), held))
    assert all(not x.committed for x in jax.tree.leaves(params))


def test_odd_patterns_and_one_group(tmp_path):
    """A pattern of another length than four: the groups follow the config's period."""
    hf = tiny.config("dense", layers=6) | {
        "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2
    }
    held = tiny.weights(hf, seed=1)
    write(tmp_path / "three", hf, held)
    assert_same(load(tmp_path / "three", Config.from_hf(hf)), expected(hf, held))


def test_wrapper_index_and_other_spellings(tmp_path):
    """Files and names as published: the text model inside the wrapper, vision and MTP parts beside it, two files."""
    config, _, held = checkpoint(tmp_path / "plain", "moe")
    wrapped = {re.sub(r"^model\.", "model.language_model.", name): x for name, x in held.items()}
    extra = {"model.visual.blocks.0.attn.qkv.weight": np.ones((2, 2), np.int8), "mtp.fc.weight": np.ones(3, np.float16)}
    halves = [dict(list(wrapped.items())[::2]) | extra, dict(list(wrapped.items())[1::2])]
    files = [f"model.safetensors-{i + 1:05}-of-00002.safetensors" for i in range(2)]
    for file, half in zip(files, halves, strict=True):
        write(tmp_path / "wrapped", {}, half, file)
    index = {"metadata": {}, "weight_map": {n: f for f, half in zip(files, halves, strict=True) for n in half}}
    (tmp_path / "wrapped" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(load(tmp_path / "wrapped", config), expected(tiny.config("moe", layers=8), held))

    # Qwen3-Next with stacked experts, as conversions write it.
    config, _, held = checkpoint(tmp_path / "single", "next")
    stacked = {name: x for name, x in held.items() if ".experts." not in name}
    for n in range(8):
        for kind, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            single = [[held[f"model.layers.{n}.mlp.experts.{e}.{x}_proj.weight"] for x in parts] for e in range(8)]
            stacked[f"model.layers.{n}.mlp.experts.{kind}"] = np.stack([np.concatenate(x) for x in single])
    write(tmp_path / "stacked", {}, stacked)
    assert_same(load(tmp_path / "stacked", config), expected(tiny.config("next", layers=8), held))


def mesh_of(kind, shape=(4, 2)):
    return jax.make_mesh(shape, ("context", "tensor"), axis_types=(kind, kind))


def spread(shape, stacked):
    """Specs that split the first two dimensions that divide, last first, over both axes: no rule of a model."""
    entries, axes = [None] * len(shape), [("tensor", 2), ("context", 4)]
    for d in reversed(range(stacked, len(shape))):
        if axes and shape[d] % axes[-1][1] == 0:
            entries[d] = axes.pop()[0]
    return P(*entries)


def spread_specs(config):
    plan, specs = mapping.plan(config), {}
    for path, shape in plan.params.items():
        tree = specs
        for key in path[:-1]:
            tree = tree.setdefault(key, {})
        tree[path[-1]] = spread(shape, path[0] == "groups")
    return specs


def shard_bytes(params, itemsize):
    """Bytes of the largest shard of any parameter, in a file of `itemsize`."""
    return max(math.prod(x.sharding.shard_shape(x.shape)) * itemsize for x in jax.tree.leaves(params))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("family", ["moe", "next"])
def test_shards(tmp_path, family, kind):
    config, directory, held = checkpoint(tmp_path / "hf", family)
    mesh, specs, meter = mesh_of(kind), spread_specs(config), Meter()
    params = load(directory, config, specs, mesh, meter=meter)
    assert_same(params, expected(tiny.config(family, layers=8), held))
    jax.tree.map(lambda x, spec: _assert_sharding(x, NamedSharding(mesh, spec)), params, specs)
    # Each byte is read once, and no more than one device's part of one parameter waits.
    assert meter.total == sum(x.nbytes for x in held.values())
    assert meter.waiting == 0 and 0 < meter.peak <= shard_bytes(params, 4)

    save(params, config, tmp_path / "again")
    assert_same(read(tmp_path / "again"), held)


def _assert_sharding(x, sharding):
    assert x.sharding == sharding
    for shard in x.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.asarray(x)[shard.index])


@pytest.mark.parametrize("replicated", [True, False], ids=["replicated", "one_device"])
def test_bytes_on_the_host(tmp_path, replicated):
    """Read and not yet on a device: at most one stacked parameter, though the model is many times that."""
    config, directory, held = checkpoint(tmp_path / "hf", "moe")
    meter, where = Meter(), ()
    if replicated:
        where = (
            jax.tree.map(lambda _: P(), spread_specs(config), is_leaf=lambda x: isinstance(x, P)),
            mesh_of(AxisType.Auto),
        )
    params = load(directory, config, *where, meter=meter)
    largest = max(x.nbytes for x in jax.tree.leaves(params))
    total = sum(x.nbytes for x in held.values())
    assert meter.peak == largest < total / 8
    assert meter.total == total, "devices with the same part share one reading"


def test_only_the_needed_slices_are_read(tmp_path, monkeypatch):
    """A process that holds half of the devices reads half of what lies over them."""
    config, directory, held = checkpoint(tmp_path / "hf", "dense")
    mesh, specs, meter = mesh_of(AxisType.Auto), spread_specs(config), Meter()
    mine = set(mesh.devices[:2].flat)
    everywhere = NamedSharding.addressable_devices_indices_map
    made = []
    monkeypatch.setattr(
        NamedSharding,
        "addressable_devices_indices_map",
        lambda self, shape: {d: i for d, i in everywhere(self, shape).items() if d in mine},
    )
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", lambda *args: made.append(args[2]) or np.zeros(1))
    load(directory, config, specs, mesh, meter=meter)
    assert sum(x.nbytes for shards in made for x in shards) == sum(
        2 * 2 * math.prod(NamedSharding(mesh, mapping.at(specs, path, "specs")).shard_shape(shape)) * 4
        for path, shape in mapping.plan(config).params.items()
    )
    assert meter.total < 0.6 * sum(x.nbytes for x in held.values())


def test_dtypes(tmp_path):
    config, directory, held = checkpoint(tmp_path / "hf", "moe", BF16)
    params = load(directory, config, dtype=jnp.float32)
    want = jax.tree.map(lambda x: x.astype(np.float32), expected(tiny.config("moe", layers=8), held))
    assert_same(params, want)
    # A checkpoint that keeps nothing in float32, as Qwen3-Next is published; loaded in bfloat16 ours does.
    write(tmp_path / "half", {}, {name: x.astype(BF16) for name, x in held.items()})
    for directory in (tmp_path / "half", tmp_path / "hf"):
        kinds = {
            k: str(x.dtype)
            for k, x in load(directory, config, dtype="bfloat16")["groups"]["layers"][0]["mixer"].items()
        }
        assert {k for k, kind in kinds.items() if kind == "float32"} == {"A_log", "norm"}
        assert set(kinds.values()) == {"float32", "bfloat16"}
    with pytest.raises(ValueError, match="dtype must be a floating-point dtype .*, got int32"):
        load(directory, config, dtype=jnp.int32)
    write(tmp_path / "quantised", {}, held | {"model.embed_tokens.weight": np.ones((256, 64), np.int8)})
    with pytest.raises(ValueError, match="model.embed_tokens.weight is I8 in .*quantised: expected it as BF16"):
        checkpoint_dtype(tmp_path / "quantised")
    assert checkpoint_dtype(tmp_path / "hf") == BF16
    with pytest.raises(ValueError, match="specs and mesh belong together"):
        load(directory, config, spread_specs(config))


def test_tied_embeddings(tmp_path):
    config, directory, held = checkpoint(tmp_path / "hf", "head256", layers=4)
    assert config.tie_embeddings and "lm_head" not in load(directory, config)
    head = held["model.embed_tokens.weight"].copy()
    write(tmp_path / "equal", {}, held | {"lm_head.weight": head})
    assert "lm_head" not in load(tmp_path / "equal", config)
    head[-1, -1] += 1
    write(tmp_path / "unequal", {}, held | {"lm_head.weight": head})
    with pytest.raises(ValueError, match="not equal to the embedding, though the config ties them: lm_head.weight"):
        load(tmp_path / "unequal", config)


def test_all_problems_in_one_error(tmp_path):
    config, _, held = checkpoint(tmp_path / "hf", "dense", layers=4)
    broken = dict(held)
    del broken["model.norm.weight"], broken["model.layers.0.linear_attn.A_log"]
    broken["model.layers.3.self_attn.q_proj.weight"] = np.zeros((5, 64), np.float32)
    broken["model.layers.1.mlp.up_proj.weight"] = np.zeros((128, 64), np.int8)
    broken["model.layers.4.mlp.up_proj.weight"] = np.zeros((128, 64), np.float32)
    broken["model.language_model.layers.2.mlp.up_proj.weight"] = held["model.layers.2.mlp.up_proj.weight"]
    write(tmp_path / "broken", {}, broken)
    with pytest.raises(ValueError) as error:
        load(tmp_path / "broken", config)
    message = str(error.value)
    for part in (
        "2 missing: model.norm.weight (64,), model.layers.0.linear_attn.A_log (4,)",
        "2 unexpected: model.layers.4.mlp.up_proj.weight (128, 64), ",
        "model.layers.3.self_attn.q_proj.weight (5, 64), expected (256, 64)",
        "1 of another dtype: model.layers.1.mlp.up_proj.weight I8",
        str(tmp_path / "broken"),
    ):
        assert part in message, message
    with pytest.raises(ValueError, match=r"\.\.\. and \d+ more"):  # the message stays readable
        load(tmp_path / "hf", Config.from_hf(tiny.config("dense", layers=40)))


@pytest.mark.parametrize("keep", [4, 200, -1000], ids=["no_header", "half_a_header", "truncated"])
def test_damaged_files(tmp_path, keep):
    config, directory, _ = checkpoint(tmp_path / "hf", "dense", layers=4)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ValueError, match=f"{re.escape(str(path))} .* is not a whole safetensors file .* fetch it again"
    ):
        load(directory, config)


def test_files_that_are_not_there(tmp_path):
    config, directory, held = checkpoint(tmp_path / "hf", "dense", layers=4)
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*nowhere.* found no such directory"):
        load(tmp_path / "nowhere", config)
    os.rename(directory / "model.safetensors", directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="expected model.safetensors .*pytorch_model.bin"):
        load(directory, config)
    index = directory / "model.safetensors.index.json"
    for text, match in {
        "{": "index.json is not valid JSON",
        "{}": "index.json is damaged, it holds no weight_map",
        '{"weight_map": 3}': "index.json: weight_map must be a JSON object, got 3",
        '{"weight_map": {"model.norm.weight": 3}}': "weight_map: model.norm.weight must be text, got 3",
    }.items():
        index.write_text(text)
        with pytest.raises(ValueError, match=match):
            load(directory, config)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(held, "absent.safetensors")}))
    with pytest.raises(FileNotFoundError, match="absent.safetensors is missing, though .* names it"):
        load(directory, config)
    write(directory, {}, {"other": np.ones(2, np.float32)}, "absent.safetensors")
    with pytest.raises(ValueError, match="absent.safetensors lacks .* tensors that .* says it holds"):
        load(directory, config)


@pytest.mark.parametrize("size", [4 * 10**9, 100_000], ids=["one_file", "several"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(tmp_path, family, size):
    config, directory, held = checkpoint(tmp_path / "hf", family, BF16)
    save(load(directory, config), config, tmp_path / "ours", max_shard_size=size)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert_same(read(tmp_path / "ours"), held)
    assert_same(load(tmp_path / "ours", config), expected(tiny.config(family, layers=8), held))
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert Config.from_hf(tmp_path / "ours") == config and written["dtype"] == "bfloat16"
    assert written["architectures"][0].endswith("ForCausalLM")
    if size > 10**9:
        assert [x.name for x in files] == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in held.values())
        assert set(index["weight_map"]) == set(held) and set(index["weight_map"].values()) == {x.name for x in files}
        assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    for path in files:  # readers map the bytes: every tensor lies at a multiple of its item size
        raw = path.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        for name, entry in header.items():
            if name != "__metadata__":
                assert entry["data_offsets"][0] % {"BF16": 2, "F32": 4}[entry["dtype"]] == 0


def test_save_refuses(tmp_path):
    config, directory, _ = checkpoint(tmp_path / "hf", "dense", layers=4)
    params = load(directory, config)
    with pytest.raises(FileExistsError, match="holds a checkpoint: .* overwrite=True"):
        save(params, config, directory)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="no checkpoint to replace"):
        save(params, config, tmp_path / "home", overwrite=True)
    with pytest.raises(FileExistsError, match="is a file"):
        save(params, config, tmp_path / "home" / "thesis.tex", overwrite=True)
    with pytest.raises(ValueError, match="params lack groups.layers.4"):
        save(params, Config.from_hf(tiny.config("dense", layers=5)), tmp_path / "new")
    with pytest.raises(ValueError, match=r"parameter final_norm has shape \(1,\), expected \(64,\)"):
        save(params | {"final_norm": jnp.ones(1)}, config, tmp_path / "new")
    with pytest.raises(ValueError, match="parameter final_norm is int32: checkpoints hold"):
        save(params | {"final_norm": jnp.ones(64, jnp.int32)}, config, tmp_path / "new")
    with pytest.raises(ValueError, match="max_shard_size must be >= 1, got 0"):
        save(params, config, tmp_path / "new", max_shard_size=0)
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        save(params, config, tmp_path / "new", tokenizer_from=tmp_path)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["hf", "home"]


def test_tokenizer_files_travel_and_others_stay(tmp_path):
    config, directory, _ = checkpoint(tmp_path / "hf", "dense", layers=4)
    params = load(directory, config)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "README.md").write_text("of the source")
    save(params, config, tmp_path / "deep" / "ours", tokenizer_from=directory, max_shard_size=50_000)
    assert (tmp_path / "deep" / "ours" / "tokenizer.json").exists()
    assert not (tmp_path / "deep" / "ours" / "README.md").exists()
    (tmp_path / "deep" / "ours" / "notes").mkdir()
    (tmp_path / "deep" / "ours" / "notes" / "a.txt").write_text("mine")
    save(params, config, tmp_path / "deep" / "ours", overwrite=True)
    assert sorted(str(x.relative_to(tmp_path / "deep")) for x in (tmp_path / "deep").rglob("*") if x.is_file()) == [
        *(f"ours/{name}" for name in ("config.json", "model.safetensors", "notes/a.txt", "tokenizer.json"))
    ]


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    config, directory, held = checkpoint(tmp_path / "hf", "dense", layers=4)
    params = load(directory, config)
    newer = jax.tree.map(lambda x: 2 * x, params)

    fetched = []

    def stops(array, group, fetch=saving._fetch):
        fetched.append(1)
        if len(fetched) > 20:
            raise KeyboardInterrupt
        return fetch(array, group)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "_fetch", stops)
        with pytest.raises(KeyboardInterrupt):
            save(newer, config, directory, overwrite=True)
    assert_same(read(directory), held)
    assert [x.name for x in tmp_path.iterdir()] == ["hf"]


class Killed(BaseException):
    """The process ends here: nothing is cleaned up, because `rmtree` and the rename back are dead too."""


@contextlib.contextmanager
def killed_before_rename(monkeypatch, nth):
    calls = []

    def dies(*args, rename=os.rename):
        calls.append(args)
        if len(calls) >= nth:
            raise Killed
        return rename(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dies)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(Killed):
            yield


def test_killed_between_any_two_renames(tmp_path, monkeypatch):
    """Loading finds the old checkpoint whole or the new one whole, never neither; the next save clears up."""
    config, directory, _ = checkpoint(tmp_path / "hf", "dense", layers=4)
    params = load(directory, config)
    newer = jax.tree.map(lambda x: 2 * x, params)
    (directory / "notes.txt").write_text("mine")
    # Renames: the new folder to its name (the old one lies in the way), what an earlier round moved aside out of the way
    # (nothing), the old one aside, the new one again.
    # Then the new one is in place, and the old one not yet removed.
    for nth in (1, 2, 3, 4, 5):
        place = tmp_path / str(nth) / "hf"
        shutil.copytree(directory, place)
        with killed_before_rename(monkeypatch, nth):
            save(newer, config, place, overwrite=True)
        assert place.exists() == (nth != 4)
        assert Config.from_hf(place) == config and place.exists()
        assert_same(load(place, config), jax.tree.map(np.asarray, newer if nth == 5 else params))
        assert (place / "notes.txt").read_text() == "mine"
        with pytest.raises(FileExistsError, match="overwrite=True"):
            save(params, config, place)
        save(newer, config, place, overwrite=True)
        assert_same(load(place, config), jax.tree.map(np.asarray, newer))
        assert (place / "notes.txt").read_text() == "mine"
        assert [x.name for x in place.parent.iterdir()] == ["hf"]
    # A first save that is killed leaves no checkpoint.
    with killed_before_rename(monkeypatch, 1):
        save(newer, config, tmp_path / "first")
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*first"):
        load(tmp_path / "first", config)


def test_the_gap_on_a_file_system_that_is_read_only(tmp_path, monkeypatch):
    config, directory, held = checkpoint(tmp_path / "hf", "dense", layers=4)
    params = load(directory, config)
    with killed_before_rename(monkeypatch, 4):
        save(jax.tree.map(lambda x: 2 * x, params), config, directory, overwrite=True)

    def refuses(*_):
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(os, "rename", refuses)
    assert not directory.exists()
    assert_same(load(directory, Config.from_hf(directory)), jax.tree.map(np.asarray, params))


def test_two_savers_of_one_path(tmp_path, monkeypatch):
    """One is in the midst of writing when the other saves: each writes in a folder of its own, the last one wins whole."""
    config, directory, _ = checkpoint(tmp_path / "hf", "dense", layers=4)
    params = load(directory, config)
    first, second = (jax.tree.map(lambda x, by=by: x * by, params) for by in (2, 3))
    written = []

    def meets(path, headers, values, write=safetensors_io.write):
        written.append(path)
        if len(written) == 2:
            save(second, config, directory, overwrite=True, max_shard_size=100_000)
            assert_same(load(directory, config), jax.tree.map(np.asarray, second))
        write(path, headers, values)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_io, "write", meets)
        save(first, config, directory, overwrite=True, max_shard_size=100_000)
    assert len({path.parent for path in written}) == 2
    assert_same(load(directory, config), jax.tree.map(np.asarray, first))

    # Neither wants to replace anything: the slower one is told, and nothing of it stays.
    def arrives(space, target, overwrite, tokenizer, publish=saving._publish):
        monkeypatch.setattr(saving, "_publish", publish)
        save(second, config, tmp_path / "new")
        publish(space, target, overwrite, tokenizer)

    monkeypatch.setattr(saving, "_publish", arrives)
    with pytest.raises(FileExistsError, match="holds a checkpoint"):
        save(first, config, tmp_path / "new")
    assert_same(load(tmp_path / "new", config), jax.tree.map(np.asarray, second))
    assert sorted(x.name for x in tmp_path.iterdir()) == ["hf", "new"]


def test_a_living_saver_keeps_its_folder(tmp_path):
    with publish.workspace(tmp_path, "a") as one, publish.workspace(tmp_path, "a") as other:
        assert one != other and one.is_dir() and other.is_dir()
    assert not list(tmp_path.iterdir())


SAVES = """
    import sys, jax
    from tests.models.qwen3_5 import test_pretrained as t
    config = t.Config.from_hf(sys.argv[1])
    params = jax.tree.map(lambda x: x * 0 + int(sys.argv[3]), t.load(sys.argv[1], config))
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(10):
        t.save(params, config, sys.argv[2], overwrite=True, max_shard_size=100_000)
"""


@pytest.mark.slow
def test_two_processes_save_one_path(tmp_path):
    config, directory, _ = checkpoint(tmp_path / "hf", "dense", layers=4)
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    args = [
        [sys.executable, "-c", textwrap.dedent(SAVES), str(directory), str(tmp_path / "out"), str(i)] for i in (1, 2)
    ]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(a, env=env, **pipes) for a in args]
    assert [run.stdout.readline() for run in runs] == ["ready\n"] * 2
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    while any(run.poll() is None for run in runs):
        if (tmp_path / "out").exists():
            try:
                values = {float(x.ravel()[0]) for x in jax.tree.leaves(load(tmp_path / "out", config))}
            except (FileNotFoundError, ValueError):  # the next one came while this one was read
                continue
            assert len(values) == 1, values
    for run in runs:
        run.communicate()
    assert [run.returncode for run in runs] == [0, 0]
    values = {float(v) for x in jax.tree.leaves(load(tmp_path / "out", config)) for v in np.unique(x)}
    assert values in ({1.0}, {2.0})
    assert sorted(x.name for x in tmp_path.iterdir()) == ["hf", "out"]


def test_the_index_decides(tmp_path):
    """A stale shard holds other values of a tensor; the index names the file that counts, in either order of names."""
    config, directory, held = checkpoint(tmp_path / "hf", "dense", layers=4)
    want = expected(tiny.config("dense", layers=4), held)
    name, stale = "model.norm.weight", held["model.norm.weight"] + 5
    for good, bad in (("a", "b"), ("b", "a")):
        folder = tmp_path / f"index_{good}"
        files = {x: f"model-{x}.safetensors" for x in "ab"}
        others = {n: x for n, x in held.items() if n != name}
        write(folder, {}, {name: held[name]}, files[good])
        write(folder, {}, {name: stale} | others, files[bad])
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": dict.fromkeys(others, files[bad]) | {name: files[good]}}))
        assert_same(load(folder, config), want)
    # A whole checkpoint in one file beside it: no guess which of the two is the stale one.
    write(folder, {}, held)
    with pytest.raises(ValueError, match="holds two checkpoints, model.safetensors and the files"):
        load(folder, config)
    index.unlink()
    assert_same(load(folder, config), want)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "..", "", "sub/model.safetensors", "a\0b"])
def test_an_index_stays_in_its_directory(tmp_path, file):
    config, _, held = checkpoint(tmp_path / "hf", "dense", layers=4)
    write(tmp_path, {}, held, "secret.safetensors")
    write(tmp_path / "hf" / "sub", {}, held)
    os.rename(tmp_path / "hf" / "model.safetensors", tmp_path / "hf" / "a.safetensors")
    index = {"weight_map": dict.fromkeys(held, "a.safetensors") | {"model.norm.weight": file}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model.norm.weight must lie in a file beside the index, got"):
        load(tmp_path / "hf", config)


def test_foreign_weights_stay(tmp_path):
    config, directory, _ = checkpoint(tmp_path / "hf", "dense", layers=4)
    params = load(directory, config)
    # A folder of adapters that never held a model is none to replace.
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weeks of work")
    for also in ("README.md", "config.json"):
        with pytest.raises(FileExistsError, match="no checkpoint to replace"):
            save(params, config, tmp_path / "adapter", overwrite=True)
        (tmp_path / "adapter" / also).write_text("{}")
    # Beside a model, all that is not its own stays; its own goes, by whatever name its index has for it.
    ours = tmp_path / "ours"
    save(params, config, ours, max_shard_size=100_000)
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    shard = index["weight_map"]["model.norm.weight"]
    os.rename(ours / shard, ours / "first.safetensors")
    index["weight_map"] = {n: f.replace(shard, "first.safetensors") for n, f in index["weight_map"].items()}
    (ours / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(load(ours, config), jax.tree.map(np.asarray, params))
    foreign = ("adapter_model.safetensors", "consolidated.safetensors", "model.fp16.safetensors", "notes.txt")
    for name in foreign:
        (ours / name).write_text(name)
    (ours / "link").symlink_to("nowhere")
    save(params, config, ours, overwrite=True)
    assert sorted(x.name for x in ours.iterdir()) == sorted((*foreign, "link", "config.json", "model.safetensors"))
    assert all((ours / name).read_text() == name for name in foreign)


def test_flipped_bytes(tmp_path):
    """Any byte of the header or the data, wherever it is read from: no number comes from a damaged file."""
    config, directory, _ = checkpoint(tmp_path / "hf", "next", BF16, layers=4)
    params = load(directory, config)
    save(params, config, tmp_path / "ours", max_shard_size=300_000)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 1
    random = np.random.default_rng(0)
    mesh, specs = mesh_of(AxisType.Auto), spread_specs(config)
    for trial in range(24):
        path = files[trial % len(files)]
        whole = path.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        place = random.integers(*((0, header) if trial % 3 == 0 else (header, len(whole))))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << random.integers(8)
        path.write_bytes(bytes(damaged))
        with pytest.raises(ValueError, match="is damaged|not a whole safetensors file"):
            load(tmp_path / "ours", config, *((specs, mesh) if trial % 2 else ()))
        if place >= header:
            assert not all(
                np.array_equal(x, y, equal_nan=True)
                for x, y in zip(
                    *(jax.tree.leaves(x) for x in (load(tmp_path / "ours", config, verify=False), params)), strict=True
                )
            )
        path.write_bytes(whole)
    assert_same(load(tmp_path / "ours", config, specs, mesh), jax.tree.map(np.asarray, params))


def test_blocks_of_checksums(tmp_path, monkeypatch):
    """Blocks smaller than tensors, not aligned with them: only those that are read are checked."""
    monkeypatch.setattr(checksums, "BLOCK", 1000)
    path = tmp_path / "model.safetensors"
    held = {"a": np.arange(2000, dtype=np.float32).reshape(100, 20), "b": np.ones((3, 7), np.float16)}
    safetensors_io.write(path, {n: (x.shape, x.dtype) for n, x in held.items()}, iter(held.values()))
    assert_same(read(tmp_path), held)
    raw = bytearray(path.read_bytes())
    raw[8 + int.from_bytes(raw[:8], "little") + 80 * 50] ^= 1  # row 50 of a, in block 4
    path.write_bytes(bytes(raw))
    with safetensors_io.Reader(tmp_path) as reader:
        for rows in (slice(0, 50), slice(63, 100)):
            np.testing.assert_array_equal(reader.read(reader.entries["a"], (rows,)), held["a"][rows])
        np.testing.assert_array_equal(reader.read(reader.entries["b"], ()), held["b"])
        for index in ((slice(49, 51),), (slice(None), slice(3, 4)), ()):
            with pytest.raises(ValueError, match="block 4 of its data has another checksum"):
                reader.read(reader.entries["a"], index)


def test_a_model_keeps_its_tokenizer(tmp_path):
    config, directory, held = checkpoint(tmp_path / "hf", "dense", layers=4)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (directory / name).write_text("{}")
    (directory / "chat_template.jinja").write_text("of the source")
    (directory / "README.md").write_text("of the source")
    model = Qwen3_5.from_pretrained(directory)
    shutil.rmtree(directory)
    target = tmp_path / "tuned"
    model.save_pretrained(target)
    ours = {"config.json", "model.safetensors"}
    files = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    assert {x.name for x in target.iterdir()} == ours | files
    assert_same(read(target), held)
    # Another tokenizer replaces the first as a whole: half of each would be neither.
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(FileNotFoundError, match="no tokenizer in .*other: expected tokenizer.json"):
        model.save_pretrained(target, tokenizer_from=other, overwrite=True)
    (other / "tokenizer.json").write_text('{"other": 1}')
    model.save_pretrained(target, tokenizer_from=other, overwrite=True)
    assert {x.name for x in target.iterdir()} == ours | {"tokenizer.json"}
    assert Qwen3_5.from_pretrained(target).companions == model.companions, "programs do not depend on it"


def test_tokens_that_end_a_text_come_from_every_file(tmp_path):
    config, directory, _ = checkpoint(tmp_path / "hf", "dense", layers=4)
    hf = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(hf | {"eos_token_id": 7}))
    assert Config.from_hf(directory).eos_token_ids == (7,)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {"eos_token": "<end>", "added_tokens_decoder": {"11": {"content": "<end>"}, "12": {"content": "<x>"}}}
        )
    )
    model = Qwen3_5.from_pretrained(directory)
    assert model.config.eos_token_ids == (7, 9, 11)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == [7, 9, 11]
    for bad in (256, -1, "a", 1.5, True, [7, None], {"a": 1}):
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": bad}))
        with pytest.raises(ValueError, match="generation_config.json: eos_token_id"):
            Config.from_hf(directory)


@pytest.mark.parametrize("preset", PRESETS)
def test_published_sizes(preset):
    """The table covers every element of every tensor once, and of the parameters all but the zeros that fill up columns of GDN
    heads; the models have as many as they say."""
    config = PRESETS[preset]
    plan = mapping.plan(config)
    params, heads = sum(map(math.prod, plan.tensors.values())), config.linear
    unused = config.hidden_size * heads.key_heads * (heads.stride - sum(heads.of_key_head))
    assert params == sum(map(math.prod, plan.params.values())) - unused * config.layer_types.count("linear_attention")
    assert params == sum(math.prod(mapping.extents(piece.target)) for piece in plan.pieces)
    billions = float(re.search(r"(\d+(\.\d+)?)b", preset)[1])
    assert abs(params / 1e9 / billions - 1) < 0.12  # the names count the vision part too, and round


@pytest.mark.parametrize("family", ["dense", "next"])
def test_zeros_behind_the_columns_of_a_key_head(tmp_path, family):
    """Loading and initialising make them, saving leaves them out: every tensor is what it was."""
    config, directory, held = checkpoint(tmp_path / "hf", family)
    heads, used = config.linear, sum(config.linear.of_key_head)
    assert heads.stride > used and heads.stride % 8 == 0
    made = nnx.to_pure_dict(nnx.state(Qwen3_5(config, rngs=nnx.Rngs(0)), nnx.Param))
    for params in (load(directory, config), made):
        columns = np.asarray(params["groups"]["layers"][0]["mixer"]["in_proj"]).reshape(-1, heads.stride)
        assert not columns[:, used:].any() and columns[:, :used].all()
    save(load(directory, config), config, tmp_path / "again")
    again = read(tmp_path / "again")
    assert {name: x.tobytes() for name, x in again.items()} == {name: x.tobytes() for name, x in held.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_the_models_tree(family):
    config = Config.from_hf(tiny.config(family, layers=8))
    model = nnx.to_pure_dict(nnx.state(Qwen3_5(config, rngs=None, dtype=jnp.bfloat16), nnx.Param))
    plan = mapping.plan(config)
    for path, shape in plan.params.items():
        leaf = mapping.at(model, path, "parameters")
        assert (leaf.shape, leaf.dtype == jnp.float32) == (shape, plan.float32(path)), path
    assert len(jax.tree.leaves(model)) == len(plan.params)


@pytest.mark.slow
def test_several_processes(tmp_path):
    """Two processes of four devices: each reads its part, and one writes what both hold."""
    checkpoint(tmp_path / "hf", "next", BF16, layers=4)
    code = f"""
        import sys, pathlib, jax, numpy as np
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 4)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
        from tests.models.qwen3_5 import test_pretrained as t
        config = t.Config.from_hf({str(tmp_path / "hf")!r})
        mesh = t.mesh_of(t.AxisType[sys.argv[3]])
        meter = t.Meter()
        params = t.load({str(tmp_path / "hf")!r}, config, t.spread_specs(config), mesh, meter=meter)
        assert not params["embed"].is_fully_addressable
        print("read", meter.total, flush=True)
        t.save(params, config, pathlib.Path({str(tmp_path)!r}) / sys.argv[3], max_shard_size=10**6)
        assert t.Config.from_hf(pathlib.Path({str(tmp_path)!r}) / sys.argv[3]) == config
    """
    held = read(tmp_path / "hf")
    for kind in ("Auto", "Explicit"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
        args = [[sys.executable, "-c", textwrap.dedent(code), f"127.0.0.1:{port}", str(i), kind] for i in range(2)]
        runs = [subprocess.Popen(a, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for a in args]
        outputs = [run.communicate(timeout=300)[0] for run in runs]
        assert [run.returncode for run in runs] == [0, 0], "\n".join(outputs)
        counts = [int(re.search(r"read (\d+)", text)[1]) for text in outputs]
        assert max(counts) < 0.6 * sum(x.nbytes for x in held.values())
        assert_same(read(tmp_path / kind), held)
