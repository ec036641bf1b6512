"""Folders that appear whole or not at all, whoever else writes at the same place.

A saver works in a folder of its own, `.{name}.{random}.saving` beside the target, and holds a lock on it while it lives.
One rename publishes the result. Where another folder has the name already, that one is moved aside, into the saver's
folder, just before: a saver that is killed between the two leaves it there, and `located` puts it back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

SUFFIX = ".saving"
NEW, PREVIOUS = "new", "previous"
_DAY = 86400  # seconds after which a saver is dead where the file system has no locks


@contextlib.contextmanager
def workspace(parent: Path, name: str) -> Iterator[Path]:
    """A folder in `parent` that nobody else uses, gone at the end. What savers of `name` left that died goes first."""
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent, name)
    folder, lock = _make(parent, name)
    try:
        yield folder
    finally:
        try:
            located(parent / name)
            _retire(folder / PREVIOUS)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def workspace_name(name: str) -> str:
    """A name for a workspace that none has yet."""
    return f".{name}.{secrets.token_hex(4)}{SUFFIX}"


def publish(space: Path, target: Path, before: Callable[[], None]) -> None:
    """Gives `space / NEW` the name `target`, in one rename where the name is free or an empty folder has it.

    `before` is called where a folder has that name, and again if another saver has taken it meanwhile: it raises where
    that folder must stay, and copies what has to outlive it.
    """
    new, previous = space / NEW, space / PREVIOUS
    _sync(new)
    while True:
        try:
            os.rename(new, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        else:
            _sync(target.parent)
            return
        before()
        _retire(previous)  # another saver filled the gap
        with contextlib.suppress(FileNotFoundError):  # another saver is in its gap, or a reader has put it back
            os.rename(target, previous)


def located(directory: Path) -> Path:
    """`directory`; first put back where a saver was killed that had just moved it aside.

    Where it cannot be put back (a file system that is read only), where it is aside.
    """
    if directory.exists() or directory.name == "":
        return directory
    whole = directory.resolve()
    for folder in _workspaces(whole.parent, whole.name):
        previous = folder / PREVIOUS
        try:
            os.rename(previous, whole)
        except OSError:
            if directory.exists():
                break
            if previous.exists():
                return previous
        else:
            break
    return directory


def on_first_process(action: Callable[[], Any], what: str, meanwhile: Callable[[], Any] = lambda: None) -> None:
    """Runs `action` on the first of all processes; returns on all of them when it is done, raises on all where it failed.

    `meanwhile` is run by the others, and by the first one after a failure: it holds the collectives that all take part in.
    """
    failure: BaseException | None = None
    first, several = jax.process_index() == 0, jax.process_count() > 1
    if first:
        try:
            action()
        except BaseException as error:
            failure = error
    if several:
        from jax.experimental import multihost_utils

        if not first or failure is not None:
            meanwhile()
        failed = multihost_utils.broadcast_one_to_all(np.int32(failure is not None))
        if failed and failure is None:
            raise RuntimeError(f"{what} failed on the first process: its error says why")
    if failure is not None:
        raise failure


def _workspaces(parent: Path, name: str) -> list[Path]:
    try:
        found = sorted(entry.name for entry in os.scandir(parent))
    except OSError:
        return []
    begin = f".{name}."
    length = len(begin) + 8 + len(SUFFIX)
    return [parent / x for x in found if x.startswith(begin) and x.endswith(SUFFIX) and len(x) == length]


def _make(parent: Path, name: str) -> tuple[Path, int]:
    while True:
        folder = parent / workspace_name(name)
        folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # swept before it was locked
            continue
        alive = _lock(lock)
        if alive is not False and folder.exists() and os.path.samestat(os.fstat(lock), folder.stat()):
            return folder, lock
        os.close(lock)


def _sweep(parent: Path, name: str) -> None:
    located(parent / name)
    for folder in _workspaces(parent, name):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            try:
                free = _lock(lock)
                if free or (free is None and time.time() - _newest(folder) > _DAY):
                    _retire(folder / PREVIOUS)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _retire(previous: Path) -> None:
    """Takes its name from what a newer folder has replaced, so that a half-removed one is never put back."""
    with contextlib.suppress(FileNotFoundError):
        os.rename(previous, previous.with_name(secrets.token_hex(4)))


def _lock(file: int) -> bool | None:
    """Whether the lock is ours now; None where this file system has none."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def _newest(folder: Path) -> float:
    return max([folder.stat().st_mtime, *(path.stat().st_mtime for path in folder.rglob("*"))])


def _sync(folder: Path) -> None:
    """Forces names in a folder to disk, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
