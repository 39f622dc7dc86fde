"""Where what is computed once and kept lies on disk, and what checkpoints are called."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "LLAVA_PATCH_CACHE"


def cache_folder() -> Path:
    """`$LLAVA_PATCH_CACHE`, or `llava_patch` in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`)."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_patch"


def default_name(checkpoint: str) -> str:
    """Name of the results' folder: the checkpoint's, with its parent's where it is one of several of a run."""
    path = Path(checkpoint)
    if path.is_dir():
        path = path.resolve()
    return f"{path.parent.name}__{path.name}" if path.name.startswith("checkpoint-") else path.name


def named(checkpoint: str) -> str:
    """A checkpoint whatever way its path is written; what is no local folder is a name of the hub."""
    return str(Path(checkpoint).resolve()) if Path(checkpoint).is_dir() else checkpoint
