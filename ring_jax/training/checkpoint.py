"""Training checkpoints: the state of a Flax model and its optimizer, saved and restored shard by shard by Orbax.

A step is a folder that gets its name only when it is whole, by one rename, so an interrupted save leaves the earlier
steps as they were, and of two jobs that save one step one gets an error. Checksums lie in the folder. Parameters are
stored under flat names ("groups.layers.0.mixer.o") with their global shapes: any mesh can read what another has written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from ring_jax._checks import check_count, check_flag, check_instance, check_path, describe
from ring_jax.models import checksums
from ring_jax.models.publish import NEW, on_first_process, workspace, workspace_name

_SHOWN = 20  # names of one kind that an error lists
_SPACE = "step"  # all steps of a directory share one name of workspaces: the next save clears what a killed one left
_ORBAX_FILE = "_CHECKPOINT_METADATA"  # written last into every whole step


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `restore` found besides arrays: the step and what `save` was given as `extra`."""

    step: int
    extra: dict[str, Any]


def save(
    directory: str | os.PathLike[str],
    step: int,
    model: nnx.Module,
    optimizer: nnx.Optimizer[Any] | None = None,
    *,
    extra: Mapping[str, Any] | None = None,
    keep: int | None = 3,
) -> None:
    """Saves a step; returns when it is on disk. With several processes, all of them must call this.

    Args:
        directory: of all steps of a run; on a file system that all processes see.
        step: an integer from 0, greater than those saved before.
        model, optimizer: every nnx.Variable in them is saved.
        extra: what else a resumed run needs to know (place in the data, losses so far); JSON.
        keep: how many steps stay, the latest ones; None keeps all. Older ones go after this one is whole.

    Raises:
        ValueError: a step that is not greater than the latest, `keep` below 1, abstract parameters, or an `extra` that
            JSON does not hold.
        FileExistsError: another job has saved this step meanwhile, or something that is no step has its name.

    Example:
        >>> import tempfile
        >>> from flax import nnx
        >>> model, directory = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), tempfile.mkdtemp()
        >>> _ = save(directory, 100, model, extra={"tokens_seen": 10**6})
        >>> latest_step(directory)
        100

    Source: Orbax, https://orbax.readthedocs.io.
    """
    path = check_path("directory", directory).resolve()
    step = check_count("step", step)
    keep = None if keep is None else check_count("keep", keep, 1, advice="None keeps all steps")
    _check_modules(model, optimizer)
    items = {"model": ocp.args.StandardSave(_to_save(model, "model"))}
    if optimizer is not None:
        items["optimizer"] = ocp.args.StandardSave(_to_save(optimizer, "optimizer"))
    items["extra"] = ocp.args.JsonSave(_json(extra))
    on_first_process(lambda: _refuse(path, step), f"saving step {step}")
    with _shared_workspace(path) as space, _checkpointer() as orbax:
        folder = space / NEW
        orbax.save(folder, args=ocp.args.Composite(**items))
        _sum_up(folder)
        on_first_process(lambda: _publish(folder, path / str(step)), f"saving step {step}")
        if keep is not None:
            on_first_process(lambda: _remove(path, space, keep), f"removing steps before {step}")


def restore(
    directory: str | os.PathLike[str],
    model: nnx.Module,
    optimizer: nnx.Optimizer[Any] | None = None,
    *,
    step: int | None = None,
    verify: bool = True,
) -> Restored:
    """Restores a step into a model and an optimizer that were made as for the saved run, in place.

    Every array takes the sharding that it has in the given model and optimizer now, whatever mesh it was saved from:
    each process reads its own shards only. Floats are cast to the dtypes that are there now.

    Args:
        directory: as given to `save`.
        model: its present values are replaced; they may be abstract (jax.ShapeDtypeStruct, with the sharding to
            restore to), which saves the memory of a second copy.
        optimizer: None restores the model alone, for inference.
        step: default: the latest.
        verify: read the files once before, to compare them with their checksums (several processes share that); False
            skips it.

    Returns:
        The step and the `extra` of its save.

    Raises:
        FileNotFoundError: no checkpoint there, or not this step.
        ValueError: parameters or optimizer state are missing, unexpected, of another shape or kind (all listed); the
            step was saved without an optimizer; or its files are damaged.

    Example:
        >>> import tempfile
        >>> from flax import nnx
        >>> model, directory = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), tempfile.mkdtemp()
        >>> _ = save(directory, 7, model)
        >>> restore(directory, nnx.Linear(2, 3, rngs=nnx.Rngs(1))).step
        7
    """
    path = check_path("directory", directory).resolve()
    step = None if step is None else check_count("step", step)
    check_flag("verify", verify)
    _check_modules(model, optimizer)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint in {path}: there is no such directory")
    targets = {"model": model} if optimizer is None else {"model": model, "optimizer": optimizer}
    found = _steps(path)
    step = max(found, default=None) if step is None else step
    if step is None or step not in found:
        wanted = "no checkpoint" if step is None else f"no step {step}"
        raise FileNotFoundError(f"{wanted} in {path}, found steps {found}")
    folder = path / str(step)
    if verify:
        _verify(folder, [*targets, "extra"])
    with _checkpointer() as orbax:
        values = {kind: _values(target) for kind, target in targets.items()}
        try:
            saved = orbax.metadata(folder).item_metadata
        except Exception as error:
            raise ValueError(f"{folder} cannot be read, it is damaged: {error}") from error
        for kind in targets:
            _check(kind, saved[kind] if kind in saved.keys() else None, values[kind], str(folder))
        items = {
            kind: ocp.args.StandardRestore({name: _abstract(x) for name, x in flat.items()})
            for kind, flat in values.items()
        }
        try:
            result = orbax.restore(folder, args=ocp.args.Composite(**items, extra=ocp.args.JsonRestore()))
        except Exception as error:
            raise ValueError(f"{folder} cannot be read: {error}") from error
    for kind, target in targets.items():
        _update(target, {name: _as_before(x, values[kind][name]) for name, x in result[kind].items()})
    return Restored(step, result["extra"])


