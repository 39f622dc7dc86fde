"""JSON annotations: COCO-Text and TextOCR, COCO's own layout, and FUNSD.

COCO-Text and TextOCR are one file with "imgs", "anns" and "imgToAnns", and a folder of images. COCO's own layout has
lists of "images" and "annotations" with their ids; there the text may also be called "caption" or "text".

A region is a "bbox" of x, y, width, height in pixels (or the upright box around "points") with its "utf8_string". What
is illegible (COCO-Text: legibility, or no string; TextOCR: ".") is a box of the page, but no sample. All languages are
read: leave out what a tokenizer does not know with `llava-patch rprobe export` and a text editor.

FUNSD is annotations/NAME.json with {"form": [{"text", "box", "words"}, …]} beside images/NAME.png. Every entry with a
text is a sample, its box in pixels; entries without one are boxes of the page alone.

Of both kinds, what has neither a text nor a box with any area is nothing to read, and no fault.
"""

import os
from pathlib import Path
from typing import Any

from llava_patch.core.errors import InputError, shown
from llava_patch.core.stored import is_finite
from llava_patch.data.readers.files import (
    IMAGE_SUFFIXES,
    Images,
    check_name,
    four_numbers,
    load_json,
    nothing_there,
)  # fmt: skip
from llava_patch.data.readers.icdar import bounds
from llava_patch.data.readers.samples import Collector, Page
from llava_patch.probe.sample import Box

ILLEGIBLE = "."  # TextOCR
TEXTS = ("utf8_string", "caption", "text")


def is_coco_text(values: Any) -> bool:
    """Whether a JSON value is of this kind."""
    if not isinstance(values, dict):
        return False
    kinds: Any = (("imgs", "anns"), dict), (("images", "annotations"), list)
    return any(all(isinstance(values.get(name), kind) for name in names) for names, kind in kinds)


def _by_id(values: Any, where: str) -> dict[str, Any]:
    """COCO's lists as COCO-Text has them; what has no id keeps its place's number."""
    if not isinstance(values, list):
        return {str(key): value for key, value in values.items()}
    found: dict[str, Any] = {}
    for place, value in enumerate(values):
        name = str(value.get("id", place) if isinstance(value, dict) else place)
        if name in found:
            raise InputError(f"{where}[{place}]: the id {name} is there twice")
        found[name] = value
    return found


def read_coco_text(file: Path, values: dict[str, Any], folder: Path | None, collector: Collector) -> None:
    """Read the images that have annotations, in the order of "imgs"; regions are called FILE:anns[ID].

    The images are in `folder`; without one, the file's own folder and those directly in it or beside it are searched.
    """
    imgs, named = ("imgs", "anns") if "imgs" in values else ("images", "annotations")
    images, anns = _by_id(values[imgs], f"{file}:{imgs}"), _by_id(values[named], f"{file}:{named}")
    given = values.get("imgToAnns") or {}
    if not isinstance(given, dict):
        raise InputError(f"{file}:imgToAnns: expected an object of lists, got {type(given).__name__}")
    of_image: dict[str, Any] = {str(key): names for key, names in given.items()}
    if not of_image:
        for key, ann in anns.items():
            with collector.one():
                if not isinstance(ann, dict):
                    raise InputError(f"{file}:{named}[{key}]: expected an object, got {type(ann).__name__}")
                of_image.setdefault(str(ann.get("image_id")), []).append(key)
    roots = [file.parent, file.parent.parent] if folder is None else [folder]
    places = [place for root in roots for place in (root, *sorted(p for p in root.iterdir() if os.path.isdir(p)))]
    for key, image in images.items():
        if of_image.get(key, []) == []:
            continue
        with collector.one():
            names = of_image[key]
            if not isinstance(names, list):
                raise InputError(f"{file}:imgToAnns[{key}]: {shown(names)}: expected a list of annotations")
            page = _page(f"{file}:{imgs}[{key}]", file, key, image, places, collector)
            for name in map(str, names):
                with collector.one():
                    where = f"{file}:{named}[{name}]"
                    ann = anns.get(name)
                    if not isinstance(ann, dict):
                        raise InputError(f"{where}: image {key} names this annotation, but there is none")
                    text = next((ann[name] for name in TEXTS if name in ann), None)
                    legible = isinstance(text, str) and ann.get("legibility") != "illegible" and text != ILLEGIBLE
                    read = text if legible and str(text).strip() else None
                    boxes = [] if read is None and _is_empty(ann) else [_box(ann, where)]
                    collector.region(page, read, boxes, where)


