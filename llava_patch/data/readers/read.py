"""`read_samples`: samples from whatever one has, the format recognised by content."""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from llava_patch.core.errors import InputError, SettingError, shown
from llava_patch.data.readers import hf, icdar, json_files
from llava_patch.data.readers.files import IMAGE_SUFFIXES, Images, first_lines, load_json, walk
from llava_patch.data.readers.jsonl import read_jsonl
from llava_patch.data.readers.samples import EXIF, Collector, Samples
from llava_patch.settings.checks import BROKEN

HUB = "hf:"
FORMATS = {
    "jsonl": 'our own JSONL: {"image", "text", "box", ("all_boxes", "document")} a line',
    "icdar": "SROIE or ICDAR .txt or .csv files, x1,y1,…,x4,y4,text or x0,y0,x1,y1,text a line, and their images",
    "funsd": 'FUNSD .json files, {"form": [...]}, and their images',
    "cocotext": 'a COCO-Text, TextOCR or COCO .json file, {"imgs", "anns", "imgToAnns"} or {"images", "annotations"}, '
    "and its images",
    "hf": "a Hugging Face dataset: saved to disk, .parquet or .arrow files, or hf:NAME[:SPLIT] from the hub",
}
"""What can be read, by the name that `format` takes."""


@dataclass(frozen=True)
class Source:
    """A source with its settings: PATH?name=value&name=value, or hf:NAME[:SPLIT]?name=value."""

    path: str  # file, folder, or name on the hub
    hub: bool = False
    format: str = ""  # forces a format of `FORMATS`; "": by content
    images: str = ""  # folder of the images where they are not beside the annotations
    boxes: str = ""  # unit of a dataset's boxes: "pixels", "1000" or "1"; "": pixels, with an error in doubt
    split: str = ""  # of a dataset that has several
    config: str = ""  # of a dataset on the hub that has several
    broken: str = ""  # what becomes of what cannot be used: "stop" or "skip"; "": as the reading command says
    exif: str = ""  # boxes lie on the "displayed" image ("": too), which EXIF turns, or on its "stored" pixels
    coordinates: str = ""  # of a line of SROIE or ICDAR: "8" or "4"; "": as the lines tell, with an error in doubt

    def __post_init__(self) -> None:
        choices: Any = {
            "format": FORMATS, "boxes": hf.UNITS, "broken": BROKEN, "exif": EXIF, "coordinates": ("8", "4"),
        }  # fmt: skip
        for name, known in choices.items():
            value = getattr(self, name)
            if value and value not in known:
                raise SettingError(f"{self.path}: {name}={value}: expected one of {', '.join(known)}")


def parse_source(text: str) -> Source:
    """A source from its text; a SettingError where it has a setting, or a value, that there is not."""
    path, _, query = (text, "", "") if os.path.exists(text) else text.partition("?")
    known = tuple(field.name for field in fields(Source) if field.name not in ("path", "hub"))
    # Not a URL: a plus or a percent sign in a folder's name is itself.
    pairs = [pair.partition("=") for pair in query.split("&") if pair]
    settings: dict[str, Any] = {}
    for name, _, value in pairs:
        if name not in known:
            raise SettingError(f"{text}: {name!r} is no setting of a source: known are {', '.join(known)}")
        if not value:
            raise SettingError(f"{text}: {name} has no value: write {name}=VALUE, or leave it out")
        if settings.setdefault(name, value) != value:
            raise SettingError(f"{text}: {name} is set twice, to {settings[name]} and to {value}")
    if not path.startswith(HUB):
        return Source(path, **settings)
    name, _, split = path.removeprefix(HUB).partition(":")
    if not name:
        raise SettingError(f"{text}: expected hf:NAME or hf:NAME:SPLIT")
    return Source(name, hub=True, **{"split": split, **settings})


