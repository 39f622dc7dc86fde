"""Locks between processes, and one run at a time in a folder of results."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock
from filelock import Timeout

from llava_patch.core import parallel
from llava_patch.core.errors import CheckpointError

LOCK_FILE = ".lock"
_held: set[Path] = set()


class FileLock(filelock.FileLock):
    """A lock that no other of its path is: lmms-eval has filelock's own class return one lock a path, as first made."""


@contextlib.contextmanager
def folder_lock(folder: Path | None) -> Iterator[None]:
    """Keep other runs out of a folder for the time of the block; rank 0 does, and its process may enter again.

    The lock ends with its process, however that ends. A folder in which nothing was written does not stay.
    """
    path = None if folder is None or parallel.rank() != 0 else Path(folder).resolve() / LOCK_FILE
    if path is None or path in _held:
        yield
        return
    # Made before the first write: what a failed run would leave behind is taken away again.
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(f"another run works in {folder}: wait for it or give another --output") from error
    except (OSError, NotImplementedError) as error:
        raise CheckpointError(f"{folder} cannot be written or locked ({error}): give another --output") from error
    _held.add(path)
    try:
        yield
    finally:
        _held.remove(path)
        with contextlib.suppress(OSError):
            if [entry.name for entry in path.parent.iterdir()] == [LOCK_FILE]:
                path.unlink()
                for parent in made:
                    parent.rmdir()
        lock.release()
