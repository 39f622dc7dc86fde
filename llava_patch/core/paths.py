"""Where files lie: what is computed once and kept, and what comes with the package. What checkpoints are called."""

import os
from pathlib import Path

VARIABLE = "LLAVA_PATCH_CACHE"
_PACKAGE = Path(__file__).resolve().parents[1]


def cache_folder() -> Path:
    """`$LLAVA_PATCH_CACHE`, or `llava_patch` in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`)."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_patch"


def default_name(checkpoint: str) -> str:
    """Name of the results' folder: the checkpoint's, with its parents' where it has the same one in every run."""
    *before, last = Path(named(checkpoint)).parts
    names = [last]
    while before and (names[0].startswith("checkpoint-") or names[0] == "llava_patch_adapter"):
        names.insert(0, before.pop())
    return "__".join(names)


def named(checkpoint: str) -> str:
    """A checkpoint whatever way its path is written; what is no local folder is a name of the hub."""
    try:
        return str(Path(checkpoint).resolve()) if Path(checkpoint).is_dir() else checkpoint
    except (OSError, ValueError):  # text from a file, which need be no path
        return checkpoint


def _find(name: str, checkout: str = "") -> Path:
    for folder in (_PACKAGE / "shipped" / name, _PACKAGE.parent / checkout / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"llava_patch's folder {name!r} is missing: reinstall the package")


def gin_dir() -> Path:
    """Folder of the shipped gin files."""
    return _find("gin")


def eval_tasks_dir() -> Path:
    """Folder of the shipped lmms-eval tasks."""
    return _find("eval_tasks")


def locks_dir() -> Path:
    """Folder of the locks: for each stack that llava_patch was run with, the version of every package."""
    return _find("locks", "scripts")
