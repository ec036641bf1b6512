"""Orbax checkpoints of a training run: the same numbers on another mesh, and no good step lost to a bad one."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ring_jax
from ring_jax.models.qwen3_5.config import Config
from ring_jax.models.qwen3_5.modeling import Qwen3_5
from ring_jax.models.qwen3_5.sharding import Sharding
from ring_jax.training import checkpoint
from tests.models.qwen3_5 import tiny


class Net(nnx.Module):
    """A stack of layers under a list, as the models have it, with a parameter in another dtype and random state."""

    def __init__(self, width=8, features=16, layers=2, seed=0):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Param(rngs.params.normal((32, width)))
        self.layers = nnx.List([nnx.Param(rngs.params.normal((3, width, features))) for _ in range(layers)])
        self.half = nnx.Param(jnp.ones(features, jnp.bfloat16))
        self.rngs = rngs

    def __call__(self, tokens):
        x = self.embed[...][tokens]
        for layer in self.layers:
            kernel = layer[...].sum(0)
            x = x + jnp.tanh(x @ kernel * self.half[None].astype(x.dtype)) @ kernel.T
        return x


SPECS = {2: P("context", "tensor"), 3: P(None, "context", "tensor"), 1: P("tensor")}


def make(mesh=None, seed=0, **sizes):
    """A model, laid out over `mesh`, and an optimizer whose state lies as the parameters do."""
    model = Net(seed=seed, **sizes)
    if mesh is not None:
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, SPECS[x.ndim])), params))
    return model, nnx.Optimizer(model, optax.adamw(0.1), wrt=nnx.Param)


def mesh_of(*shape, kind=AxisType.Auto):
    return jax.make_mesh(shape, ("context", "tensor"), axis_types=(kind, kind))


@nnx.jit
def train_step(model, optimizer, tokens):
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean(model(tokens) ** 2))(model)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        optimizer.update(model, grads)
    return loss


def leaves(*modules):
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for module in modules
        for x in jax.tree.leaves(nnx.state(module))
    ]


def assert_same(got, want):
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y, strict=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Steps 1 and 2 of a run over 4 x 2 devices, saved, and what they and step 3 gave."""
    directory = tmp_path_factory.mktemp("run") / "steps"
    model, optimizer = make(mesh_of(4, 2))
    losses = []
    for step in (1, 2, 3):
        losses.append(float(train_step(model, optimizer, jnp.arange(8) + step)))
        if step < 3:
            saved = leaves(model, optimizer)
            checkpoint.save(directory, step, model, optimizer, extra={"losses": losses})
    return directory, saved, losses


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((2, 4), AxisType.Auto), ((8, 1), AxisType.Explicit), ((2, 1), AxisType.Auto), (None, None)],
    ids=["2x4", "8x1_explicit", "2x1", "one_device"],
)
def test_another_mesh(run, shape, kind):
    directory, saved, losses = run
    mesh = None if shape is None else jax.make_mesh(shape, ("context", "tensor"), axis_types=(kind, kind))
    model, optimizer = make(mesh, seed=1)
    before = jax.tree.map(lambda x: (x.sharding, x.committed), (nnx.state(model), nnx.state(optimizer)))
    found = checkpoint.restore(directory, model, optimizer)
    assert found == checkpoint.Restored(2, {"losses": losses[:2]})
    assert_same(leaves(model, optimizer), saved)
    after = jax.tree.map(lambda x: (x.sharding, x.committed), (nnx.state(model), nnx.state(optimizer)))
    assert jax.tree.leaves(before) == jax.tree.leaves(after)
    if kind != AxisType.Explicit:  # the toy's products do not say how they are sharded
        assert float(train_step(model, optimizer, jnp.arange(8) + 3)) == pytest.approx(losses[2], rel=1e-6)


