"""Finding files of a data set: which image belongs to which annotation."""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from llava_patch.core.errors import InputError, shown
from llava_patch.core.stored import is_finite
from llava_patch.probe.sample import Box


def numbered_lines(path: Path, encoding: str | None = None) -> list[tuple[int, str]]:
    """(line number from 1, line) of every line that is not blank; without an encoding, as `decode` takes it."""
    try:
        raw = path.read_bytes()
        text = raw.decode(encoding) if encoding else decode(raw)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8: {error.reason}; save it as UTF-8") from error
    except OSError as error:
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
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8: {error.reason}; save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not text.strip():
        raise InputError(f"{path}: empty: expected JSON; was it written or copied to its end?")
    return parse_json(text, str(path))


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; an InputError with the line behind `where` (of a text of several lines)."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if "\n" in text.strip() else where
        raise InputError(f"{place}: not JSON: {error.msg} (column {error.colno})") from error
    except RecursionError:
        raise InputError(
            f"{where}: lists or objects lie in each other too deeply to be read: write them flat"
        ) from None
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"{where}: a number in it cannot be read: {error}") from error


def four_numbers(value: Any, where: str, expected: str) -> Box:
    """Four finite numbers of a JSON list; an InputError where it is anything else."""
    sound = isinstance(value, (list, tuple)) and len(value) == 4
    if not sound or not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in value):
        raise InputError(f"{where} {shown(value)}: expected {expected}")
    if not all(map(is_finite, value)):
        raise InputError(f"{where} {shown(value)}: a number in it is not finite: expected {expected}")
    a, b, c, d = (float(n) for n in value)
    return a, b, c, d


def check_text(text: str, what: str, way: str = "write the text anew as UTF-8") -> str:
    """A text that UTF-8 can hold; an InputError of `what` with the `way` out where half a surrogate pair is in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what}: {text[error.start]!a} at character {error.start} is half of a surrogate pair and no "
            f"character: {way}"
        ) from error
    return text


def check_name(name: Any, what: str) -> str:
    """A file's name or path as data give it; an InputError of `what` where it cannot be one."""
    if not isinstance(name, str):
        raise InputError(f"{what} is {shown(name)}: expected a string")
    if not name.strip() or "\0" in name:
        raise InputError(f"{what} is {shown(name)}: expected the path of a file")
    return check_text(name, what)


def nothing_there(box: Any) -> bool:
    """Whether a value stands for no box: null, an empty list, or a box without area."""
    if not box:
        return box is None or isinstance(box, (list, tuple))
    sound = isinstance(box, (list, tuple)) and len(box) == 4 and all(map(is_finite, box))
    return sound and (box[0] == box[2] or box[1] == box[3])


IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".jp2"]
)  # what people keep scans in


def walk(folder: Path, deep: bool = True) -> list[Path]:
    """Every file under a folder, in order of folders and names (numbers as numbers); hidden ones are left out.

    Unless `deep`, nothing below the folders that are directly in it.
    """
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        # A link to a folder that it lies in would go round for ever.
        inside = os.path.realpath(root) + os.sep
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__MACOSX"))
            and not (os.path.islink(path := f"{root}/{name}") and inside.startswith(os.path.realpath(path) + os.sep))
        ]
        if not deep and Path(root) != folder:
            folders[:] = []
        paths = [Path(root) / name for name in files if not name.startswith(".")]
        found += [path for path in paths if os.path.isfile(path)]  # no pipes, no links to nowhere
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


SPLITS = {
    "train": ("train", "training", "trn"),
    "test": ("test", "testing", "tst"),
    "val": ("val", "valid", "validation", "dev"),
}  # words in the names of folders that hold one part of a data set