def latest_step(directory: str | os.PathLike[str]) -> int | None:
    """The greatest step that is whole, None where there is none. Half-written steps and other folders do not count."""
    return max(_steps(check_path("directory", directory).resolve()), default=None)


def _check_modules(model: Any, optimizer: Any) -> None:
    check_instance("model", model, nnx.Module, "a flax.nnx.Module")
    check_instance("optimizer", optimizer, nnx.Optimizer, "a flax.nnx.Optimizer", optional=True)


def _steps(path: Path) -> list[int]:
    """Whole steps in a directory: a folder that is only called like one, an empty one say, is none."""
    if not path.is_dir():
        return []
    numbers = (x.name for x in path.iterdir() if x.name.isdecimal() and x.name == str(int(x.name)))
    return sorted(int(n) for n in numbers if (path / n / "model").is_dir() and (path / n / _ORBAX_FILE).is_file())


def _refuse(path: Path, step: int) -> None:
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file: expected a directory for the steps of a run, or none")
    latest = max(_steps(path), default=None)
    if latest is not None and step <= latest:
        raise ValueError(
            f"step {step} does not follow step {latest}, the latest in {path}: choose another directory for another run, "
            "or delete the later steps"
        )
    folder = path / str(step)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there and is no whole step: move it away")


@contextlib.contextmanager
def _shared_workspace(path: Path) -> Iterator[Path]:
    """One folder of this job, the same on all its processes, beside the steps."""
    with contextlib.ExitStack() as stack:
        made: list[Path] = []
        on_first_process(lambda: made.append(stack.enter_context(workspace(path, _SPACE))), f"saving to {path}")
        if jax.process_count() == 1:
            yield made[0]
            return
        from jax.experimental import multihost_utils

        name = np.frombuffer((made[0].name if made else workspace_name(_SPACE)).encode(), np.uint8)
        yield path / bytes(multihost_utils.broadcast_one_to_all(name).tolist()).decode()


def _sum_up(folder: Path) -> None:
    """Every process sums up the files that it has written itself, all together all files."""
    mine, count = jax.process_index(), jax.process_count()
    owners = {f"ocdbt.process_{i}": i for i in range(count)}
    files = [x for x in folder.rglob("*") if x.is_file() and not checksums.is_sums(x)]
    owned = [x for x in files if next((owners[p] for p in x.parts if p in owners), 0) == mine]
    checksums.write_sums(folder, owned, str(mine))
    on_first_process(lambda: None, "")  # all have written theirs


def _publish(folder: Path, target: Path) -> None:
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise FileExistsError(
            f"{target} is there now: another job has saved this step to the same directory"
        ) from error


def _remove(path: Path, space: Path, keep: int) -> None:
    """Removes all steps but the last; each loses its name before its files, so that no half of one is ever found."""
    for step in _steps(path)[:-keep]:
        with contextlib.suppress(FileNotFoundError):
            os.rename(path / str(step), space / f"old-{step}")
            shutil.rmtree(space / f"old-{step}", ignore_errors=True)


def _verify(folder: Path, items: list[str]) -> None:
    """Raises ValueError, on all processes, unless the files of these items are as they were saved."""
    try:
        changed = checksums.changed_files(folder, items, (jax.process_index(), jax.process_count()))
    except ValueError as error:  # the sums themselves
        changed = [str(error)]
    count = len(changed)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        count = int(np.sum(multihost_utils.process_allgather(np.int32(count))))
    if count:
        listed = f": {', '.join(changed[:_SHOWN])}" if changed else ", seen by other processes"
        raise ValueError(
            f"{folder} is damaged, {count} files are missing or differ from what was saved{listed}. Restore an earlier "
            "step; verify=False reads it all the same"
        )


