"""Parameters of Qwen3.5, Qwen3.5 MoE and Qwen3-Next into checkpoints that transformers loads."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from ring_jax._checks import check_flag, check_instance, check_path
from ring_jax.models import hf
from ring_jax.models.publish import NEW, PREVIOUS, located, on_first_process, publish, workspace
from ring_jax.models.qwen3_5.config import FAMILIES, Config
from ring_jax.models.qwen3_5.hf import mapping, safetensors_io

_OUR_SHARDS = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")


def save(
    params: Mapping[Any, Any],
    config: Config,
    directory: str | Path,
    *,
    max_shard_size: int = 4 * 10**9,
    tokenizer_from: str | Path | None = None,
    overwrite: bool = False,
    companions: hf.Companions | None = None,
) -> None:
    """Writes ``config.json`` and safetensors under the names of text-only models (``Qwen3_5ForCausalLM``, ...).

    Tensor by tensor: the host holds one tensor and one layer of the parameters that it is made of. All is written
    beside `directory` first and renamed when it is whole, so an interrupted save leaves what was there, and of several
    savers the last one wins, whole. With several processes all of them must call this; the first one writes.

    Args:
        params: the model's tree, nested dicts of jax or NumPy arrays.
        config: sizes of the model, written as config.json.
        directory: to make, or to replace.
        max_shard_size: bytes in one file; a larger model gets several and an index.
        tokenizer_from: a directory whose tokenizer, chat template and generation config are copied.
        overwrite: replace the checkpoint that is there: its config, the weights that are its own, and its tokenizer
            where a new one is written. Other files beside it stay, those of other weights included.
        companions: a tokenizer's files to write, unless `tokenizer_from` says otherwise.

    Raises:
        FileExistsError: `directory` has a checkpoint and `overwrite` is not set, or it has files and no checkpoint.
        FileNotFoundError: no tokenizer in `tokenizer_from`.
        ValueError: the tree is not that of `config`, or an array is of a dtype that checkpoints do not have.

    Example:
        >>> import pathlib, tempfile
        >>> from ring_jax.data import passkey
        >>> from ring_jax.models.qwen3_5.hf.load import load
        >>> config = Config.from_hf(passkey.MODEL)
        >>> directory = pathlib.Path(tempfile.mkdtemp()) / "out"
        >>> _ = save(load(passkey.MODEL, config), config, directory, tokenizer_from=passkey.MODEL)
        >>> (directory / "config.json").exists()
        True
    """
    directory = check_path("directory", directory).resolve()
    check_instance("config", config, Config, "a ring_jax.models.qwen3_5.Config")
    check_flag("overwrite", overwrite)
    if tokenizer_from is not None:
        companions = _tokenizer(check_path("tokenizer_from", tokenizer_from))
    beside = {} if companions is None else companions.files
    plan = mapping.plan(config)
    kinds = _tensor_dtypes(plan, params)
    sizes = {name: math.prod(shape) * kinds[name].itemsize for name, shape in plan.tensors.items()}
    files = {
        # Wider dtypes first, so that every tensor starts at a multiple of its item size.
        file: sorted(held, key=lambda name: -kinds[name].itemsize)
        for file, held in safetensors_io.shard(sizes, max_shard_size).items()
    }
    on_first_process(lambda: _refuse(located(directory), overwrite), f"saving to {directory}")
    values = _values(plan, params, kinds, [name for held in files.values() for name in held])

    def write() -> None:
        with workspace(directory.parent, directory.name) as space:
            folder = space / NEW
            folder.mkdir()
            for name, data in beside.items():
                _write(folder / name, data)
            hf_config = config.to_hf() | {"dtype": kinds["model.embed_tokens.weight"].name}
            _write_json(folder / hf.CONFIG_FILE, hf_config)
            if len(files) > 1:
                _write_json(folder / safetensors_io.INDEX_FILE, _index(files, sizes))
            for file, held in files.items():
                headers = {name: (plan.tensors[name], kinds[name]) for name in held}
                safetensors_io.write(folder / file, headers, (next(values) for _ in held))
            _publish(space, directory, overwrite, bool(beside))

    # The others, and the first one where its disk is full, take part in fetching what lies over several hosts.
    on_first_process(write, f"saving to {directory}", meanwhile=lambda: collections.deque(values, maxlen=0))


def _tensor_dtypes(plan: mapping.Plan, params: Mapping[Any, Any]) -> dict[str, np.dtype]:
    """The dtype of every tensor, that of its parameters; raises where the tree does not fit the plan."""
    kinds: dict[str, np.dtype] = {}
    for piece in plan.pieces:
        array = mapping.at(params, piece.param, "params")
        where = ".".join(map(str, piece.param))
        if tuple(array.shape) != plan.params[piece.param]:
            raise ValueError(f"parameter {where} has shape {array.shape}, expected {plan.params[piece.param]}")
        kind = np.dtype(array.dtype)
        if kind not in safetensors_io.DTYPES.values():
            raise ValueError(
                f"parameter {where} is {kind}: checkpoints hold {sorted(map(str, safetensors_io.DTYPES.values()))}"
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


def _values(plan: mapping.Plan, params: Any, kinds: Mapping[str, np.dtype], order: list[str]) -> Iterator[np.ndarray]:
    """The tensors in `order`. A layer of a parameter is fetched once and forgotten after its last piece."""
    pieces = collections.defaultdict(list)
    uses: collections.Counter[tuple[mapping.Path, int | None]] = collections.Counter()
    for piece in plan.pieces:
        pieces[piece.tensor].append(piece)
        uses[piece.param, piece.group] += 1
    held: dict[tuple[mapping.Path, int | None], np.ndarray] = {}
    for name in order:
        out = np.empty(plan.tensors[name], kinds[name])
        for piece in pieces[name]:
            key = piece.param, piece.group
            if key not in held:
                held[key] = _fetch(mapping.at(params, piece.param, "params"), piece.group)
            box = piece.target if piece.group is None else ((0, 1), *piece.target[1:])
            piece.as_param(out[mapping.slices(piece.source)])[...] = held[key][mapping.slices(box)]
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


def _refuse(directory: Path, overwrite: bool) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise FileExistsError(f"{directory} is a file: expected a directory to write, or none")
    found = sorted(x.name for x in directory.iterdir())
    if found and not _holds_checkpoint(directory, found):
        raise FileExistsError(f"{directory} holds {found[:5]} and no checkpoint to replace: choose another directory")
    if found and not overwrite:
        raise FileExistsError(f"{directory} holds a checkpoint: choose another directory or pass overwrite=True")


def _holds_checkpoint(directory: Path, found: list[str]) -> bool:
    if any(
        name in (safetensors_io.SINGLE_FILE, safetensors_io.INDEX_FILE) or _OUR_SHARDS.fullmatch(name) for name in found
    ):
        return True
    try:  # prepared for one: a config of ours, no weights yet
        return hf.Fields.of(directory / hf.CONFIG_FILE).values.get("model_type") in FAMILIES
    except (ValueError, TypeError):
        return False


def _publish(space: Path, directory: Path, overwrite: bool, tokenizer: bool) -> None:
    new, previous = space / NEW, space / PREVIOUS

    def before() -> None:
        _refuse(directory, overwrite)
        _carry_over(directory, new, tokenizer)

    publish(space, directory, before)
    if previous.is_dir():  # what came while it was moved aside
        _carry_over(previous, directory, tokenizer)


def _replaced_files(directory: Path, tokenizer: bool) -> set[str]:
    """Names in a checkpoint that another one replaces: its config, its weights, its tokenizer if there is a new one."""
    found = {hf.CONFIG_FILE, safetensors_io.SINGLE_FILE, safetensors_io.INDEX_FILE}
    found |= {x.name for x in directory.iterdir() if _OUR_SHARDS.fullmatch(x.name)}
    with contextlib.suppress(ValueError):  # a damaged index names nothing
        found |= {file for file in safetensors_io.weight_map(directory).values() if file.endswith(".safetensors")}
    return found | {*hf.TOKENIZER_FILES} if tokenizer else found


def _carry_over(source: Path, target: Path, tokenizer: bool) -> None:
    """What lies beside a checkpoint that is being replaced: by hard links where the file system has them."""

    def link(old: str, new: str) -> None:
        with contextlib.suppress(FileExistsError, FileNotFoundError):  # its owner was faster, or has taken it away
            try:
                os.link(old, new, follow_symlinks=False)
            except FileExistsError:
                raise
            except OSError:
                shutil.copy2(old, new, follow_symlinks=False)

    replaced = _replaced_files(source, tokenizer)
    for item in source.iterdir():
        if item.name in replaced or os.path.lexists(target / item.name):
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.copytree(item, target / item.name, symlinks=True, copy_function=link)
        else:
            link(str(item), str(target / item.name))


def _tokenizer(source: Path) -> hf.Companions:
    found = hf.Companions.of(located(source))
    if not found.files.keys() & {hf.TOKENIZER_FILE, "vocab.json"}:
        raise FileNotFoundError(f"no tokenizer in {source}: expected {hf.TOKENIZER_FILE}")
    return found


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write(path, (json.dumps(value, indent=2) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
