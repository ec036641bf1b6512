"""Parameters of Qwen3.5, Qwen3.5 MoE and Qwen3-Next into checkpoints that transformers loads."""

from __future__ import annotations

import collections
import contextlib
import fnmatch
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from ring_jax.models.qwen3_5 import names, tensors
from ring_jax.models.qwen3_5.config import Config

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)
_OWN_FILES = ("config.json", tensors.INDEX_FILE, "*.safetensors")


def save(
    params: Mapping[Any, Any],
    config: Config,
    directory: str | Path,
    *,
    max_shard_size: int = 4 * 10**9,
    tokenizer_from: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Writes ``config.json`` and safetensors under the names of text-only models (``Qwen3_5ForCausalLM``, ...).

    Tensor by tensor: the host holds one tensor and one layer of the parameters that it is made of. All is written
    beside `directory` first and renamed when it is whole, so an interrupted save leaves what was there. With several
    processes all of them must call this; the first one writes.

    Args:
        params: the model's tree, nested dicts of jax or NumPy arrays.
        config: sizes of the model, written as config.json.
        directory: to make, or to replace.
        max_shard_size: bytes in one file; a larger model gets several and an index.
        tokenizer_from: a directory whose tokenizer, chat template and generation config are copied.
        overwrite: replace the checkpoint that is there. Other files beside it stay.

    Raises:
        FileExistsError: `directory` has a checkpoint and `overwrite` is not set, or it has files and no checkpoint.
        FileNotFoundError: no tokenizer in `tokenizer_from`.
        ValueError: the tree is not that of `config`, or an array is of a dtype that checkpoints do not have.

    Example:
        >>> save(params, config, "out", tokenizer_from="Qwen3.5-0.8B")
    """
    directory = Path(directory).resolve()
    plan = names.plan(config)
    kinds = _tensor_dtypes(plan, params)
    sizes = {name: int(np.prod(shape)) * kinds[name].itemsize for name, shape in plan.tensors.items()}
    files = {
        # Wider dtypes first, so that every tensor starts at a multiple of its item size.
        file: sorted(held, key=lambda name: -kinds[name].itemsize)
        for file, held in tensors.shard(sizes, max_shard_size).items()
    }
    if jax.process_index() == 0:
        _recover(directory)
    _refuse(directory, overwrite)
    values = _values(plan, params, kinds, [name for held in files.values() for name in held])
    if jax.process_index() == 0:
        with _replacing(directory) as folder:
            _copy_tokenizer(tokenizer_from, folder)
            hf_config = config.to_hf() | {"dtype": kinds["model.embed_tokens.weight"].name}
            _write_json(folder / "config.json", hf_config)
            if len(files) > 1:
                _write_json(folder / tensors.INDEX_FILE, _index(files, sizes))
            for file, held in files.items():
                headers = {name: (plan.tensors[name], kinds[name]) for name in held}
                tensors.write(folder / file, headers, (next(values) for _ in held))
    else:
        collections.deque(values, maxlen=0)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"saved {directory}")


def _tensor_dtypes(plan: names.Plan, params: Mapping[Any, Any]) -> dict[str, np.dtype]:
    """The dtype of every tensor, that of its parameters; raises where the tree does not fit the plan."""
    kinds: dict[str, np.dtype] = {}
    for piece in plan.pieces:
        array = names.at(params, piece.param, "params")
        where = ".".join(map(str, piece.param))
        if tuple(array.shape) != plan.params[piece.param]:
            raise ValueError(f"parameter {where} has shape {array.shape}, expected {plan.params[piece.param]}")
        kind = np.dtype(array.dtype)
        if kind not in tensors.DTYPES.values():
            raise ValueError(
                f"parameter {where} is {kind}: checkpoints hold {sorted(map(str, tensors.DTYPES.values()))}"
            )
        if kinds.setdefault(piece.tensor, kind) != kind:
            raise ValueError(
                f"parameter {where} is {kind}, another part of {piece.tensor} is {kinds[piece.tensor]}: "
                "cast them to one dtype"
            )
    return kinds


def _index(files: Mapping[str, list[str]], sizes: Mapping[str, int]) -> dict[str, Any]:
    places = {name: file for file, held in files.items() for name in held}
    return {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))}


def _values(plan: names.Plan, params, kinds: Mapping[str, np.dtype], order: list[str]) -> Iterator[np.ndarray]:
    """The tensors in `order`. A layer of a parameter is fetched once and forgotten after its last piece."""
    pieces = collections.defaultdict(list)
    uses: collections.Counter[tuple[names.Path, int | None]] = collections.Counter()
    for piece in plan.pieces:
        pieces[piece.tensor].append(piece)
        uses[piece.param, piece.group] += 1
    held: dict[tuple[names.Path, int | None], np.ndarray] = {}
    for name in order:
        out = np.empty(plan.tensors[name], kinds[name])
        for piece in pieces[name]:
            key = piece.param, piece.group
            if key not in held:
                held[key] = _fetch(names.at(params, piece.param, "params"), piece.group)
            box = piece.target if piece.group is None else ((0, 1), *piece.target[1:])
            piece.as_param(out[names.slices(piece.source)])[...] = held[key][names.slices(box)]
            uses[key] -= 1
            if not uses[key]:
                del held[key]
        yield out


def _fetch(array: Any, group: int | None) -> np.ndarray:
    """An array, or one layer of it as [1, ...], on this host."""
    if not isinstance(array, jax.Array):
        return array if group is None else array[group : group + 1]
    layer = array if group is None else _layer(array, group)
    if not layer.is_fully_addressable:
        layer = jax.device_put(layer, NamedSharding(array.sharding.mesh, PartitionSpec()))  # type: ignore[attr-defined]
    return np.asarray(layer)


@jax.jit
def _layer(array: jax.Array, group: Any) -> jax.Array:
    return lax.dynamic_slice_in_dim(array, group, 1)


def _recover(directory: Path) -> None:
    """Puts back what a save moved aside that ended between its two renames."""
    previous = tensors.replaced(directory)
    if previous.exists() and not directory.exists():
        os.rename(previous, directory)


def _refuse(directory: Path, overwrite: bool) -> None:
    found = sorted(x.name for x in directory.iterdir()) if directory.is_dir() else []
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file: expected a directory to write, or none")
    if found and not any(fnmatch.fnmatch(name, pattern) for name in found for pattern in _OWN_FILES):
        raise FileExistsError(f"{directory} holds {found[:5]} and no checkpoint to replace: choose another directory")
    if found and not overwrite:
        raise FileExistsError(f"{directory} holds a checkpoint: choose another directory or pass overwrite=True")


@contextlib.contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A folder that becomes `directory` when the block ends without an error."""
    folder = directory.with_name(f".{directory.name}.incomplete")
    previous = tensors.replaced(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(previous, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        if directory.exists():
            _carry_over(directory, folder)
            os.rename(directory, previous)
        os.rename(folder, directory)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        _recover(directory)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _carry_over(source: Path, target: Path) -> None:
    """What lies beside a checkpoint that is being replaced: by hard links where the file system has them."""

    def link(old: str, new: str) -> None:
        try:
            os.link(old, new, follow_symlinks=False)
        except OSError:
            shutil.copy2(old, new, follow_symlinks=False)

    for item in source.iterdir():
        ours = any(fnmatch.fnmatch(item.name, pattern) for pattern in _OWN_FILES)
        if ours or (target / item.name).exists():
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.copytree(item, target / item.name, symlinks=True, copy_function=link)
        else:
            link(str(item), str(target / item.name))


def _copy_tokenizer(source: str | Path | None, folder: Path) -> None:
    if source is None:
        return
    found = [path for name in TOKENIZER_FILES if (path := Path(source) / name).is_file()]
    if not found:
        raise FileNotFoundError(f"no tokenizer in {source}: expected one of {', '.join(TOKENIZER_FILES)}")
    for path in found:
        shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with open(path, "w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
