"""Checkpoints under Hugging Face's names: every tensor where it belongs, read shard by shard, written back bit for bit."""

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

from ring_jax.models.qwen3_5 import names
from ring_jax.models.qwen3_5.config import PRESETS, Config
from ring_jax.models.qwen3_5.modeling import Qwen3_5
from ring_jax.models.qwen3_5.pretrained import checkpoint_dtype, load
from ring_jax.models.qwen3_5.saving import save
from ring_jax.models.qwen3_5.tensors import Meter
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
            assert file.metadata() == {"format": "pt"}
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
    return np.concatenate([x.reshape(heads, -1, width) for x in rows], axis=1).reshape(-1, width).T


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
    in_proj = by_head(nk, *(rows[x] for x in "qkvzba"))
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
    plan, specs = names.plan(config), {}
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
        2 * 2 * math.prod(NamedSharding(mesh, names.at(specs, path, "specs")).shard_shape(shape)) * 4
        for path, shape in names.plan(config).params.items()
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
    with pytest.raises(ValueError, match="parameters are floats, got dtype=int32"):
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
    for text in ("{", "{}", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="index.json is damaged"):
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
    with pytest.raises(ValueError, match="max_shard_size must be positive"):
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
    newer = jax.tree.map(lambda x: x + 1, params)

    from ring_jax.models.qwen3_5 import saving

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

    # Killed, so that nothing could be cleaned up: while writing, and between the two renames.
    shutil.copytree(directory, tmp_path / ".hf.incomplete")
    (tmp_path / ".hf.incomplete" / "model.safetensors").write_bytes(b"half")
    assert_same(load(directory, config), jax.tree.map(np.asarray, params))
    os.rename(directory, tmp_path / ".hf.replaced")
    with pytest.raises(
        FileNotFoundError, match="no checkpoint in .* left the earlier checkpoint whole at .*.hf.replaced"
    ):
        load(directory, config)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save(newer, config, directory)
    assert_same(read(directory), held)
    save(newer, config, directory, overwrite=True)
    assert_same(load(directory, config), jax.tree.map(np.asarray, newer))
    assert [x.name for x in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("preset", PRESETS)
def test_published_sizes(preset):
    """The table covers every element of every tensor once, and the models have as many parameters as they say."""
    config = PRESETS[preset]
    plan = names.plan(config)
    params = sum(map(math.prod, plan.params.values()))
    assert params == sum(map(math.prod, plan.tensors.values()))
    assert params == sum(math.prod(names.extents(piece.target)) for piece in plan.pieces)
    billions = float(re.search(r"(\d+(\.\d+)?)b", preset)[1])
    assert abs(params / 1e9 / billions - 1) < 0.12  # the names count the vision part too, and round


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_the_models_tree(family):
    config = Config.from_hf(tiny.config(family, layers=8))
    model = nnx.to_pure_dict(nnx.state(Qwen3_5(config, rngs=None, dtype=jnp.bfloat16), nnx.Param))
    plan = names.plan(config)
    for path, shape in plan.params.items():
        leaf = names.at(model, path, "parameters")
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