def _json(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    check_instance("extra", extra, Mapping, "a mapping with names as keys", optional=True)
    for name in extra or ():
        if not isinstance(name, str):
            raise TypeError(f"extra must have names as keys, got {describe(name)}")
    try:
        json.dumps(dict(extra or {}))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"extra must be JSON (numbers, text, lists, dicts), got {describe(extra)}: {error}") from None
    return dict(extra or {})


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(
            model=ocp.StandardCheckpointHandler(),
            optimizer=ocp.StandardCheckpointHandler(),
            extra=ocp.JsonCheckpointHandler(),
        )
    )


def _variables(module: Any) -> dict[str, tuple[tuple[Any, ...], nnx.Variable[Any]]]:
    """Path and variable of all state, by flat name."""
    flat = nnx.to_flat_state(nnx.state(module))
    named = {".".join(map(str, path)): (path, variable) for path, variable in flat}
    assert len(named) == len(flat), "two parameters have one flat name"
    return named


def _values(module: Any) -> dict[str, Any]:
    """All state as it is stored: random keys by their bits."""
    return {name: _bits(variable.get_value()) for name, (_, variable) in _variables(module).items()}


def _update(module: Any, values: Mapping[str, Any]) -> None:
    new = {}
    for name, (path, variable) in _variables(module).items():
        old = variable.get_value()
        new[path] = jax.random.wrap_key_data(values[name], impl=_key_impl(old)) if _is_key(old) else values[name]
    nnx.update(module, nnx.from_flat_state(new))


def _to_save(module: Any, kind: str) -> dict[str, Any]:
    values = _values(module)
    abstract = [name for name, x in values.items() if isinstance(x, jax.ShapeDtypeStruct)]
    if abstract:
        raise ValueError(
            f"the {kind} has no values yet for {len(abstract)} parameters ({abstract[0]}, ...): make it with rngs"
        )
    return {name: np.asarray(x) if _local(x) else x for name, x in values.items()}


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _key_impl(key: Any) -> Any:
    return jax.random.key_impl(key if isinstance(key, jax.Array) else jnp.empty(key.shape, key.dtype))


def _bits(x: Any) -> Any:
    if not _is_key(x):
        return x
    return jax.random.key_data(x) if isinstance(x, jax.Array) else jax.eval_shape(jax.random.key_data, x)


def _local(x: Any) -> bool:
    """Whether every process holds an array of its own: Orbax takes these as NumPy only."""
    return jax.process_count() > 1 and getattr(x, "is_fully_addressable", False)


def _abstract(x: Any) -> Any:
    if _local(x):
        return np.empty(x.shape, x.dtype)
    # Without a sharding Orbax would look for the devices of the saved run.
    sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _as_before(new: Any, old: Any) -> jax.Array:
    """A restored array, bound to its devices only if the old one was: a step counter, say, joins any mesh."""
    if getattr(old, "committed", getattr(old, "sharding", None) is not None):
        return new
    return jnp.asarray(np.asarray(new))


def _check(kind: str, saved: Any, values: Mapping[str, Any], where: str) -> None:
    """All that differs between what was saved and what is to be restored, in one error."""
    if saved is None:
        raise ValueError(f"{where} has no {kind}: it was saved without one")
    stored = {name: (tuple(x.shape), np.dtype(x.dtype)) for name, x in dict(getattr(saved, "tree", saved)).items()}
    expected = {name: (tuple(x.shape), np.dtype(x.dtype)) for name, x in values.items()}
    common = stored.keys() & expected.keys()
    problems = {
        "missing": [f"{name} {expected[name][0]}" for name in expected.keys() - stored.keys()],
        "unexpected": [f"{name} {stored[name][0]}" for name in stored.keys() - expected.keys()],
        "of another shape": [
            f"{n} {stored[n][0]}, expected {expected[n][0]}" for n in common if stored[n][0] != expected[n][0]
        ],
        "of another kind": [
            f"{n} {stored[n][1]}, expected {expected[n][1]}"
            for n in common
            if not _castable(stored[n][1], expected[n][1])
        ],
    }
    if not any(problems.values()):
        return
    lines = [f"the {kind} saved in {where} is not the one to restore:"]
    for what, found in problems.items():
        if found:
            more = f" ... and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            lines.append(f"  {len(found)} {what}: {', '.join(sorted(found)[:_SHOWN])}{more}")
    lines.append("Make the model with the saved run's config and the optimizer with its transformations.")
    raise ValueError("\n".join(lines))


def _castable(old: np.dtype, new: np.dtype) -> bool:
    return old == new or bool(jnp.issubdtype(old, jnp.floating) and jnp.issubdtype(new, jnp.floating))
