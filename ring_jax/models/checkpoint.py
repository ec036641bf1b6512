"""Training checkpoints: the state of a Flax model and its optimizer, saved and restored shard by shard by Orbax.

A step is a folder that gets its name only when it is whole (Orbax's atomic commit), so an interrupted save leaves the
earlier steps as they were. Parameters are stored under flat names ("groups.layers.0.mixer.o") with their global
shapes: any mesh can read what another one has written.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

_SHOWN = 20  # names of one kind that an error lists


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `restore` found besides arrays: the step and what `save` was given as `extra`."""

    step: int
    extra: dict[str, Any]


def save(
    directory: str | os.PathLike,
    step: int,
    model: nnx.Module,
    optimizer: nnx.Optimizer | None = None,
    *,
    extra: Mapping[str, Any] | None = None,
    keep: int | None = 3,
) -> None:
    """Saves a step; returns when it is on disk. With several processes, all of them must call this.

    Args:
        directory: of all steps of a run; on storage that all processes see.
        step: greater than those saved before.
        model, optimizer: every nnx.Variable in them is saved.
        extra: what else a resumed run needs to know (place in the data, losses so far); JSON.
        keep: how many steps stay, the latest ones; None keeps all. Older ones go after this one is whole.

    Raises:
        ValueError: a step that is not greater than the latest, `keep` below 1, or abstract parameters.

    Example:
        >>> save("runs/a", 100, model, optimizer, extra={"tokens_seen": 10**6})

    Source: Orbax, https://orbax.readthedocs.io.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1 or None, got {keep}")
    items = {"model": ocp.args.StandardSave(_to_save(model, "model"))}
    if optimizer is not None:
        items["optimizer"] = ocp.args.StandardSave(_to_save(optimizer, "optimizer"))
    items["extra"] = ocp.args.JsonSave(dict(extra or {}))
    with _manager(_path(directory), create=True, keep=keep) as manager:
        latest = manager.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(
                f"step {step} does not follow step {latest}, the latest in {directory}: choose another directory for "
                "another run, or delete the later steps"
            )
        manager.save(step, args=ocp.args.Composite(**items), force=True)


def restore(
    directory: str | os.PathLike,
    model: nnx.Module,
    optimizer: nnx.Optimizer | None = None,
    *,
    step: int | None = None,
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

    Returns:
        The step and the `extra` of its save.

    Raises:
        FileNotFoundError: no checkpoint there, or not this step.
        ValueError: parameters or optimizer state are missing, unexpected, of another shape or kind (all listed); or the
            step was saved without an optimizer.

    Example:
        >>> step = restore("runs/a", model, optimizer).step
    """
    path = _path(directory)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint in {path}: there is no such directory")
    targets = {"model": model} if optimizer is None else {"model": model, "optimizer": optimizer}
    with _manager(path, create=False) as manager:
        found = manager.all_steps()
        step = max(found, default=None) if step is None else step
        if step is None or step not in found:
            wanted = "no checkpoint" if step is None else f"no step {step}"
            raise FileNotFoundError(f"{wanted} in {path}, found steps {sorted(found)}")
        saved = manager.item_metadata(step)
        values = {kind: _values(target) for kind, target in targets.items()}
        for kind in targets:
            _check(kind, saved[kind] if kind in saved.keys() else None, values[kind], f"{path}/{step}")
        items = {
            kind: ocp.args.StandardRestore({name: _abstract(x) for name, x in flat.items()})
            for kind, flat in values.items()
        }
        result = manager.restore(step, args=ocp.args.Composite(**items, extra=ocp.args.JsonRestore()))
    for kind, target in targets.items():
        _update(target, {name: _as_before(x, values[kind][name]) for name, x in result[kind].items()})
    return Restored(step, result["extra"])


def latest_step(directory: str | os.PathLike) -> int | None:
    """The greatest step that is whole, None where there is none. Half-written steps do not count."""
    path = _path(directory)
    if not path.exists():
        return None
    with _manager(path, create=False) as manager:
        return manager.latest_step()


def _path(directory: str | os.PathLike) -> epath.Path:
    return epath.Path(os.fspath(directory)).resolve()


def _manager(path: epath.Path, *, create: bool, keep: int | None = None) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        path,
        options=ocp.CheckpointManagerOptions(
            create=create, max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=create
        ),
        item_handlers={
            "model": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "extra": ocp.JsonCheckpointHandler(),
        },
    )


def _variables(module: Any) -> dict[str, tuple[tuple, nnx.Variable]]:
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
