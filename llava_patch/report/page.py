"""Writes the page: one HTML file that refers to nothing outside itself."""

from __future__ import annotations

import base64
import json
from importlib import resources
from pathlib import Path
from typing import Any

from llava_patch.files import atomic

PAGE = "report.html"
TEMPLATE = "report.html.j2"


def write(values: dict[str, Any], folder: Path) -> Path:
    """Render what `build` kept.

    Args:
        values: from `build.build` or `build.read`.
        folder: the report's, with the figures in it.

    Returns:
        The page's path.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = (resources.files("llava_patch.report") / TEMPLATE).read_text(encoding="utf-8")
    template = environment.from_string(source)
    # A figure written over since its section was measured would show other numbers than the table beside it; a
    # missing one is an error of the file system that must be seen.
    text = template.render(
        **values,
        name=Path(values["checkpoint"]).name,
        picture=lambda file: _data(folder / file),
        pretty=lambda value: json.dumps(value, indent=1, default=str),
    )
    path = folder / PAGE
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _data(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
