"""Reads one's own R-Probe samples: a JSONL file of {"image", "text", "box", ("all_boxes", "document")}."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_patch.errors import InputError
from llava_patch.probe.sample import Box, Sample


def read_jsonl(path: str | Path) -> list[Sample]:
    """Read samples; image paths are relative to the file's folder.

    Lines of one image belong to one document unless they say otherwise: its regions are never split between training
    and held-out samples.

    Raises:
        InputError: names file and line: a missing file, broken JSON, a missing field or image, or a bad box.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"R-Probe data {path}: no such file")
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            samples.append(_sample(line, path.parent, f"{path}:{number}"))
    if not samples:
        raise InputError(f"R-Probe data {path}: no sample in it")
    return samples


def _sample(line: str, folder: Path, where: str) -> Sample:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object with image, text and box, got {type(values).__name__}")
    missing = [name for name in ("image", "text", "box") if name not in values]
    if missing:
        raise InputError(f"{where}: lacks {', '.join(missing)}")
    image = folder / str(values["image"])
    if not image.is_file():
        raise InputError(f"{where}: image {image} is missing")
    return Sample(
        image=image,
        text=str(values["text"]),
        boxes=(_box(values["box"], where),),
        all_boxes=tuple(_box(box, where) for box in values.get("all_boxes", ())),
        id=where,
        document=str(values.get("document", image)),
    )


def _box(value: Any, where: str) -> Box:
    try:
        x0, y0, x1, y1 = (float(number) for number in value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: box {value!r}: expected [x0, y0, x1, y1] in pixels") from error
    return x0, y0, x1, y1
