"""Small pages and annotation files of our own words."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image


def page(path: Path, width: int = 100, height: int = 60) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (240, 240, 240)).save(path)
    return path


def text(path: Path, *lines: str, ending: str = "\n", encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ending.join(lines).encode(encoding))
    return path


def document(path: Path, values: object) -> Path:
    return text(path, json.dumps(values))


def quad(x0: float, y0: float, x1: float, y1: float) -> str:
    return f"{x0},{y0},{x1},{y0},{x1},{y1},{x0},{y1}"
