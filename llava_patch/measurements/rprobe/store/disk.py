"""Stores on disk: `$LLAVA_PATCH_CACHE/rprobe/KEY/shard-NNNNN.safetensors`, bounded in size.

Processes need no word between them: each takes the next shard that is missing and that nobody else has locked, and
trusts only files that it sees. So ranks of one run, and runs that want the same tokens, share the work, and what a
process that died left undone, another does. A process that reads a store holds a lock in it for as long as it lives,
and a store with such a lock is not deleted.
"""

import contextlib
import logging
import os
import shutil
import socket
import uuid
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout
from safetensors import SafetensorError

from llava_patch.core.errors import CheckpointError, LlavaPatchError, SettingError, StorageError
from llava_patch.core.files import write_json
from llava_patch.core.locks import LOCK_FILE, FileLock, held
from llava_patch.core.paths import VARIABLE, cache_folder
from llava_patch.core.stored import read_object
from llava_patch.measurements.rprobe.store.shard import DamagedShard, Shard, open_shard, write_shard

MANIFEST = "manifest.json"
DELETED = ".deleted-"
GB = 1e9
IN_MEMORY = "or set RProbe.store = False (then they are kept in memory)"
logger = logging.getLogger("llava_patch")


def stores_folder() -> Path:
    """Where all stores are."""
    return cache_folder() / "rprobe"


@dataclass(frozen=True)
class Kept:
    """A store on disk: its manifest (or {}), the bytes of all its files, and when it was last opened (Unix time)."""

    folder: Path
    about: dict[str, Any]
    bytes: int
    used: float