def test_model_alone_an_earlier_step_and_another_dtype(run):
    directory, saved, _ = run
    model, _ = make(seed=1)
    wanted = nnx.state(model)
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, wanted))
    assert checkpoint.restore(directory, model).step == 2
    cast = [x.astype(jnp.bfloat16) if x.dtype == np.float32 else x for x in saved[: len(leaves(model))]]
    assert_same(leaves(model), cast)
    model, optimizer = make(seed=1)
    assert checkpoint.restore(directory, model, optimizer, step=1).extra["losses"] == run[2][:1]
    assert not all(np.array_equal(x, y) for x, y in zip(leaves(model, optimizer), saved, strict=True))


def test_abstract_parameters(run):
    """Shapes with shardings are enough of a model to restore into, so that its values never lie there twice."""
    directory, saved, _ = run
    mesh = mesh_of(2, 4)
    model, _ = make(seed=1)

    def abstract(x):
        sharding = NamedSharding(mesh, SPECS[x.ndim]) if x.ndim else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    nnx.update(model, jax.tree.map(abstract, nnx.state(model)))
    with pytest.raises(ValueError, match=r"the model has no values yet for 6 parameters \(embed, \.\.\.\)"):
        checkpoint.save(directory, 3, model)
    checkpoint.restore(directory, model)
    assert_same(leaves(model), saved[: len(leaves(model))])
    assert model.embed[...].sharding == NamedSharding(mesh, P("context", "tensor"))


def test_all_differences_in_one_error(run, tmp_path):
    directory, _, _ = run
    model, _ = make(features=12, layers=3)
    model.half = nnx.Param(jnp.ones(12, jnp.int32))
    before = leaves(model)
    with pytest.raises(ValueError) as error:
        checkpoint.restore(directory, model)
    message = str(error.value)
    for part in (
        f"the model saved in {directory}/2 is not the one to restore",
        "1 missing: layers.2 (3, 8, 12)",
        "3 of another shape: half (16,), expected (12,), layers.0 (3, 8, 16), expected (3, 8, 12)",
        "1 of another kind: half bfloat16, expected int32",
    ):
        assert part in message, message
    assert_same(leaves(model), before)
    model, _ = make(layers=1)
    with pytest.raises(ValueError, match="1 unexpected: layers.1"):
        checkpoint.restore(directory, model)
    model, _ = make()
    other = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    with pytest.raises(ValueError, match="the optimizer saved in .* is not the one to restore(.|\n)*missing: .*trace"):
        checkpoint.restore(directory, model, other)
    checkpoint.save(tmp_path, 1, model)
    with pytest.raises(ValueError, match="/1 has no optimizer: it was saved without one"):
        checkpoint.restore(tmp_path, model, other)


def test_what_is_not_there(run, tmp_path):
    model, optimizer = make()
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*nowhere: there is no such directory"):
        checkpoint.restore(tmp_path / "nowhere", model)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*, found steps \[\]"):
        checkpoint.restore(tmp_path, model)
    with pytest.raises(FileNotFoundError, match=r"no step 7 in .*, found steps \[1, 2\]"):
        checkpoint.restore(run[0], model, step=7)
    with pytest.raises(ValueError, match="step 2 does not follow step 2, the latest in"):
        checkpoint.save(run[0], 2, model, optimizer)
    with pytest.raises(ValueError, match="keep must be >= 1, got 0; None keeps all steps"):
        checkpoint.save(run[0], 3, model, keep=0)
    assert checkpoint.latest_step(tmp_path / "nowhere") is None and checkpoint.latest_step(tmp_path) is None
    assert not (tmp_path / "nowhere").exists()


def test_the_last_steps_stay(tmp_path):
    model, optimizer = make()
    for step in (0, 10, 20, 30):
        checkpoint.save(tmp_path, step, model, optimizer, keep=2)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["20", "30"]
    checkpoint.save(tmp_path, 40, model, keep=None)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["20", "30", "40"]


