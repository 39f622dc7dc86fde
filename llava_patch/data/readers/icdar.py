r"""SROIE and ICDAR annotations: a text file an image, a region a line.

A line is four corners x1,y1,…,x4,y4 (the upright box around them counts) or a box x0,y0,x1,y1 and then the transcript,
separated by commas, semicolons, tabs or spaces. The transcript is the rest of the line, so it may hold commas; quotes
around it are taken off, and those inside it that are written "" or \" are unescaped (ICDAR 2013, csv). Numbers inside
quotes are transcript. The script column of ICDAR MLT between the two is recognised when every line of the file has one,
a first line that names the columns is left out. "###", "*" and an empty transcript mark a region that nobody read: text
of the page, but no sample.

A transcript may open with numbers: whether a file's lines have 8 or 4 coordinates is told by all of them, and by the
source's `?coordinates=8` or `4` where they do not tell.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_patch.core.errors import InputError, shown
from llava_patch.data.readers.files import Images, first_lines, numbered_lines
from llava_patch.data.readers.samples import Collector, Page
from llava_patch.probe.sample import Box

SUFFIXES = (".txt", ".csv", ".tsv")
DONT_CARE = ("###", "*")
SCRIPTS = frozenset(
    ["arabic", "latin", "chinese", "japanese", "korean", "bangla", "hindi", "devanagari", "symbols", "mixed", "none"]
)  # ICDAR MLT's third column
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_QUOTED = re.compile(rf'"?({_NUMBER.pattern})"?')
_SEPARATORS = (re.compile(","), re.compile(";"), re.compile("\t"), re.compile(r"[ \t]+"))


@dataclass(frozen=True)
class _Line:
    """A line cut at one separator; `numbers`: how many of the fields at its front are numeric."""

    number: int
    text: str
    separator: re.Pattern[str]
    fields: list[str]
    numbers: int

    def values(self, count: int) -> list[float]:
        """The first numbers of the line."""
        return [float(field.strip(' "')) for field in self.fields[:count]]


def looks_like_annotations(lines: list[str]) -> bool:
    """Whether at least half of the lines open with four numbers."""
    return bool(lines) and 2 * sum(_cut(0, line).numbers >= 4 for line in lines) >= len(lines)


def read_icdar(files: list[Path], images: Images, collector: Collector, coordinates: int = 0) -> None:
    """Read annotation files, one text file an image, in their order; `coordinates`: 8 or 4 a line, 0: as lines tell."""
    for file in files:
        with collector.one():
            head = first_lines(file)
            if head and head[0].startswith("{"):
                continue  # SROIE's key information lies beside the boxes: JSON in .txt files
            # A text file that is none and has no image is a README or a list of classes.
            image = images.of(file, required=looks_like_annotations(head))
            if image is not None:
                _read_file(file, image, collector, coordinates)


def _read_file(file: Path, image: Path, collector: Collector, count: int) -> None:
    lines = [_cut(number, line) for number, line in numbered_lines(file)]
    if lines and lines[0].numbers == 0:  # it may name columns, in the order in which they are read
        names = [field.strip('"').lower() for field in re.split(r"[,;\s]+", lines[0].text)]
        letters = "".join(name[:1] for name in names[:8])
        if letters.startswith("xyxy") or names[:4] == ["left", "top", "right", "bottom"]:
            count = count or (8 if letters == "xyxyxyxy" else 4)
            del lines[0]
    page = collector.page(image, str(image), f"{file}:{lines[0].number if lines else 1}")
    count = count or _coordinates(lines, page, file)
    corners = count == 8
    scripts = [line.fields[8].strip().lower() for line in lines if line.numbers == 8 and len(line.fields) > 9]
    has_script = corners and len(scripts) == len(lines) and set(scripts) <= SCRIPTS
    for line in lines:
        with collector.one():
            where = f"{file}:{line.number}"
            if line.numbers < count:
                raise InputError(f"{where}: {_complaint(line, count)}")
            behind = line.separator.split(line.text, count + has_script)[count + has_script :]
            text = _unquoted("".join(behind).strip())
            numbers = line.values(count)
            if not all(map(math.isfinite, numbers)):
                raise InputError(f"{where}: a coordinate is not finite in {shown(line.text)}")
            # Two opposite corners stay as they are, so that a reversed box is noticed.
            box: Any = bounds(numbers) if corners else tuple(numbers)
            collector.region(page, None if text in DONT_CARE else text, [box], where)


def _coordinates(lines: list[_Line], page: Page, file: Path) -> int:
    """How many coordinates the lines of a file have, 8 or 4; an InputError where they do not tell."""
    told = [found for line in lines if line.numbers >= 4 and (found := _told(line, page))]
    if told:
        return 8 if 2 * told.count(8) >= len(told) else 4
    if not (doubtful := [line for line in lines if line.numbers >= 4]):
        return 4
    line = doubtful[0]
    raise InputError(
        f"{file}:{line.number}: {shown(line.text)} may be 8 coordinates without a transcript, or 4 with the transcript "
        f"{','.join(field.strip() for field in line.fields[4:])!r}: say which they are with ?coordinates=8 or "
        "?coordinates=4 behind the source"
    )


def _told(line: _Line, page: Page) -> int:
    """What a line tells of its coordinates: 8, 4 or, where it may be either, 0."""
    if line.numbers < 8:
        return 4
    values = line.values(8)
    x0, y0, x1, y1 = values[:4]
    if not (x0 < x1 and y0 < y1):
        return 8  # no box; the upper edge of upright corners
    try:
        page.place(bounds(values), "")
    except InputError:
        return 4
    if not _convex(values):
        return 4
    return 8 if len(line.fields) > 8 else 0


def _convex(numbers: list[float]) -> bool:
    """Whether four corners x, y, x, y, … go round a convex area, in either sense."""
    points = list(zip(numbers[0::2], numbers[1::2], strict=True))
    turns = []
    for i in range(4):
        (ax, ay), (bx, by), (cx, cy) = (points[(i + k) % 4] for k in range(3))
        turns.append((bx - ax) * (cy - by) - (by - ay) * (cx - bx))
    return any(turns) and (min(turns) >= 0 or max(turns) <= 0)


def _unquoted(text: str) -> str:
    """A transcript without the quotes around it, and those in it unescaped; one that is no quotation stays."""
    inner = text[1:-1]
    quoted = len(text) >= 2 and text[0] == text[-1] == '"'
    if not quoted or '"' in re.sub(r'\\"|""', "", inner):
        return text
    return re.sub(r'\\"|""', '"', inner)


def bounds(numbers: list[float]) -> Box:
    """The upright box around points x, y, x, y, … in pixels."""
    xs, ys = numbers[0::2], numbers[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def _cut(number: int, text: str) -> _Line:
    """Cut a line at the first separator that gives four numbers at its front, else at that which gives most."""
    cuts: list[_Line] = []
    text = text.strip(" \r\n")
    for separator in _SEPARATORS:
        fields = separator.split(text)
        # Quotes are those of a transcript, unless the line's first field has them too.
        pattern = _QUOTED if fields[0].lstrip().startswith('"') else _NUMBER
        numbers = next((i for i, field in enumerate(fields) if not pattern.fullmatch(field.strip())), len(fields))
        cuts.append(_Line(number, text, separator, fields, numbers))
        if numbers >= 4:
            break
    return max(cuts, key=lambda line: line.numbers)


def _complaint(line: _Line, count: int) -> str:
    rest = [field.strip() for field in line.fields[line.numbers :]]
    whole = shown(line.text, 62)
    if line.numbers == 0:
        what = f"{whole} does not open with numbers"
    else:
        what = f"{line.numbers} coordinates{f', then {rest[0][:20]!r},' if rest else ' and nothing else'} in {whole}"
    return f"{what}: expected {'x1,y1,x2,y2,x3,y3,x4,y4,text' if count == 8 else 'x0,y0,x1,y1,text'}"
