"""SROIE and ICDAR annotations: a text file an image, a region a line.

A line is four corners x1,y1,…,x4,y4 (the upright box around them counts) or a box x0,y0,x1,y1 and then the transcript,
separated by commas, semicolons, tabs or spaces. The transcript is the rest of the line, so it may hold commas; quotes
around it are taken off (ICDAR 2013, csv). The script column of ICDAR MLT between the two is recognised when every line
of the file has one, a first line that names the columns is left out. "###", "*" and an empty transcript mark a region
that nobody read: text of the page, but no sample.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_patch.core.errors import InputError
from llava_patch.data.readers.files import Images, first_lines, numbered_lines
from llava_patch.data.readers.samples import Collector
from llava_patch.probe.sample import Box

SUFFIXES = (".txt", ".csv", ".tsv")
DONT_CARE = ("###", "*")
SCRIPTS = frozenset(
    ["arabic", "latin", "chinese", "japanese", "korean", "bangla", "hindi", "devanagari", "symbols", "mixed", "none"]
)  # ICDAR MLT's third column
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_SEPARATORS = (re.compile(","), re.compile(";"), re.compile("\t"), re.compile(r"[ \t]+"))


@dataclass(frozen=True)
class _Line:
    """A line cut at one separator; `numbers`: how many of the fields at its front are numeric."""

    number: int
    text: str
    separator: re.Pattern[str]
    fields: list[str]
    numbers: int


def looks_like_annotations(lines: list[str]) -> bool:
    """Whether at least half of the lines open with four numbers."""
    return bool(lines) and 2 * sum(_cut(0, line).numbers >= 4 for line in lines) >= len(lines)


def read_icdar(files: list[Path], images: Images, collector: Collector) -> None:
    """Read annotation files, one text file an image, in their order."""
    for file in files:
        head = first_lines(file)
        if head and head[0].startswith("{"):
            continue  # SROIE's key information lies beside the boxes: JSON in .txt files
        with collector.one():
            # A text file that is none and has no image is a README or a list of classes.
            image = images.of(file, required=looks_like_annotations(head))
            if image is not None:
                _read_file(file, image, collector)


def _read_file(file: Path, image: Path, collector: Collector) -> None:
    lines = [_cut(number, line) for number, line in numbered_lines(file)]
    if lines and lines[0].numbers == 0:  # it may name columns, in the order in which they are read
        names = [field.strip('"').lower() for field in re.split(r"[,;\s]+", lines[0].text)[:4]]
        if [name[:1] for name in names] == ["x", "y", "x", "y"] or names == ["left", "top", "right", "bottom"]:
            del lines[0]
    # A transcript may open with numbers, so that one line alone does not tell; the layout is that of most lines.
    corners = 2 * sum(line.numbers >= 8 for line in lines) >= len(lines) and bool(lines)
    count = 8 if corners else 4
    scripts = [line.fields[8].strip().lower() for line in lines if line.numbers == 8 and len(line.fields) > 9]
    has_script = corners and len(scripts) == len(lines) and set(scripts) <= SCRIPTS
    page = collector.page(image, str(image), f"{file}:{lines[0].number if lines else 1}")
    for line in lines:
        with collector.one():
            where = f"{file}:{line.number}"
            if line.numbers < count:
                raise InputError(f"{where}: {_complaint(line, count)}")
            behind = line.separator.split(line.text, count + has_script)[count + has_script :]
            text = "".join(behind).strip()
            inner = text[1:-1]
            if len(text) >= 2 and text[0] == text[-1] == '"' and '"' not in inner.replace('""', ""):
                text = inner.replace('""', '"')
            numbers = [float(field.strip(' "')) for field in line.fields[:count]]
            # Two opposite corners stay as they are, so that a reversed box is noticed.
            box: Any = bounds(numbers) if corners else tuple(numbers)
            collector.region(page, None if text in DONT_CARE else text, [box], where)


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
        numbers = next((i for i, field in enumerate(fields) if not _NUMBER.fullmatch(field.strip(' "'))), len(fields))
        cuts.append(_Line(number, text, separator, fields, numbers))
        if numbers >= 4:
            break
    return max(cuts, key=lambda line: line.numbers)


def _complaint(line: _Line, count: int) -> str:
    shown = line.text if len(line.text) <= 60 else f"{line.text[:60]}…"
    rest = [field.strip() for field in line.fields[line.numbers :]]
    if line.numbers == 0:
        what = f"{shown!r} does not open with numbers"
    else:
        what = f"{line.numbers} coordinates{f', then {rest[0][:20]!r},' if rest else ' and nothing else'} in {shown!r}"
    return f"{what}: expected {'x1,y1,x2,y2,x3,y3,x4,y4,text' if count == 8 else 'x0,y0,x1,y1,text'}"
