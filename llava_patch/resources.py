"""Finds the files that come with the package: gin files and lmms-eval tasks, in a checkout or in a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _find(name: str) -> Path:
    for folder in (_PACKAGE / "shipped" / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"llava_patch's folder {name!r} is missing: reinstall the package")


def gin_dir() -> Path:
    """Folder of the shipped gin files."""
    return _find("gin")


def eval_tasks_dir() -> Path:
    """Folder of the shipped lmms-eval tasks."""
    return _find("eval_tasks")