class Images:
    """The images under a folder (or among `files` of it), found by the names of annotation files."""

    def __init__(self, folder: Path, files: list[Path] | None = None) -> None:
        self.folder = folder
        self.by_stem: dict[str, list[Path]] = {}
        self._foreign: dict[tuple[Path, str], set[Path]] = {}  # folders whose images belong to other annotations
        self._taken: dict[Path, Path] = {}  # the annotation file of each image
        self._near: dict[tuple[Path, Path], tuple[int, ...]] = {}
        for path in walk(folder) if files is None else files:
            if path.suffix.lower() in IMAGE_SUFFIXES:
                self.by_stem.setdefault(path.stem.lower(), []).append(path)

    def of(self, annotation: Path, required: bool = True) -> Path | None:
        """The image of an annotation file, the nearest of its name, or of that without "gt_" before or "_gt" behind it.

        Folders of different splits (train, test, val in their names) do not go together. Where images of several
        folders are equally near, as in ICDAR 2015, annotations go with the folder whose path shares most words with
        theirs, or which holds their images and no others.

        InputError: two are equally near, one belongs to two annotation folders, or there is none though one is
        `required`.
        """
        key = annotation.parent, annotation.suffix
        if key not in self._foreign:
            self._foreign[key] = self._foreign_folders(*key)
        foreign = self._foreign[key]
        near = self._nearest(annotation)
        best = [path for path in near if path.parent not in foreign]
        way = f"give one subfolder as the data, or name the folder of its images: {annotation.parent}?images=FOLDER"
        if len(best) > 1:
            raise InputError(f"{annotation}: which image is it of, {best[0]} or {best[1]}? Both are as near: {way}")
        if best:
            other = self._taken.setdefault(best[0], annotation)
            if other.parent != annotation.parent:
                raise InputError(f"{annotation}: its image {best[0]} is that of {other} as well: {way}")
            return best[0]
        if required:
            others = [*near, *(path for name in _names(annotation) for path in self.by_stem.get(name, []))]
            known = f" ({others[0]} belongs to other annotations, by the names of the folders)" if others else ""
            raise InputError(
                f"{annotation}: its image is missing: no {_names(annotation)[0]}.jpg, .png, … under {self.folder}"
                f"{known}; if its images lie elsewhere, name their folder: {annotation.parent}?images=FOLDER"
            )
        return None

    def _nearest(self, annotation: Path) -> list[Path]:
        """The images of an annotation's name and split that are nearest to it."""
        for name in _names(annotation):
            found = [(self._nearness(annotation.parent, path.parent), path) for path in self.by_stem.get(name, [])]
            if known := [near for near, _ in found if near]:
                return [path for near, path in found if near == max(known)]
        return []

    def _nearness(self, folder: Path, other: Path) -> tuple[int, ...]:
        """Folders that annotations and images share, and (fewer is nearer) how deep the images lie; () for none."""
        if (folder, other) not in self._near:
            one, two = _resolved(folder), _resolved(other)
            near = len(_shared(one, two).parts), -len(two.parts)
            self._near[folder, other] = () if _other_split(folder, other) else near
        return self._near[folder, other]

    def _foreign_folders(self, folder: Path, suffix: str) -> set[Path]:
        """Of the folders that are equally near to a folder of annotations, those whose images are not theirs."""
        found = [self._nearest(path) for path in folder.iterdir() if path.suffix == suffix]
        tied = sorted({path.parent for best in found if len({p.parent for p in best}) > 1 for path in best})
        if not tied:
            return set()
        names = {path.stem.lower() for best in found for path in best if path.parent in tied}
        stems = {one: {stem for stem, paths in self.by_stem.items() for p in paths if p.parent == one} for one in tied}
        shared = [len(_words(folder, one) & _words(one, folder)) for one in tied]
        by_name = [one for one, count in zip(tied, shared, strict=True) if count == max(shared)]
        one_to_one = [one for one in tied if stems[one] == names]
        told = {choice[0] for choice in (by_name, one_to_one) if len(choice) == 1}
        return set(tied) - told if len(told) == 1 else set()


def _names(annotation: Path) -> list[str]:
    """Stems that an annotation file's image may have."""
    stem = annotation.stem.lower()
    if Path(stem).suffix in IMAGE_SUFFIXES:  # 12.jpg.txt
        stem = Path(stem).stem
    return [stem, stem.removeprefix("gt_"), stem.removeprefix("gt."), stem.removesuffix("_gt")]


def _resolved(folder: Path) -> Path:
    return Path(os.path.realpath(folder))


def _shared(one: Path, other: Path) -> Path:
    return Path(os.path.commonpath([one, other]))


def _words(folder: Path, other: Path) -> set[str]:
    """Words and numbers in the part of a folder's path that it does not share with another's."""
    one = _resolved(folder)
    apart = one.relative_to(_shared(one, _resolved(other)))
    return {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+", str(apart))}


def _other_split(folder: Path, other: Path) -> bool:
    """Whether the paths of two folders name different splits of a data set."""
    one, two = (
        {split for split, words in SPLITS.items() if not words_of.isdisjoint(words)}
        for words_of in (_words(folder, other), _words(other, folder))
    )
    return bool(one and two) and one.isdisjoint(two)
