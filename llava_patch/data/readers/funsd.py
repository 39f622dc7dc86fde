"""FUNSD: annotations/NAME.json with {"form": [{"text", "box", "words"}, …]} beside images/NAME.png.

Every entry with a text is a sample, its box in pixels; entries without one are boxes of the page alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_patch.core.errors import InputError
from llava_patch.data.readers.files import Images, four_numbers, load_json
from llava_patch.data.readers.samples import Collector
from llava_patch.probe.sample import Box


def read_funsd(files: list[Path], images: Images, collector: Collector) -> None:
    """Read FUNSD's JSON files, one a page, in their order; entries are called FILE:form[INDEX]."""
    for file in files:
        with collector.one():
            values = load_json(file)
            form = values.get("form") if isinstance(values, dict) else None
            if not isinstance(form, list):
                raise InputError(f'{file}: not a FUNSD file: expected {{"form": [...]}}')
            image = images.of(file)
            assert image is not None
            page = collector.page(image, str(image), str(file))
            for index, entry in enumerate(form):
                with collector.one():
                    where = f"{file}:form[{index}]"
                    text, box = _entry(entry, where)
                    if box is not None:
                        collector.region(page, text, [box], where)


def _entry(entry: Any, where: str) -> tuple[str, Box | None]:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected an object with text and box, got {type(entry).__name__}")
    words = entry.get("words") or []
    if not isinstance(words, list):
        raise InputError(f"{where}: words is {words!r}: expected a list")
    words = [word for word in words if isinstance(word, dict)]
    text = entry.get("text")
    if text is None:
        text = " ".join(str(word.get("text", "")) for word in words)
    if not isinstance(text, str):
        raise InputError(f"{where}: text is {text!r}: expected a string")
    if "box" in entry:
        return text, four_numbers(entry["box"], f"{where}: box", "[x0, y0, x1, y1] in pixels")
    boxes = [four_numbers(word.get("box"), f"{where}: box", "[x0, y0, x1, y1] in pixels") for word in words]
    if not boxes:
        if text.strip():
            raise InputError(f"{where}: lacks box")
        return text, None
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return text, (min(x0), min(y0), max(x1), max(y1))
