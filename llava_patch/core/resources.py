"""Finds the files that come with the package: gin files, lmms-eval tasks, locks; in a checkout or in a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


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
