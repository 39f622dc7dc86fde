"""Writing results: JSON and figures appear whole or not at all; digests of values; progress goes to stderr."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def atomic(path: Path, folder: bool = False) -> Iterator[Path]:
    """A path beside `path`, of the same suffix, for a file that takes its place when the block ends well.

    With `folder` it is a new folder, and `path` must be missing or an empty one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}{path.suffix}")
    try:
        if folder:
            temporary.mkdir()
        yield temporary
        _share(temporary.rglob("*") if folder else [temporary])
        temporary.replace(path)
    finally:
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


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
    """Write text in UTF-8 atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def track(items: Iterable[T], description: str, show: bool) -> Iterator[T]:
    """Iterate with a progress bar on stderr."""
    if not show:
        return iter(items)
    from rich.console import Console
    from rich.progress import track as rich_track

    return iter(rich_track(items, description, console=Console(stderr=True)))