def test_an_interrupted_save_changes_nothing(tmp_path, monkeypatch):
    """Killed just before the rename that publishes; the next save clears away what was left."""
    model, optimizer = make()
    checkpoint.save(tmp_path, 1, model, optimizer)
    saved = leaves(model, optimizer)
    train_step(model, optimizer, jnp.arange(8))
    with monkeypatch.context() as patch:

        def dies(folder, target):
            assert (folder / "model").is_dir(), "whole, and without its name"
            raise KeyboardInterrupt

        patch.setattr(checkpoint, "_publish", dies)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 2, model, optimizer)
    assert len(list(tmp_path.iterdir())) == 2
    model, optimizer = make(seed=1)
    assert checkpoint.latest_step(tmp_path) == 1
    assert checkpoint.restore(tmp_path, model, optimizer).step == 1
    assert_same(leaves(model, optimizer), saved)
    checkpoint.save(tmp_path, 2, model, optimizer)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["1", "2"]


def test_what_is_called_like_a_step_and_is_none(tmp_path):
    """Stray folders neither break a restore nor count as steps that are kept; only empty ones give their name away."""
    model, optimizer = make()
    checkpoint.save(tmp_path, 5, model, optimizer)
    saved = leaves(model, optimizer)
    (tmp_path / "9").mkdir()
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024" / "diary.txt").write_text("mine")
    (tmp_path / "7").write_text("a file")
    assert checkpoint.latest_step(tmp_path) == 5
    other, other_optimizer = make(seed=1)
    assert checkpoint.restore(tmp_path, other, other_optimizer).step == 5
    assert_same(leaves(other, other_optimizer), saved)
    with pytest.raises(FileNotFoundError, match=r"no step 9 in .*, found steps \[5\]"):
        checkpoint.restore(tmp_path, model, step=9)
    for step in (7, 2024):
        with pytest.raises(FileExistsError, match=f"{step} is there and is no whole step: move it away"):
            checkpoint.save(tmp_path, step, model)
    checkpoint.save(tmp_path, 9, model, optimizer, keep=1)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["2024", "7", "9"]
    assert checkpoint.restore(tmp_path, other, other_optimizer).step == 9
    assert (tmp_path / "2024" / "diary.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"step": 1.0}, TypeError, "step must be an integer, got 1.0"),
        ({"step": "7"}, TypeError, "step must be an integer, got '7'"),
        ({"step": True}, TypeError, "step must be an integer, got True"),
        ({"step": -1}, ValueError, "step must be >= 0, got -1"),
        ({"keep": 2.5}, TypeError, "keep must be an integer, got 2.5"),
        ({"keep": -1}, ValueError, "keep must be >= 1, got -1"),
        ({"extra": {"x": object()}}, ValueError, "extra must be JSON"),
        ({"extra": {1: 2}}, TypeError, "extra must have names as keys, got 1"),
        ({"extra": [1]}, TypeError, "extra must be a mapping"),
        ({"directory": 3}, TypeError, "directory must be a path, got 3"),
        ({"directory": ""}, ValueError, "directory must be the name"),
        ({"directory": "gs://bucket/run"}, NotImplementedError, "mounted"),
        ({"model": {}}, TypeError, "model must be a flax.nnx.Module"),
        ({"optimizer": 3}, TypeError, "optimizer must be a flax.nnx.Optimizer or None"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, options, error, match):
    given = {"directory": tmp_path, "step": 1, "model": nnx.Dict(x=nnx.Param(jnp.ones(2)))} | options
    with pytest.raises(error, match=match):
        checkpoint.save(**given)
    assert not list(tmp_path.iterdir())


def test_steps_of_any_integer_type(tmp_path):
    model = nnx.Dict(x=nnx.Param(jnp.ones(2)))
    for step in (np.int64(0), jnp.int32(3)):
        checkpoint.save(tmp_path, step, model)
    assert checkpoint.latest_step(tmp_path) == 3 and checkpoint.restore(tmp_path, model, step=np.int8(0)).step == 0
    with pytest.raises(TypeError, match="step must be an integer, got 1.0"):
        checkpoint.restore(tmp_path, model, step=1.0)


def test_every_flipped_byte_is_found(tmp_path):
    """One byte of each file of a step in turn, the sums included."""
    model, optimizer = make()
    checkpoint.save(tmp_path, 1, model, optimizer, extra={"losses": [1.5]})
    wanted, files = leaves(model, optimizer), sorted(x for x in (tmp_path / "1").rglob("*") if x.is_file())
    random = np.random.default_rng(0)
    assert len(files) > 10
    for path in files:
        whole = path.read_bytes()
        data = bytearray(whole)
        place = random.integers(len(data))
        data[place] ^= 1 << random.integers(8)
        path.write_bytes(bytes(data))
        with pytest.raises(ValueError, match=r"damaged|not valid JSON|must be"):
            checkpoint.restore(tmp_path, model, optimizer)
        path.write_bytes(whole)
    other, other_optimizer = make(seed=1)
    assert checkpoint.restore(tmp_path, other, other_optimizer).extra == {"losses": [1.5]}
    assert_same(leaves(other, other_optimizer), wanted)
    # Without the optimizer its files are not looked at; without sums, or unasked, none are.
    damaged = max((x for x in files if "optimizer" in x.parts), key=lambda x: x.stat().st_size)
    damaged.unlink()
    checkpoint.restore(tmp_path, other)
    with pytest.raises(ValueError, match="1 files are missing or differ"):
        checkpoint.restore(tmp_path, other, other_optimizer)
    data = bytearray((tmp_path / "1" / "extra" / "metadata").read_bytes())
    data[data.index(b"5")] = ord("7")
    (tmp_path / "1" / "extra" / "metadata").write_bytes(bytes(data))
    with pytest.raises(ValueError, match="damaged, 1 files .*: extra/metadata"):
        checkpoint.restore(tmp_path, other)
    assert checkpoint.restore(tmp_path, other, verify=False).extra == {"losses": [1.7]}
    for path in (tmp_path / "1").glob("checksums.*.json"):
        path.unlink()
    assert checkpoint.restore(tmp_path, other).extra == {"losses": [1.7]}


def test_two_jobs_that_save_one_step(tmp_path, monkeypatch):
    """Both are writing when one publishes; the other gets an error and the step is whole, of one of them."""
    model, optimizer = make()
    wanted = leaves(model, optimizer)
    late, late_optimizer = make(seed=1)

    def meets(folder, target, publish=checkpoint._publish):
        if not target.exists():
            monkeypatch.setattr(checkpoint, "_publish", publish)
            checkpoint.save(tmp_path, 1, model, optimizer)
        publish(folder, target)

    monkeypatch.setattr(checkpoint, "_publish", meets)
    with pytest.raises(FileExistsError, match="another job has saved this step"):
        checkpoint.save(tmp_path, 1, late, late_optimizer)
    assert [x.name for x in tmp_path.iterdir()] == ["1"]
    checkpoint.restore(tmp_path, late, late_optimizer)
    assert_same(leaves(late, late_optimizer), wanted)


def test_a_step_loses_its_name_before_its_files(tmp_path, monkeypatch):
    """Killed while an old step is being removed: no half of one is found."""
    model, optimizer = make()
    for step in (1, 2):
        checkpoint.save(tmp_path, step, model, optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        checkpoint.save(tmp_path, 3, model, optimizer, keep=1)
    assert sorted(x.name for x in tmp_path.iterdir() if not x.name.startswith(".")) == ["3"]
    checkpoint.save(tmp_path, 4, model, optimizer, keep=1)
    assert [x.name for x in tmp_path.iterdir()] == ["4"]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_whole_model_changes_its_mesh(tmp_path, kind):
    """Qwen3.5 and its optimizer from four context ranks onto two, with a tensor axis, and onto one device."""
    config = Config.from_hf(tiny.config("moe"))
    rng = np.random.default_rng(0)

    def model_on(*shape):
        model = Qwen3_5(config, rngs=None, dtype=jnp.float32)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), params)
        if shape:
            mesh = mesh_of(*shape, kind=kind)
            context = ring_jax.ContextParallel("context", layout="zigzag", head_axis="tensor", mesh=mesh)
            specs = model.param_specs(Sharding(context, weights="context", expert="context"), mesh)
            params = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, specs)
        model.set_parameters(jax.tree.map(jax.device_put, params))
        return model, nnx.Optimizer(model, optax.sgd(1e-3, momentum=0.9), wrt=nnx.Param)

    model, optimizer = model_on(4, 1)
    checkpoint.save(tmp_path, 7, model, optimizer)
    for shape in ((2, 2), ()):
        other, other_optimizer = model_on(*shape)
        before = jax.tree.map(lambda x: x.sharding, (nnx.state(other), nnx.state(other_optimizer)))
        checkpoint.restore(tmp_path, other, other_optimizer)
        assert_same(leaves(other, other_optimizer), leaves(model, optimizer))
        after = jax.tree.map(lambda x: x.sharding, (nnx.state(other), nnx.state(other_optimizer)))
        assert jax.tree.leaves(before) == jax.tree.leaves(after)
        if shape:
            moments = jax.tree.leaves(nnx.state(other_optimizer))
            assert any(not x.sharding.is_fully_replicated for x in moments), "moments lie as their parameters do"


