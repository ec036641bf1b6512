"""CRC-32 of what was saved, so that a byte that has changed since is found before it becomes a number in a model.

Safetensors files carry theirs in their own header: one of the header, one for each block of the data, so that a reader
checks only the blocks that it reads. Other files are summed up, one by one, in `checksums.*.json` beside them.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ring_jax.models import hf

BLOCK = 1 << 22  # bytes
KEY = "ring_jax.crc32"  # in the metadata of a safetensors header
_DIGITS = 8


class Blocks:
    """Sums of the blocks of a stream of bytes."""

    def __init__(self) -> None:
        self.sums: list[int] = []
        self._room = 0

    def add(self, data: memoryview) -> None:
        while data.nbytes:
            if not self._room:
                self.sums.append(0)
                self._room = BLOCK
            part, data = data[: self._room], data[self._room :]
            self.sums[-1] = zlib.crc32(part, self.sums[-1])
            self._room -= part.nbytes


def placeholder(size: int) -> str:
    """What stands in a header for the sums of `size` bytes while they are not known: as long as they will be."""
    return "0" * (_DIGITS * (1 + -(-size // BLOCK)))


def filled(header: bytes, zeros: str, blocks: Blocks) -> bytes:
    """The header with its sums in the place of `zeros`."""
    sums = [zlib.crc32(header), *blocks.sums]
    text = "".join(f"{x:0{_DIGITS}x}" for x in sums)
    assert len(text) == len(zeros) and header.count(f'"{zeros}"'.encode()) == 1
    return header.replace(f'"{zeros}"'.encode(), f'"{text}"'.encode())


class Verifier:
    """The sums of one safetensors file, checked block by block as they are asked for; thread-safe.

    Args:
        path: the file. header: its JSON text. text: the entry under `KEY` in its metadata.

    Raises:
        ValueError: the header is not what was saved.
    """

    def __init__(self, path: Path, header: bytes, text: str):
        self._path, self._begin = path, 8 + len(header)
        self._size = path.stat().st_size - self._begin
        zeros = placeholder(self._size)
        try:
            whole = len(text) == len(zeros) and header.count(text.encode()) == 1
            sums = [int(text[i : i + _DIGITS], 16) for i in range(0, len(text), _DIGITS)] if whole else []
        except ValueError:
            sums = []
        if not sums or zlib.crc32(header.replace(text.encode(), zeros.encode())) != sums[0]:
            raise self._changed("its header")
        self._sums, self._done = sums[1:], [False] * (len(sums) - 1)
        self._file = os.open(path, os.O_RDONLY)

    def check(self, start: int, stop: int) -> None:
        """Raises ValueError unless the blocks with bytes [start, stop) of the data are those that were saved."""
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            if not self._done[block]:
                data = os.pread(self._file, min(BLOCK, self._size - block * BLOCK), self._begin + block * BLOCK)
                if zlib.crc32(data) != self._sums[block]:
                    raise self._changed(f"block {block} of its data")
                self._done[block] = True

    def close(self) -> None:
        os.close(self._file)

    def _changed(self, what: str) -> ValueError:
        return ValueError(
            f"{self._path} is damaged: {what} has another checksum than when it was saved. Fetch or save it again; if "
            "another program has rewritten it on purpose, pass verify=False"
        )


def write_sums(folder: Path, paths: Iterable[Path], name: str) -> None:
    """Sums up files below `folder` in `checksums.{name}.json` there."""
    paths = sorted(paths)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sums = list(pool.map(_sum, paths))
    files = {str(path.relative_to(folder)): x for path, x in zip(paths, sums, strict=True)}
    text = json.dumps({"crc32": files, "own": _own_sum(files)}, indent=1)
    (folder / f"checksums.{name}.json").write_text(text + "\n")


def is_sums(path: Path) -> bool:
    """Whether this is a file that `write_sums` writes."""
    return path.name.startswith("checksums.") and path.name.endswith(".json")


def changed_files(folder: Path, under: Iterable[str], share: tuple[int, int] = (0, 1)) -> list[str]:
    """Files below `folder` that are not as `write_sums` saw them; those without a sum are not looked at.

    Args:
        under: only files in these subfolders, and those in none.
        share: (i, n) looks at every n-th file, from the i-th.

    Raises:
        ValueError: the sums themselves cannot be read.
    """
    expected: dict[str, Any] = {}
    for path in sorted(folder.glob("checksums.*.json")):
        fields = hf.Fields.of(path)
        sums = fields.inside("crc32").values
        if fields.values.get("own") != _own_sum(sums):
            raise ValueError(f"{path} is damaged: it is not the list of checksums that was written")
        expected |= sums
    wanted = {*under}
    names = sorted(name for name in expected if "/" not in name or name.split("/", 1)[0] in wanted)[
        share[0] :: share[1]
    ]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda name: _sum(folder / name), names)
        return [name for name, x in zip(names, found, strict=True) if x != expected[name]]


def _own_sum(files: Any) -> int:
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())


def _sum(path: Path) -> list[int] | None:
    """Size and sum of a file, None where it is missing."""
    try:
        with open(path, "rb") as file:
            size = total = 0
            while data := file.read(BLOCK):
                size, total = size + len(data), zlib.crc32(data, total)
    except FileNotFoundError:
        return None
    return [size, total]
