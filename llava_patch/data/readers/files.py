"""Finding files of a data set: which image belongs to which annotation."""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from llava_patch.core.errors import InputError
from llava_patch.probe.sample import Box
from llava_patch.settings.checks import is_number


def numbered_lines(path: Path, encoding: str | None = None) -> list[tuple[int, str]]:
    """(line number from 1, line) of every line that is not blank; without an encoding, as `decode` takes it."""
    try:
        raw = path.read_bytes()
        text = raw.decode(encoding) if encoding else decode(raw)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    # Nothing else ends a line: `str.splitlines` would split more.
    return [(n, line) for n, line in enumerate(re.split(r"\r\n|\n|\r", text), 1) if line.strip()]


def decode(raw: bytes) -> str:
    """Text of unknown encoding: UTF-8, UTF-16 with a byte order mark, else cp1252."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return raw.decode("utf-16", errors="replace")
    for encoding in ("utf-8-sig", "cp1252"):
        with contextlib.suppress(UnicodeDecodeError):
            return raw.decode(encoding)
    return raw.decode("latin-1")  # cp1252 leaves five bytes undefined; elsewhere they agree on letters


def load_json(path: Path) -> Any:
    """The value in a JSON file; the error names the line."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def four_numbers(value: Any, where: str, expected: str) -> Box:
    """Four numbers of a JSON list; an InputError where it is anything else."""
    sound = isinstance(value, (list, tuple)) and len(value) == 4
    if not sound or not all(is_number(n) for n in value):
        raise InputError(f"{where} {value!r}: expected {expected}")
    a, b, c, d = (float(n) for n in value)
    return a, b, c, d


IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".jp2"]
)  # what people keep scans in


def walk(folder: Path, deep: bool = True) -> list[Path]:
    """Every file under a folder, in order of folders and names (numbers as numbers); hidden ones are left out.

    Unless `deep`, nothing below the folders that are directly in it.
    """
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        if not deep and Path(root) != folder:
            folders[:] = []
        found += [Path(root) / name for name in files if not name.startswith(".")]
    return sorted(found, key=_natural)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """A sort key by which img_9 comes before img_10."""
    parts = re.findall("[0-9]+|[^0-9]", f"{path}\0")
    return [(0, int(part), part) if part.isdecimal() and part.isascii() else (1, 0, part) for part in parts]


def first_lines(path: Path) -> list[str]:
    """The lines at the front of a text file that are not blank, without white space around them."""
    try:
        with path.open("rb") as stream:
            text = decode(stream.read(8192))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


class Images:
    """The images under a folder (or among `files` of it), found by the names of annotation files."""

    def __init__(self, folder: Path, files: list[Path] | None = None) -> None:
        self.folder = folder
        self.by_stem: dict[str, list[Path]] = {}
        for path in walk(folder) if files is None else files:
            if path.suffix.lower() in IMAGE_SUFFIXES:
                self.by_stem.setdefault(path.stem.lower(), []).append(path)

    def of(self, annotation: Path, required: bool = True) -> Path | None:
        """The image of an annotation file, the nearest of its name, or of that without "gt_" before or "_gt" behind it.

        InputError: two are equally near, or there is none though one is `required`.
        """
        stem = annotation.stem.lower()
        if Path(stem).suffix in IMAGE_SUFFIXES:  # 12.jpg.txt
            stem = Path(stem).stem

        def near(path: Path) -> tuple[int, int]:
            """Folders that both share, and (fewer is nearer) how deep the image lies under them."""
            folder = path.resolve().parent
            shared = os.path.commonpath([annotation.resolve().parent, folder])
            return len(Path(shared).parts), -len(folder.parts)

        for name in (stem, stem.removeprefix("gt_"), stem.removeprefix("gt."), stem.removesuffix("_gt")):
            if found := self.by_stem.get(name):
                nearest = max(map(near, found))
                best = [path for path in found if near(path) == nearest]
                if len(best) > 1:
                    raise InputError(f"{annotation}: which image is it of, {best[0]} or {best[1]}? Both are as near")
                return best[0]
        if required:
            raise InputError(f"{annotation}: its image is missing: no {stem}.jpg, .png, … under {self.folder}")
        return None