KILLED = """
    import os, signal, sys
    import orbax.checkpoint as ocp
    from tests.training import test_checkpoint as t
    model, optimizer = t.make()
    t.checkpoint.save(sys.argv[1], 1, model, optimizer)
    real = ocp.StandardCheckpointHandler.async_save
    async def dies(self, *args, **kwargs):
        if "model" in str(args[0]):
            os.kill(os.getpid(), signal.SIGKILL)
        return await real(self, *args, **kwargs)
    ocp.StandardCheckpointHandler.async_save = dies
    t.train_step(model, optimizer, t.jnp.arange(8))
    t.checkpoint.save(sys.argv[1], 2, model, optimizer)
"""


def python(code, *args):
    # Optimised, XLA draws other random numbers in the last bit.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_killed_save_changes_nothing(tmp_path):
    killed = python(KILLED, tmp_path)
    output = killed.communicate(timeout=300)[0]
    assert killed.returncode == -signal.SIGKILL, output
    assert len(list(tmp_path.iterdir())) == 2, "step 1 and what was left of step 2"
    model, optimizer = make(seed=1)
    assert checkpoint.restore(tmp_path, model, optimizer).step == 1
    assert_same(leaves(model, optimizer), leaves(*make()))
    checkpoint.save(tmp_path, 2, model, optimizer)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["1", "2"]


TWO_PROCESSES = """
    import sys, jax, numpy as np
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
    from tests.training import test_checkpoint as t
    from flax import nnx
    model, optimizer = t.make(t.mesh_of(4, 2))
    t.checkpoint.save(sys.argv[3], 5, model, optimizer, extra={"a": [1, 2]})
    model, optimizer = t.make(t.mesh_of(2, 4), seed=1)
    assert t.checkpoint.restore(sys.argv[3], model, optimizer) == t.checkpoint.Restored(5, {"a": [1, 2]})
    want = jax.tree.leaves(nnx.state(t.make()[0], nnx.Param))
    for x, y in zip(jax.tree.leaves(nnx.state(model, nnx.Param)), want, strict=True):
        assert not x.is_fully_addressable
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(y)[shard.index])
    print("restored", optimizer.step[...], flush=True)
"""


@pytest.mark.slow
def test_several_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    runs = [python(TWO_PROCESSES, address, i, tmp_path / "steps") for i in range(2)]
    outputs = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(outputs)
    assert all(re.search("restored 0", text) for text in outputs)
    model, optimizer = make(seed=1)
    checkpoint.restore(tmp_path / "steps", model, optimizer)
    assert_same(leaves(model, optimizer)[:4], leaves(*make())[:4])
