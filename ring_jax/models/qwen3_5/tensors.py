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
    """A tensor in a file: its file, its name there, shape and dtype (of the header: "BF16")."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class Reader:
    """The tensors of a checkpoint directory, in one file or in several with an index. A context manager.

    Fields:
        entries: by the tensors' own names. meter: counts what `read` reads.

    Raises:
        FileNotFoundError: no checkpoint there, or one file of several is missing.
        ValueError: a file or the index is damaged; it is named.
    """

    def __init__(self, directory: str | Path, meter: Meter | None = None):
        self.directory = Path(directory)
        self.meter = meter or Meter()
        self.entries: dict[str, Entry] = {}
        self._handles: dict[Path, Any] = {}
        with contextlib.ExitStack() as stack:
            for path, names in _files(self.directory).items():
                self._open(path, names, stack)
            self._stack = stack.pop_all()

    def _open(self, path: Path, expected: set[str], stack: contextlib.ExitStack) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, though {INDEX_FILE} names it: the checkpoint is incomplete")
        try:
            handle = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
            for name in handle.keys():  # noqa: SIM118 (no mapping)
                header = handle.get_slice(name)
                self.entries[name] = Entry(path, name, tuple(header.get_shape()), header.get_dtype())
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file ({error}): it is damaged or its "
                "download was cut short; fetch it again"
            ) from error
        absent = sorted(expected - self.entries.keys())
        if absent:
            raise ValueError(f"{path} lacks {len(absent)} tensors that {INDEX_FILE} says it holds: {absent[:5]}")
        self._handles[path] = handle

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_) -> None:
        self._handles.clear()
        self._stack.close()

    def read(self, entry: Entry, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor; its bytes count as waiting until `meter.placed` is told of them."""
        block = self._handles[entry.file].get_slice(entry.name)[index]
        self.meter.read(block.nbytes)
        return block


def replaced(directory: Path) -> Path:
    """Where a checkpoint stands aside for the moment in which a new one takes its name."""
    return directory.with_name(f".{directory.name}.replaced")


def _files(directory: Path) -> dict[Path, set[str]]:
    """The files of a checkpoint and the tensors that an index expects in each."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        return {single: set()}
    if not index.is_file():
        found = sorted(x.name for x in directory.iterdir())[:10] if directory.is_dir() else "no such directory"
        aside = replaced(directory.resolve())
        raise FileNotFoundError(
            f"no checkpoint in {directory}: expected {SINGLE_FILE} or {INDEX_FILE}, found {found or 'nothing'}"
            + (
                f"; a save that was cut short has left the earlier checkpoint whole at {aside}"
                if aside.exists()
                else ""
            )
        )
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            files.setdefault(directory / file, set()).add(name)
        return files
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged, it holds no weight_map: {error!r}") from error


def shard(sizes: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """Tensors by file: as many in each, in order, as fit into `max_bytes` (at least one)."""
    if max_bytes < 1:
        raise ValueError(f"max_shard_size must be positive, got {max_bytes} bytes")
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
    """Writes one file, taking each tensor's values only when its turn comes, and forces it to disk.

    Args:
        tensors: shape and dtype by name, in the order of `values`. Wider dtypes must come first: readers map the
            bytes, and so every tensor must start at a multiple of its item size.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (shape, dtype) in tensors.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": (position, end)}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (shape, dtype)), value in zip(tensors.items(), values, strict=True):
            assert value.shape == shape and value.dtype == dtype, (name, value.shape, value.dtype)
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