def read_samples(
    source: str | Path, boxes_per_sample: int = 1, broken: str = "stop", images: str | Path = "", format: str = ""
) -> Samples:
    """Read samples in any of `FORMATS`; several sources are joined by commas.

    A region is a sample, in the order of the file; its id is FILE:LINE (in JSON: file and entry), its document the
    image, both relative to the source's folder (of several sources: to the folder that holds all of them), its
    `all_boxes` the boxes of all regions of the page. Quadrilaterals become the upright box around them. Boxes are
    given in pixels of the displayed image, which EXIF turns (`?exif=stored`: of its stored pixels), and come out in
    those of the displayed one. They are cut at its border where more than half of them lies inside. Of images only the
    header is read here; pixels are read by `Sample.open_image`.

    Args:
        source: PATH or hf:NAME[:SPLIT], with settings behind it as `Source` describes: "scans?images=../jpg",
            "hf:someone/pages:train?boxes=1000".
        boxes_per_sample: regions that follow each other on a page and make one sample together: their boxes are its
            boxes, their texts its lines. The id is the first region's.
        broken: "stop" at the first thing that cannot be used (missing or broken image, unreadable line, box that is
            empty or outside), or "skip" it; `Samples.skipped` tells what was. A source's own setting goes first.
        images: folder of the images; the same as the source's own setting.
        format: one of `FORMATS`; the same as the source's own setting.

    Returns:
        At least one sample.

    Raises:
        InputError: names file and line: nothing there, a format that is not known, something broken, no usable sample.
        SettingError: an argument or a setting of the source has a value that it cannot have.
    """
    if boxes_per_sample < 1:
        raise SettingError(f"boxes_per_sample = {boxes_per_sample}: expected an integer >= 1")
    text = str(source)
    parts = [text] if os.path.exists(text) or "," not in text else [part.strip() for part in text.split(",")]
    given: dict[str, Any] = {"images": str(images), "format": format}
    sources = [replace(parse_source(part), **{n: value for n, value in given.items() if value}) for part in parts]
    # Not resolved: a link has the name that its user gave it.
    paths = [Path(os.path.abspath(one.path)) for one in sources if not one.hub]
    root = Path(os.path.commonpath([path if os.path.isdir(path) else path.parent for path in paths]) if paths else "")
    found = [_read(one, boxes_per_sample, broken, root) for one in sources]
    if len(found) == 1:
        return found[0]
    return Samples(
        [sample for part in found for sample in part],
        [message for part in found for message in part.skipped],
        sum(part.unread for part in found),
        ", ".join(dict.fromkeys(part.format for part in found)),
    )


def skips(source: str, broken: str) -> bool:
    """Whether what cannot be used in any of the sources is left out, by their own setting or the command's."""
    parts = [source] if os.path.exists(source) or "," not in source else source.split(",")
    return "skip" in {parse_source(part.strip()).broken or broken for part in parts}


def resolve_source(text: str) -> str:
    """A source as `read_samples` takes it, with absolute paths: two spellings of one source become equal."""
    if not text or os.path.exists(text):
        return text and str(Path(text).resolve())
    if "," in text:
        return ",".join(resolve_source(part.strip()) for part in text.split(","))
    source = parse_source(text)
    if source.hub:
        return text
    settings = {name: value for name, value in vars(source).items() if value and name not in ("path", "hub")}
    if source.images:
        settings["images"] = str(Path(source.images).resolve())
    query = "&".join(f"{name}={value}" for name, value in settings.items())
    return str(Path(source.path).resolve()) + (f"?{query}" if query else "")


def _read(source: Source, boxes_per_sample: int, broken: str, root: Path) -> Samples:
    broken = source.broken or broken
    collector = Collector(broken, source.exif)
    images = Path(source.images) if source.images else None
    if images is not None and not os.path.isdir(images):
        raise InputError(f"R-Probe data {source.path}: folder of images {_named(images)}: no such folder")
    if source.hub and source.coordinates:
        raise SettingError(f"hf:{source.path}: coordinates is a setting of SROIE and ICDAR files; this is hf")
    if source.hub:
        hf.read_hf(source.path, source.split, source.config, source.boxes, images, collector)
        return collector.finish(f"hf:{source.path}", "hf", boxes_per_sample)
    path = Path(source.path)
    if not os.path.exists(path):
        hub = f"a dataset on the Hugging Face hub is hf:{_named(path)}"
        raise InputError(f"R-Probe data {_named(path)}: no such file or folder ({hub})")
    files = [path] if path.is_file() else walk(path)
    kinds = _kinds(path, files)
    format = source.format or _choose(path, files, kinds)
    chosen = kinds.get(format) or _forced(path, files, format)
    if format != "hf" and (source.boxes or source.split or source.config):
        raise SettingError(f"{path}: boxes, split and config are settings of Hugging Face datasets; this is {format}")
    if format != "icdar" and source.coordinates:
        raise SettingError(f"{path}: coordinates is a setting of SROIE and ICDAR files; this is {format}")
    if format in ("jsonl", "cocotext") and len(chosen) > 1:
        names = ", ".join(str(file) for file in chosen[:4])
        raise InputError(f"R-Probe data {path}: {len(chosen)} files of {format} ({names}): name one of them")
    if format == "jsonl":
        if images is not None:
            raise SettingError(f"{path}: images is no setting of JSONL files: their paths are relative to the file")
        return read_jsonl(chosen[0], boxes_per_sample, broken, root, source.exif)
    if format == "cocotext":
        values = load_json(chosen[0])
        if not json_files.is_coco_text(values):
            raise InputError(f"{chosen[0]}: not {FORMATS[format]}")
        json_files.read_coco_text(chosen[0], values, images, collector)
    elif format == "hf":
        path = Path(os.path.abspath(path))  # "." has no name
        hf.read_hf(path, source.split, "", source.boxes, images, collector)
        root = path.parent if root == path else root
    elif format == "funsd":
        json_files.read_funsd(chosen, _images(path, files, images), collector)
    else:
        icdar.read_icdar(chosen, _images(path, files, images), collector, int(source.coordinates or 0))
    return collector.finish(str(path), format, boxes_per_sample, root)


