"""R-Probe's own format: a JSONL file of {"image", "text", "box", ("all_boxes", "document")}."""

import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_patch.core.errors import InputError, shown
from llava_patch.core.files import atomic
from llava_patch.data.readers.files import (
    check_name,
    check_text,
    four_numbers,
    nothing_there,
    numbered_lines,
    parse_json,
)  # fmt: skip
from llava_patch.data.readers.samples import Collector, Page, Samples
from llava_patch.probe.sample import EncodedImage, Sample

REQUIRED = ("image", "text", "box")
EXPECTED = "[x0, y0, x1, y1] in pixels, or a list of such boxes"
KNOWN = (*REQUIRED, "all_boxes", "document")


def read_jsonl(
    path: str | Path, boxes_per_sample: int = 1, broken: str = "stop", root: Path | None = None, exif: str = ""
) -> Samples:
    """Read samples; image paths are relative to the file's folder.

    "box" is one [x0, y0, x1, y1] in pixels or a list of them. Lines of one image belong to one document unless they
    say otherwise: its regions are never split between training and held-out samples. Boxes of all of an image's lines
    are its text boxes, beside those of "all_boxes". Other keys are ignored, unless they look like a misspelt one.
    A region without a text and without a box is nothing. Ids are relative to `root` (None: the file's folder); all else
    is as for `read_samples`, `exif` as in `Source`.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise InputError(f"R-Probe data {shown(str(path), 300)[1:-1]}: no such file")
    collector = Collector(broken, exif)
    pages: dict[tuple[str, str], Page] = {}
    for number, line in numbered_lines(path, "utf-8-sig"):
        with collector.one():
            _line(collector, pages, line, path.parent, f"{path}:{number}")
    return collector.finish(str(path), "jsonl", boxes_per_sample, root or path.parent)


def _line(collector: Collector, pages: dict[tuple[str, str], Page], line: str, folder: Path, where: str) -> None:
    values = parse_json(line, where)
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object with image, text and box, got {type(values).__name__}")
    for key in values:
        close = [] if key in KNOWN else difflib.get_close_matches(key.lower(), KNOWN, 1, 0.75)
        if close and close[0] not in values:
            raise InputError(f"{where}: unknown key {key!r}: did you mean {close[0]!r}?")
    if missing := [name for name in REQUIRED if name not in values]:
        raise InputError(f"{where}: lacks {', '.join(missing)}")
    if not isinstance(values["text"], str):
        raise InputError(f"{where}: text is {shown(values['text'])}: expected a string")
    image = folder / check_name(values["image"], f"{where}: image")
    if not os.path.isfile(image):
        what = "is a folder: expected a file" if os.path.isdir(image) else "is missing"
        raise InputError(f"{where}: image {image} {what}")
    # However its path is spelt, an image is one document: split by name, it would be trained on and held out.
    short = Path(os.path.normpath(image))
    if short.is_file() and short.samefile(image):  # not so where a link precedes ".."
        image = short
    document = values.get("document") or str(image)
    if not isinstance(document, (str, int)):
        raise InputError(f"{where}: document is {shown(document)}: expected a string")
    document = check_text(str(document), f"{where}: document")
    key = (os.path.realpath(image), document)
    page = pages.get(key) or collector.page(image, document, where)
    boxes = values["box"]
    nested = isinstance(boxes, list) and bool(boxes) and all(isinstance(box, list) for box in boxes)
    around = values.get("all_boxes", [])
    if not isinstance(around, list):
        raise InputError(f"{where}: all_boxes is {shown(around)}: expected a list of boxes")
    place = f"{where}: all_boxes"
    others = [page.place(four_numbers(box, f"{where}: box", EXPECTED), place) for box in around]
    unread = not values["text"].strip()
    given = [box for box in (boxes if nested else [boxes]) if not (unread and nothing_there(box))]
    region = [four_numbers(box, f"{where}: box", EXPECTED) for box in given]
    page.boxes.update(dict.fromkeys(others))
    collector.region(page, values["text"], region, where)
    pages[key] = page


def write_jsonl(samples: Sequence[Sample], path: str | Path) -> Path:
    """Write samples in R-Probe's own format; reading them again gives the same regions in the same order.

    Image files stay where they are: their paths are relative to `path` where they lie under its folder, else absolute.
    Pictures that are no files of their own (rendered pages, rows of a parquet file) are written as PNG into a folder
    beside `path`, called after it with "_images" behind. InputError: an image cannot be read.
    """
    path = Path(path)
    places = _Places(path.parent, path.parent / f"{path.stem}_images")
    with atomic(path) as part, part.open("w", encoding="utf-8") as stream:
        for sample in samples:
            boxes = sample.boxes[0] if len(sample.boxes) == 1 else sample.boxes
            line: dict[str, Any] = {"image": places.of(sample), "text": sample.text, "box": boxes}
            around = {"all_boxes": sample.all_boxes} if sample.all_boxes else {}
            line |= {**around, "document": sample.document or sample.id}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path


class _Places:
    """Where images are, as the JSONL names them; pictures without a file get one, once each."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        self.encoded: dict[str, str] = {}
        self.last: tuple[Any, str] = None, ""  # only one picture: pages are drawn when they are asked for
        self.count = 0

    def of(self, sample: Sample) -> str:
        source = sample.image
        if isinstance(source, (str, Path)):
            inside = Path(os.path.relpath(source, self.root))
            return str(Path(source).resolve()) if inside.parts[0] == ".." else inside.as_posix()
        if isinstance(source, EncodedImage):
            if source.name not in self.encoded:
                self.encoded[source.name] = self._write(sample)
            return self.encoded[source.name]
        if self.last[0] is not source:
            self.last = source, self._write(sample)
        return self.last[1]

    def _write(self, sample: Sample) -> str:
        name = re.sub(r"[^\w-]+", "_", sample.document or sample.id).strip("_")[-80:]
        target = self.folder / f"{self.count:06d}_{name}.png"
        self.count += 1
        picture = sample.open_image()
        with atomic(target) as part:
            picture.save(part, format="PNG")
        return target.relative_to(self.root).as_posix()
