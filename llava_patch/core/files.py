"""Writing: files and whole folders appear complete or not at all, on the disk too; progress goes to stderr."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, TypeVar

from llava_patch.core.errors import LlavaPatchError, StorageError, brief

T = TypeVar("T")

_REFUSED = {
    errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "the file is too large",
    errno.EROFS: "it is read-only", errno.EACCES: "you may not write there", errno.EPERM: "you may not write there",
    errno.ENOTDIR: "a part of the path is a file", errno.EEXIST: "a part of the path is a file",
    errno.EISDIR: "it is a folder", errno.EIO: "the disk fails",
    errno.EXDEV: "a part of it lies on another disk", errno.EBUSY: "another process uses it",
    errno.ENOTEMPTY: "another process has written there",
    errno.ENAMETOOLONG: "the name is too long", errno.ELOOP: "its links go round in a circle",
}  # fmt: skip
_FREE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what a full disk, or a folder that takes nothing, raises inside the block into one error about `path`.

    Whatever writes says it in its own way: an OSError, safetensors' and torch's own errors with the system's in their
    text.
    """
    try:
        yield
    except LlavaPatchError:
        raise
    except Exception as error:
        number = _number(error)
        if number is None or not _is_about(error, path):
            raise
        advice = f"free some of {free(path)} or name another folder" if number in _FREE else "name another folder"
        name = str(path) if len(str(path)) < 500 else f"{str(path)[:100]}..."
        raise StorageError(f"{name}: cannot be written: {_REFUSED[number]} ({brief(error)}): {advice}") from error


def _number(error: BaseException) -> int | None:
    """The number of the system's error behind an exception; None: it is about something else."""
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return error.errno if error.errno in _REFUSED else None
    text = str(error)
    if type(error).__name__ == "SafetensorError":
        return next((n for n in _REFUSED if f"(os error {n})" in text), None)
    if "PytorchStreamWriter failed" in text or "file write failed" in text:
        return errno.ENOSPC
    return None


def _is_about(error: BaseException, path: Path) -> bool:
    """Whether an error can be about writing `path`: the file that it names, if any, lies there or is a folder above."""
    named = getattr(error, "filename", None)
    if not isinstance(named, (str, os.PathLike)) or getattr(error, "errno", None) in _FREE:
        return True
    one, other = Path(named).absolute(), path.absolute()
    first = one.relative_to(other.parent).parts[:1] if one.is_relative_to(other.parent) else ()
    own = any(name == other.name or name.startswith(f".{other.stem[:100]}-") for name in first)
    return own or one.is_relative_to(other) or other.is_relative_to(one)


def free(folder: Path) -> str:
    """How much room the disk of a folder has, in words."""
    try:
        return f"the disk's space ({shutil.disk_usage(_present(folder)).free / 1e9:.2f} GB left)"
    except OSError:
        return "the disk's space"


