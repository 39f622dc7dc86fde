"""Writes the page: one HTML file that refers to nothing outside itself."""

from __future__ import annotations

import base64
import json
from importlib import resources
from pathlib import Path
from typing import Any

from llava_patch.core.extras import optional
from llava_patch.core.files import write_text

PAGE = "report.html"
TEMPLATE = "report.html.j2"
SHOWN = 0.65
"""Pixels of the page for one of a figure: 200 dots an inch are finer than a screen."""
BROAD = 1.8
"""Width over height from which a figure scrolls on a phone instead of becoming too small to read."""


def write(values: dict[str, Any], folder: Path) -> Path:
    """Render what `build` kept."""
    jinja2 = optional("jinja2")

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = (resources.files("llava_patch.tools.report") / TEMPLATE).read_text(encoding="utf-8")
    text = environment.from_string(source).render(
        **values,
        name=Path(values["checkpoint"]).name,
        picture=lambda file: _picture(folder / file),
        pretty=lambda value: json.dumps(value, indent=1, default=str),
    )
    return write_text(folder / PAGE, text)


def _picture(path: Path) -> dict[str, Any]:
    """What an img element needs: its data, its size in pixels, and whether it is broad (several panels in a row)."""
    from PIL import Image

    with Image.open(path) as image:
        width, height = image.size
    data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
    shown = {"width": round(SHOWN * width), "height": round(SHOWN * height)}
    return {"data": data, **shown, "broad": width > BROAD * height}