def _page(where: str, file: Path, key: str, image: Any, places: list[Path], collector: Collector) -> Page:
    if not isinstance(image, dict):
        raise InputError(f"{where}: expected an object with file_name")
    name = image.get("file_name") or ""
    if name:
        check_name(name, f"{where}: file_name")
    # TextOCR says train/ID.jpg of what its archive unpacks into train_images/ID.jpg.
    names = [name, Path(name).name] if name else [f"{key}{suffix}" for suffix in sorted(IMAGE_SUFFIXES)]
    found = next((place / n for n in names for place in places if os.path.isfile(place / n)), None)
    if found is None:
        raise InputError(
            f"{where}: image {names[0]} is missing: looked in {places[0]} and the folders in it"
            f"{'' if len(places) == 1 else ' and beside it'}; name the folder of images with {file.name}?images=FOLDER"
        )
    page = collector.page(found, str(found), where)
    declared = (image.get("width"), image.get("height"))
    try:
        other = None not in declared and tuple(int(n or 0) for n in declared) != page.size
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: width and height are {shown(declared)}: expected numbers of pixels") from error
    if other:
        raise InputError(
            f"{where}: {found} has {page.size[0]} x {page.size[1]} pixels, its annotation says {shown(declared[0])} x "
            f"{shown(declared[1])}: boxes would not fit: is it a copy of another size?{page.turned()}"
        )
    return page


def _box(ann: dict[str, Any], where: str) -> Box:
    if "bbox" in ann:
        x, y, width, height = four_numbers(ann["bbox"], f"{where}: bbox", "[x, y, width, height] in pixels")
        return x, y, x + width, y + height
    points: Any = ann.get("points")
    sound = isinstance(points, list) and len(points) >= 6 and len(points) % 2 == 0
    if not sound or not all(map(is_finite, points)):
        raise InputError(f"{where}: neither a bbox nor points x, y, x, y, …")
    return bounds([float(n) for n in points])


def _is_empty(ann: dict[str, Any]) -> bool:
    """Whether an annotation has no box that could be read: none, or one without area."""
    bbox = ann.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(is_finite, bbox)):
        return not bbox and not ann.get("points")
    return 0 in bbox[2:]


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
                    collector.region(page, text, [] if box is None else [box], where)


def _entry(entry: Any, where: str) -> tuple[str, Box | None]:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected an object with text and box, got {type(entry).__name__}")
    words = entry.get("words") or []
    if not isinstance(words, list):
        raise InputError(f"{where}: words is {shown(words)}: expected a list")
    if other := [word for word in words if not isinstance(word, dict)]:
        raise InputError(f"{where}: words has {shown(other[0])}: expected objects with text and box")
    text = entry.get("text")
    if text is None:
        text = " ".join(str(word.get("text") or "") for word in words).strip()
    if not isinstance(text, str):
        raise InputError(f"{where}: text is {shown(text)}: expected a string")
    empty = nothing_there(entry.get("box")) and (words or not text.strip())
    if "box" in entry and not empty:
        return text, four_numbers(entry["box"], f"{where}: box", "[x0, y0, x1, y1] in pixels")
    words = [word for word in words if word.get("text") or not nothing_there(word.get("box"))]
    boxes = [four_numbers(word.get("box"), f"{where}: box", "[x0, y0, x1, y1] in pixels") for word in words]
    if not boxes:
        if text.strip():
            raise InputError(f"{where}: lacks box")
        return text, None
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return text, (min(x0), min(y0), max(x1), max(y1))