def _present(folder: Path) -> Path:
    """A folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next((place for place in (folder, *folder.parents) if place.is_dir()), Path(folder.anchor))


def check_space(path: Path, size: float, what: str = "") -> None:
    """Refuse, before anything is written, what the disk under a file or folder has no room for; `size` in bytes."""
    try:
        usage = shutil.disk_usage(_present(path))
        left = usage.free
    except OSError:  # the write itself will tell
        return
    if size > left and usage.total:  # some network disks tell nothing
        raise StorageError(
            f"{path}: {what or 'what is to be written'} takes {size / 1e9:.2f} GB, and the disk has {left / 1e9:.2f} "
            "GB left: free some or name another folder"
        )


@contextlib.contextmanager
def atomic(path: Path, folder: bool = False, size: float = 0) -> Iterator[Path]:
    """A path beside `path`, of the same suffix, for a file that takes its place when the block ends well.

    With `folder` it is a new folder, and `path` must be missing or an empty one. What is written is on the disk before
    it takes the place. StorageError: the disk or folder does not take it, or has less room than `size` bytes.
    """
    if folder and stays(path):
        with staged(path, {}) as new:
            yield new
        return
    path = _real(path) if folder else path
    with storage_errors(path):
        if folder and path.exists() and not path.is_dir():
            raise StorageError(f"{path}: a file is in the way of this folder: name another one")
        if size:
            check_space(path.parent, size, path.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = beside(path)
        try:
            if folder:
                temporary.mkdir()
            yield temporary
            written = [file for file in temporary.rglob("*") if file.is_file()] if folder else [temporary]
            _share(written)
            for file in (*written, *([temporary] if folder else [])):
                _sync(file)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            if folder:
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)


def beside(path: Path) -> Path:
    """A new hidden name in the folder of `path`, with its suffix; a run that is killed may leave one behind."""
    return path.with_name(f".{path.stem[:100]}-{uuid.uuid4().hex}{path.suffix}")


def left_beside(path: Path) -> list[Path]:
    """What is still there under names that `beside` gave for a path: of runs that were killed, or that write now."""
    name = re.compile(rf"\.{re.escape(path.stem[:100])}-[0-9a-f]{{32}}{re.escape(path.suffix)}")
    folders = [path.parent, *([path] if path.is_dir() else [])]
    return [other for folder in folders for other in folder.iterdir() if name.fullmatch(other.name)]


def stays(folder: Path) -> bool:
    """Whether a folder cannot be replaced as a whole: it is where another disk is mounted, or only it takes files."""
    place = os.path.realpath(folder)
    return os.path.isdir(place) and (os.path.ismount(place) or not os.access(os.path.dirname(place), os.W_OK | os.X_OK))


def _real(folder: Path) -> Path:
    """A folder without links, beside which there is its own disk; one whose links go round stays as it is."""
    return Path(os.path.realpath(folder)) if folder.exists() or not folder.is_symlink() else folder


def _sync(path: Path) -> None:
    """Have a file, or a folder's list of names, written to the disk; some network disks cannot, and do without."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _appears(new: Path, folder: Path) -> bool:
    """Put a whole folder in the place of one that is missing or empty; False: there are files in it."""
    if folder.is_dir() and any(folder.iterdir()):
        return False
    try:
        new.replace(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False  # another process, such as another rank of this run, was first
    _sync(folder.parent)
    return True


@contextlib.contextmanager
def staged(folder: Path, last: Mapping[str, str | None], replaced: Iterable[str] = ()) -> Iterator[Path]:
    """A new folder beside `folder` (in it, where it `stays`) whose files take their places in it at a good end.

    A `folder` that was not there appears at once. In one that was, files of the same names are replaced and others
    stay, but for those of some patterns (`replaced`). Those that make it what it is (`last`) come after all others;
    until then, from before the first one is replaced, they hold a text that says so (None: are not there), so that what
    a process leaves that is killed in between cannot be taken for either. StorageError as of `atomic`.
    """
    folder = _real(folder)
    with storage_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise StorageError(f"{folder}: a file is in the way of this folder: name another one")
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = folder / beside(folder).name if stays(folder) else beside(folder)
        begun = False
        try:
            new.mkdir()
            yield new
            written = [file for file in new.iterdir() if file.is_file()]
            _share(written)
            for file in written:
                _sync(file)
            if not stays(folder) and _appears(new, folder):
                return
            begun = True  # from here on `new` is the only whole copy
            for name, text in last.items():
                if text is None:
                    (folder / name).unlink(missing_ok=True)
                else:
                    write_text(folder / name, text)
            names = {file.name for file in new.iterdir()}
            for pattern in replaced:
                for file in folder.glob(pattern):
                    if file.name not in names and not file.is_dir():
                        file.unlink(missing_ok=True)
            order = {name: place for place, name in enumerate(last, 1)}
            for file in sorted(new.iterdir(), key=lambda file: (order.get(file.name, 0), file.name)):
                target = folder / file.name
                if target.is_dir() and not target.is_symlink():
                    shutil.rmtree(target)
                file.replace(target)
            _sync(folder)
            begun = False
        except OSError as error:
            if begun:
                raise StorageError(
                    f"{folder}: broken off while files were replaced ({brief(error)}): the rest of the save is in "
                    f"{new}: move its files there, or save elsewhere"
                ) from error
            raise
        finally:
            if not begun:
                shutil.rmtree(new, ignore_errors=True)


def _share(paths: Iterable[Path]) -> None:
    """Give files the usual permissions: safetensors makes them private, results are meant to be shared."""
    umask = os.umask(0)
    os.umask(umask)
    for path in paths:
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)


def plain(value: Any) -> Any:
    """JSON has no NaN: turn non-finite numbers into None, in nested lists and dictionaries too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def digest(value: Any) -> str:
    """Hexadecimal digest of JSON values, for what depends on them; equal values give equal ones in every process."""
    text = json.dumps(value, sort_keys=True, default=_named)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _named(value: Any) -> str:
    """What JSON has no form for (dtypes, enumerations, paths); an object without a text of its own is its class."""
    text = str(value)
    return type(value).__qualname__ if " at 0x" in text else text


def write_json(path: Path, value: Any) -> Path:
    """Write plain JSON values atomically."""
    return write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write text in UTF-8 atomically; what no encoding has (half a surrogate pair) as its number."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def track(items: Iterable[T], description: str, show: bool) -> Iterator[T]:
    """Iterate with a progress bar on stderr."""
    if not show:
        return iter(items)
    from llava_patch.core.terminal import progress_bar

    def tracked() -> Iterator[T]:
        with progress_bar(len(items) if isinstance(items, Sized) else None, description, True) as bar:
            for item in items:
                yield item
                bar.update()

    return tracked()
