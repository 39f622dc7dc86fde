"""Writing results: JSON and figures appear whole or not at all; progress goes to stderr."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file of the same folder and suffix that takes `path`'s place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _share(temporary, 0o666)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place (it must be missing or empty) when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        yield temporary
        _share(temporary, 0o777)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _share(path: Path, mode: int) -> None:
    """Give the usual permissions: tempfile makes things private, results are meant to be shared."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(mode & ~umask)


def plain(value: Any) -> Any:
    """JSON has no NaN: turn non-finite numbers into None, in nested lists and dictionaries too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


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
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    total = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    yield from rich_track(items, description, total=total, console=Console(stderr=True))