def _named(path: Path | str) -> str:
    """A path as a message shows it, whatever characters are in it."""
    return shown(str(path), 300)[1:-1]


def _images(path: Path, files: list[Path], images: Path | None) -> Images:
    if images is not None:
        return Images(images)
    if path.is_dir() and any(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
        return Images(path, files)
    beside = Images(path.parent, walk(path.parent, deep=False)) if path.is_file() else None
    if beside is not None and beside.of(path, required=False) is not None:
        return beside
    # Annotations alone: box/ beside img/.
    around = path.resolve().parent if path.is_dir() else path.resolve().parent.parent
    return Images(around, walk(around, deep=False))


def _kinds(path: Path, files: list[Path]) -> dict[str, list[Path]]:
    if path.is_dir() and any((path / name).is_file() for name in hf.SAVED):
        return {"hf": [path]}
    kinds: dict[str, list[Path]] = {}
    for file in files:
        suffix = file.suffix.lower()
        if suffix in _KINDS and (kind := _KINDS[suffix](file)):
            kinds.setdefault(kind, []).append(file)
    if "icdar" in kinds and path.is_dir():  # the others too: what is wrong in them is to be said
        kinds["icdar"] = [file for file in files if file.suffix.lower() in icdar.SUFFIXES]
    return kinds


def _json_kind(file: Path) -> str:
    with file.open("rb") as stream:
        head = stream.read(65536).decode("utf-8", errors="replace")
    # The files can be large: what opens with the right key is not parsed here.
    for keys, kind in (("imgs|anns|imgToAnns", "cocotext"), ("form", "funsd")):
        if re.search(rf'"({keys})"\s*:', head):
            return kind
    with contextlib.suppress(InputError):
        return "cocotext" if json_files.is_coco_text(load_json(file)) else ""
    return ""


_KINDS: dict[str, Callable[[Path], str]] = {
    ".jsonl": lambda file: "jsonl",
    ".ndjson": lambda file: "jsonl",
    ".json": _json_kind,
    ".parquet": lambda file: "hf",
    ".arrow": lambda file: "hf",
    **dict.fromkeys(icdar.SUFFIXES, lambda file: "icdar" if icdar.looks_like_annotations(first_lines(file)) else ""),
}


def _choose(path: Path, files: list[Path], kinds: dict[str, list[Path]]) -> str:
    if len(kinds) == 1:
        return next(iter(kinds))
    if kinds:
        there = "; ".join(f"{kind}: {found[0].name} ({len(found)} files)" for kind, found in kinds.items())
        raise InputError(f"R-Probe data {path}: of several formats, {there}: name one with ?format=, or one file")
    if path.is_file() and path.suffix.lower() == ".json":
        load_json(path)  # says where it breaks off
    count = Counter(sorted(file.suffix.lower() or "no suffix" for file in files))
    there = ", ".join(f"{n} {suffix}" for suffix, n in count.most_common(8))
    opens = ""
    if path.is_file():
        head = "".join(first_lines(path)[:1])
        opens = f" that opens with {head[:60]!r}" if head else ", which is empty"
    known = "".join(f"\n  {name}: {text}" for name, text in FORMATS.items())
    raise InputError(
        f"R-Probe data {path}: format not recognised; found {there or 'nothing'}{opens}. What is understood:{known}\n"
        "?format=NAME behind the path forces one"
    )


def _forced(path: Path, files: list[Path], format: str) -> list[Path]:
    """The files that a forced format is tried on, though their content does not look like it."""
    if path.is_file() or format == "hf":
        return [path]
    suffixes: Any = {"jsonl": (".jsonl",), "icdar": icdar.SUFFIXES}.get(format, (".json",))
    found = [file for file in files if file.suffix.lower() in suffixes]
    if not found:
        raise InputError(f"R-Probe data {path}: format={format}, but there is no {' or '.join(suffixes)} file in it")
    return found
