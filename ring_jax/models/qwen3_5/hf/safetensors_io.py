"""Safetensors files: slices out of them, and whole files written tensor by tensor.

The format: 8 bytes of header length (little endian), a JSON header of dtypes, shapes and byte ranges, then the bytes of
all tensors without gaps (https://github.com/huggingface/safetensors). Reading goes through the safetensors library,
which maps files into memory; its writer wants all tensors at once, so writing is done here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from ring_jax._checks import check_count
from ring_jax.models import checksums, hf
from ring_jax.models.publish import located

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

# Names in headers of the dtypes that parameters may have in a checkpoint.
DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
DTYPES["F64"] = np.dtype(np.float64)


class Meter:
    """Counts the bytes that were read from files and do not yet lie on a device.

    Fields:
        waiting: bytes now. peak: the most that ever waited. total: all bytes read.
    """

    def __init__(self) -> None:
        self.waiting = self.peak = self.total = 0
        self._lock = threading.Lock()

    def read(self, count: int) -> None:
        with self._lock:
            self.waiting += count
            self.total += count
            self.peak = max(self.peak, self.waiting)

    def placed(self, count: int) -> None:
        with self._lock:
            self.waiting -= count


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in a file: its file, its name there, shape and dtype (of the header: "BF16"), and its bytes there."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offsets: tuple[int, int] = (0, 0)


class Reader:
    """The tensors of a checkpoint directory, in one file or in several with an index. A context manager.

    With an index, a tensor is that of the file that the index names for it, whatever other files hold.

    Args:
        directory: of the checkpoint.
        meter: counts what `read` reads.
        verify: check what is read against the checksums in the files, where these have some.

    Fields:
        entries: by the tensors' own names.

    Raises:
        FileNotFoundError: no checkpoint there, or one file of several is missing.
        ValueError: a file or the index is damaged, or two checkpoints are there; it is named.
    """

    def __init__(self, directory: str | Path, meter: Meter | None = None, *, verify: bool = True):
        self.directory = located(Path(directory))
        self.meter = meter or Meter()
        self.entries: dict[str, Entry] = {}
        self._handles: dict[Path, Any] = {}
        self._verifiers: dict[Path, checksums.Verifier] = {}
        with contextlib.ExitStack() as stack:
            for path, names in _files(self.directory).items():
                self._open(path, names, verify, stack)
            self._stack = stack.pop_all()

    def _open(self, path: Path, expected: set[str] | None, verify: bool, stack: contextlib.ExitStack) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, though {INDEX_FILE} names it: the checkpoint is incomplete")
        try:
            handle = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
            text = _header(path)
            header = json.loads(text)
            sums = (header.pop("__metadata__", None) or {}).get(checksums.KEY)
            found = {
                name: Entry(path, name, tuple(x["shape"]), x["dtype"], tuple(x["data_offsets"]))
                for name, x in header.items()
            }
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file ({error}): it is damaged or its "
                "download was cut short; fetch it again"
            ) from error
        absent = sorted((expected or set()) - found.keys())
        if absent:
            raise ValueError(f"{path} lacks {len(absent)} tensors that {INDEX_FILE} says it holds: {absent[:5]}")
        self.entries |= {name: x for name, x in found.items() if expected is None or name in expected}
        self._handles[path] = handle
        if verify and sums is not None:
            self._verifiers[path] = checksums.Verifier(path, text, sums)
            stack.callback(self._verifiers[path].close)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: Any) -> None:
        self._handles.clear()
        self._stack.close()

    def read(self, entry: Entry, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor; its bytes count as waiting until `meter.placed` is told of them.

        Raises:
            ValueError: they are not those that were saved.
        """
        if entry.file in self._verifiers:
            begin, end = entry.offsets
            if index and entry.shape:
                rows = range(*index[0].indices(entry.shape[0]))
                size = (end - begin) // max(1, entry.shape[0])
                begin, end = begin + rows.start * size, begin + rows.stop * size
            self._verifiers[entry.file].check(begin, end)
        block = self._handles[entry.file].get_slice(entry.name)[index]
        self.meter.read(block.nbytes)
        return block


def _header(path: Path) -> bytes:
    """The JSON text of a file's header; safetensors has checked that it is whole."""
    with open(path, "rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def weight_map(directory: Path) -> dict[str, str]:
    """File by tensor, as the index of a checkpoint says.

    Raises:
        ValueError: it is damaged, or names a file that does not lie beside it.
    """
    index = hf.Fields.of(directory / INDEX_FILE)
    files = index.inside("weight_map")
    if not files.values:
        raise ValueError(f"{index.where} is damaged, it holds no weight_map")
    found = {name: files.text(name) or "" for name in files.values}
    for name, file in found.items():
        if file != os.path.basename(file) or file in ("", ".", "..") or "\0" in file:
            raise ValueError(f"{files.where}: {name} must lie in a file beside the index, got {file!r}")
    return found


def _files(directory: Path) -> dict[Path, set[str] | None]:
    """The files of a checkpoint and the tensors to take from each: those that the index names, None for all."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if not index.is_file():
        if single.is_file():
            return {single: None}
        found = sorted(x.name for x in directory.iterdir())[:10] if directory.is_dir() else "no such directory"
        raise FileNotFoundError(
            f"no checkpoint in {directory}: expected {SINGLE_FILE} or {INDEX_FILE}, found {found or 'nothing'}"
        )
    files: dict[Path, set[str] | None] = {}
    for name, file in weight_map(directory).items():
        files.setdefault(directory / file, set()).add(name)  # type: ignore[union-attr]
    if single.is_file() and single not in files:
        raise ValueError(
            f"{directory} holds two checkpoints, {SINGLE_FILE} and the files that {INDEX_FILE} names: remove the stale one"
        )
    return files


def shard(sizes: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """Tensors by file: as many in each, in order, as fit into `max_bytes` (at least one)."""
    check_count("max_shard_size", max_bytes, 1, advice="a number of bytes")
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards)}


def write(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]], values: Iterable[np.ndarray]) -> None:
    """Writes one file with its checksums, taking each tensor's values only when its turn comes, and forces it to disk.

    Args:
        tensors: shape and dtype by name, in the order of `values`. Wider dtypes must come first: readers map the
            bytes, and so every tensor must start at a multiple of its item size.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {}
    position = 0
    for name, (shape, dtype) in tensors.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": (position, end)}
        position = end
    zeros, blocks = checksums.placeholder(position), checksums.Blocks()
    header = {"__metadata__": {"format": "pt", checksums.KEY: zeros}} | header
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (shape, dtype)), value in zip(tensors.items(), values, strict=True):
            assert value.shape == shape and value.dtype == dtype, (name, value.shape, value.dtype)
            data = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
            blocks.add(data)
            file.write(data)
        file.seek(8)
        file.write(checksums.filled(text, zeros, blocks))
        file.flush()
        os.fsync(file.fileno())
