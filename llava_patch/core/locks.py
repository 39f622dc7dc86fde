"""Locks between processes, and one run at a time in a folder of results."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock
from filelock import Timeout

from llava_patch.core import files, parallel
from llava_patch.core.errors import BusyError, StorageError, brief

LOCK_FILE = ".lock"
_held: set[Path] = set()


class FileLock(filelock.FileLock):
    """A lock that no other of its path is: lmms-eval has filelock's own class return one lock a path, as first made."""


@contextlib.contextmanager
def folder_lock(folder: Path | None, advice: str = "give another --output") -> Iterator[None]:
    """Keep other runs out of a folder for the time of the block; rank 0 does, and its process may enter again.

    The lock ends with its process, however that ends. Neither the lock's file nor a folder in which nothing was written
    stays. BusyError: another process works there; StorageError: the folder cannot be written.
    """
    path = None if folder is None or parallel.rank() != 0 else Path(folder).resolve() / LOCK_FILE
    with _file_lock(path, folder, advice):
        yield


@contextlib.contextmanager
def output_lock(folder: Path, advice: str = "give another --output") -> Iterator[None]:
    """The same for a folder that is to appear whole: the lock's file lies beside it.

    Who was killed while he wrote it leaves that file, and hidden folders, which are taken away here.
    """
    place = Path(os.path.realpath(folder))
    path = place / LOCK_FILE if files.stays(place) else place.with_name(f".{place.name}{LOCK_FILE}")
    killed = os.path.lexists(path)
    with _file_lock(path, folder, advice):
        for left in files.left_beside(place) if killed else ():
            shutil.rmtree(left, ignore_errors=True)
        yield


@contextlib.contextmanager
def _file_lock(path: Path | None, folder: Path | None, advice: str) -> Iterator[None]:
    if path is None or path in _held:
        yield
        return
    # Made before the first write: what a failed run would leave behind is taken away again.
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire(path)
    except Timeout as error:
        raise BusyError(f"another run works in {folder}: wait for it or {advice}") from error
    except (OSError, NotImplementedError) as error:
        _take_away(made)
        raise StorageError(f"{folder} cannot be written or locked ({brief(error)}): {advice}") from error
    _held.add(path)
    try:
        yield
    finally:
        _held.remove(path)
        _let_go(path, lock)
        with contextlib.suppress(OSError):
            if not any(path.parent.iterdir()):
                _take_away(made)


@contextlib.contextmanager
def held(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold the lock of a file, which is taken away at the end; below 0 the wait has no end, else Timeout is raised."""
    lock = _acquire(path, timeout)
    try:
        yield
    finally:
        _let_go(path, lock)


def _acquire(path: Path, timeout: float = 0) -> FileLock:
    """The lock on a file that is still there: its last holder takes it away, and others may hold one by its name."""
    while True:
        lock = FileLock(path, timeout=timeout)
        lock.acquire()
        descriptor = getattr(getattr(lock, "_context", lock), "lock_file_fd", None)
        if descriptor is None or is_of(descriptor, path):
            return lock
        lock.release()


def is_of(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at a path, so that whoever locks it keeps others out."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _let_go(path: Path, lock: FileLock) -> None:
    with contextlib.suppress(OSError):
        path.unlink()  # while it is held: `_acquire` sees to who waits for it
    lock.release()


def _take_away(folders: list[Path]) -> None:
    """Remove folders, the innermost first, as far as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
