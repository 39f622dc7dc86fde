"""Writing results: JSON and figures appear whole or not at all; progress goes to stderr."""

from __future__ import annotations

import contextlib
import json
import math
import os
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
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; results are meant to be shared
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(plain(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")
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