def list_stores(root: Path) -> list[Kept]:
    """All stores under `stores_folder()`, the longest unused first."""
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        about: dict[str, Any] = {}
        size, used = 0, 0.0
        if (folder / MANIFEST).is_file():
            try:
                about = read_object(folder / MANIFEST)
            except CheckpointError as error:
                logger.warning("llava_patch: %s: what this store holds is not known", error)
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):  # it went away meanwhile
                size += path.stat().st_size
                used = path.stat().st_mtime if path == folder / "used" else used
        found.append(Kept(folder, about, size, used))
    return sorted(found, key=lambda kept: (kept.used, kept.folder.name))


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Only one process at a time enters or deletes stores."""
    with contextlib.ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(root / LOCK_FILE))
        except (OSError, NotImplementedError) as error:
            raise StorageError(
                f"R-Probe's store {root} cannot be written or locked ({error}): set {VARIABLE} to a folder where that "
                "is possible, or RProbe.store = False"
            ) from error
        yield


def in_use(folder: Path) -> bool:
    """Whether a living process reads the store; marks of dead ones are taken away."""
    for path in (folder / "users").glob("*.lock"):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):  # held, or another user's
            return True
        lock.release()
        path.unlink(missing_ok=True)
    return False


def delete_unused(root: Path) -> tuple[list[Kept], list[Kept]]:
    """Delete every store that no living process uses; returns (deleted, left)."""
    deleted: list[Kept] = []
    left: list[Kept] = []
    if root.is_dir():
        with _alone(root):
            for kept in list_stores(root):
                (left if in_use(kept.folder) else deleted).append(kept)
            for kept in deleted:
                _delete(kept.folder)
            for leftover in root.glob(f"{DELETED}*"):  # of a process that died
                shutil.rmtree(leftover, ignore_errors=True)
    return deleted, left


def _delete(folder: Path) -> None:
    # Renamed first: half a store must not be found under its key.
    gone = folder.with_name(f"{DELETED}{uuid.uuid4().hex}")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _leave(user: Path, lock: Any) -> None:
    # May run in the middle of anything (garbage collection), so it must wait for no other lock.
    lock.release()
    with contextlib.suppress(OSError):
        user.unlink(missing_ok=True)


class Store:
    """The store of one key, in use by this process until `close`, or until nothing refers to this object any more."""

    def __init__(self, key: str, shards: int, about: dict[str, Any], limit_gb: float) -> None:
        """Enter the store of that key; it need not exist. `about` is for the list that a person reads."""
        self.key, self.shards, self.about, self.limit_gb = key, shards, about, limit_gb
        self.folder = stores_folder() / key
        with _alone(self.folder.parent):
            users = self.folder / "users"
            users.mkdir(parents=True, exist_ok=True)
            user = users / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.lock"
            lock = FileLock(user, thread_local=False)  # whichever thread collects it must be able to release it
            lock.acquire()
            (self.folder / "used").touch()
        self._leave = weakref.finalize(self, _leave, user, lock)

    def close(self) -> None:
        """Leave it; nothing stays of a store into which nothing was written."""
        self._leave()
        with contextlib.suppress(OSError, LlavaPatchError), _alone(self.folder.parent):
            if not in_use(self.folder) and not any(self.folder.glob("shard-*.safetensors")):
                _delete(self.folder)

    def path(self, number: int) -> Path:
        """File of a shard."""
        return self.folder / f"shard-{number:05d}.safetensors"

    def open(self, number: int) -> Shard | None:
        """Map a shard; None where it is missing, or damaged (which is logged)."""
        path = self.path(number)
        try:
            return open_shard(path, self.key, number)
        except DamagedShard as error:
            logger.warning("llava_patch: %s cannot be used (%s): its images are encoded again", path, error)
            path.unlink(missing_ok=True)
            return None

    def fill(self, encode: Callable[[int], Shard], done: Callable[[int], None]) -> list[Shard]:
        """All shards, mapped; what is missing is encoded and written. `done` is told each number that is there now."""
        shards: dict[int, Shard] = {}
        # First those that are there. Those that another process is busy with come last: by then it has finished, failed
        # or died.
        for waits in (None, False, True):
            if waits and len(shards) < self.shards:
                logger.info("llava_patch: R-Probe waits for another process that encodes into %s", self.folder)
            for number in [n for n in range(self.shards) if n not in shards]:
                if (found := self.open(number) if waits is None else self._make(number, encode, waits)) is not None:
                    shards[number] = found
                    done(number)
            if waits is None and len(shards) == self.shards:  # the bound may have come down since it was written
                self._make_room(0)
        return [shards[number] for number in range(self.shards)]

    def _make(self, number: int, encode: Callable[[int], Shard], waits: bool) -> Shard | None:
        """Encode and write a shard; None where another process does, and this one does not wait for it."""
        locks, path = self.folder / "locks", self.path(number)
        locks.mkdir(exist_ok=True)
        try:
            with held(locks / f"{number:05d}.lock", -1 if waits else 0):
                if (there := self.open(number)) is not None:
                    return there
                for leftover in self.folder.glob(f".{path.stem}-*"):  # of a process that died
                    leftover.unlink(missing_ok=True)
                shard = encode(number)
                self._make_room(shard.bytes)
                try:
                    if not (self.folder / MANIFEST).is_file():
                        write_json(self.folder / MANIFEST, {**self.about, "shards": self.shards})
                    write_shard(path, shard, self.key, number)
                except (OSError, SafetensorError) as error:
                    raise StorageError(
                        f"R-Probe's store {self.folder} cannot be written ({error}): set {VARIABLE} to a folder with "
                        "room, or RProbe.store = False"
                    ) from error
        except Timeout:
            return None
        return open_shard(path, self.key, number)

    def _make_room(self, shard_bytes: int) -> None:
        """Delete the longest unused other stores until this one fits when it is finished."""
        there = [p.stat().st_size for p in self.folder.glob("shard-*.safetensors")]
        to_come = int((sum(there) + shard_bytes) / (len(there) + 1) * (self.shards - len(there)))
        whole, limit = sum(there) + to_come, self.limit_gb * GB
        take, bound = f"R-Probe's frozen tokens take about {whole / GB:.3g} GB on disk", f"{self.limit_gb:g}"
        if whole > limit:
            raise SettingError(
                f"{take}, RProbe.store_gb = {bound}: raise it, use fewer pages (RProbe.train_pages, heldout_pages) or "
                f"samples, {IN_MEMORY}"
            )
        with _alone(self.folder.parent):
            others = [kept for kept in list_stores(self.folder.parent) if kept.folder != self.folder]
            kept_bytes = sum(kept.bytes for kept in others)
            for kept in others:
                if kept_bytes + whole <= limit and shutil.disk_usage(self.folder).free >= to_come:
                    return
                if not in_use(kept.folder):
                    logger.info("llava_patch: R-Probe's store %s is deleted to make room", kept.folder)
                    _delete(kept.folder)
                    kept_bytes -= kept.bytes
            free = shutil.disk_usage(self.folder).free
        if kept_bytes + whole > limit:
            raise SettingError(
                f"{take} and {kept_bytes / GB:.3g} GB belong to stores in use (this run's other half, or other runs), "
                f"RProbe.store_gb = {bound}: raise it, use fewer pages or samples, {IN_MEMORY}"
            )
        if free < to_come:
            raise StorageError(
                f"R-Probe's frozen tokens need about {to_come / GB:.3g} GB more, {free / GB:.3g} GB are free under "
                f"{self.folder.parent} (RProbe.store_gb = {bound}): set {VARIABLE} to a larger disk, use fewer pages "
                f"or samples, {IN_MEMORY}"
            )
