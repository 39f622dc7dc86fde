"""From what a reader finds to samples: boxes are checked, regions of a page joined, and what is left out is counted."""

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava_patch.core.errors import InputError, SettingError, shown
from llava_patch.data.readers.files import check_text, nothing_there
from llava_patch.probe.sample import Box, ImageSource, Sample, size_and_orientation, upright_box
from llava_patch.probe.transform import check_box
from llava_patch.settings.checks import BROKEN

SKIP = '?broken=skip behind the data (or --broken skip, RProbe.broken = "skip") leaves out what cannot be used'
EXIF = ("displayed", "stored")  # what boxes were measured on: the image as viewers show it, or its stored pixels


class SourceError(InputError):
    """What is wrong with a source as a whole: leaving out a sample would not mend it."""


class _Told(InputError):
    """An error that has named the way around it."""


class Samples(list[Sample]):
    """Samples in the order of their file, and what did not become one.

    Attributes:
        skipped: one message, with file and line, for each thing that was broken (only with broken = "skip").
        unread: regions without a transcript ("###", "*", ".", empty): boxes of their page, but no samples.
        format: the format that was read.
    """

    def __init__(
        self, samples: Iterable[Sample] = (), skipped: Sequence[str] = (), unread: int = 0, format: str = ""
    ) -> None:
        super().__init__(samples)
        self.skipped, self.unread, self.format = list(skipped), unread, format


@dataclass(eq=False)
class Page:
    """One image, with the boxes of all its text regions in order, without repeats.

    Attributes:
        size: (width, height) of the pixels that its boxes are given in.
        orientation: EXIF's, 1 to 8.
        stored: whether boxes are given in stored pixels, and not in those of the upright picture.
        boxes: in pixels of the upright picture.
    """

    image: ImageSource
    size: tuple[int, int]
    document: str
    orientation: int = 1
    stored: bool = False
    boxes: dict[Box, None] = field(default_factory=dict)

    def place(self, box: Box, where: str) -> Box:
        """A box as the data give it, cut at the image's border, in pixels of the upright picture."""
        try:
            checked = check_box(box, self.size, where)
        except InputError as error:
            raise InputError(f"{error}{self.turned()}") from error
        return upright_box(checked, self.size, self.orientation) if self.stored else checked

    def turned(self) -> str:
        """What to try when boxes do not fit an image that EXIF turns."""
        if self.orientation == 1:
            return ""
        other = "leave ?exif=stored out" if self.stored else "add ?exif=stored to the source"
        now, then = ("stored", "displayed") if self.stored else ("displayed", "stored")
        return (
            f" (its EXIF orientation is {self.orientation}, and boxes are taken to lie on the {now} image; if they "
            f"were measured on the {then} one, {other})"
        )


class Collector:
    """Takes pages and regions from a reader, in order.

    `broken`: "stop" at what cannot be used, or "skip" it; `exif`: one of `EXIF`, "" is the first.
    """

    def __init__(self, broken: str, exif: str = "") -> None:
        if broken not in BROKEN:
            raise SettingError(f"broken = {broken!r}: expected one of {', '.join(BROKEN)}")
        self._stored = exif == "stored"
        self._skip = broken == "skip"
        self._regions: list[tuple[Page, str, tuple[Box, ...], str]] = []  # page, text, boxes and place
        self.skipped: list[str] = []
        self.unread = 0

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Around one thing of the data (line, file, entry): what is wrong in it stops the reading, or is noted."""
        try:
            yield
        except (SourceError, _Told):
            raise
        except InputError as error:
            said = str(error).encode("utf-8", "backslashreplace").decode()  # names of files may be no UTF-8
            if not self._skip:
                raise _Told(f"{said}; {SKIP}") from error
            self.skipped.append(said)

    def page(self, image: ImageSource, document: str, where: str) -> Page:
        """Open a page: its image must be there."""
        check_text(str(image), f"{where}: the image's path", "rename the file or its folder")
        size, orientation = size_and_orientation(image, where)
        if self._stored and orientation >= 5:
            size = size[::-1]
        return Page(image, size, document, orientation, self._stored)

    def region(self, page: Page, text: str | None, boxes: Sequence[Box], where: str) -> None:
        """Add a text region, its boxes in pixels; without a text (None or blank) it is a box of the page alone.

        Without a text, boxes without an extent are nothing.
        """
        unread = text is None or not text.strip()
        if unread:
            boxes = [box for box in boxes if not nothing_there(box)]
        checked = tuple(page.place(box, where) for box in boxes)
        if not unread:
            check_text(str(text), f"{where}: text {shown(text, 40)}")
            self._regions.append((page, str(text), checked, where))
        page.boxes.update(dict.fromkeys(checked))
        self.unread += unread

    def finish(self, source: str, format: str, boxes_per_sample: int = 1, root: Path | None = None) -> Samples:
        """All samples, relative to `root` in ids and documents that are paths; an InputError where none is usable.

        `boxes_per_sample` regions that follow each other on a page make one sample; a page's last may have fewer.
        """
        samples = []
        around: dict[int, tuple[Box, ...]] = {}  # one tuple a page, not one a sample
        for number, run in itertools.groupby(self._regions, key=lambda region: id(region[0])):
            of_page = list(run)
            for start in range(0, len(of_page), boxes_per_sample):
                pages, texts, boxes, places = zip(*of_page[start : start + boxes_per_sample], strict=True)
                page, where = pages[0], places[0]
                samples.append(
                    Sample(
                        image=page.image,
                        text="\n".join(texts),
                        boxes=tuple(itertools.chain(*boxes)),
                        all_boxes=around.setdefault(number, tuple(page.boxes)),
                        id=_relative_place(where, root),
                        document=_document(page, root),
                        where=where,
                    )
                )
        if not samples:
            first = f"; the first: {self.skipped[0]}" if self.skipped else ""
            raise InputError(
                f"R-Probe data {source}: no usable sample in it (read as {format}: {self.unread} regions without a "
                f"transcript, {len(self.skipped)} things skipped{first})"
            )
        return Samples(samples, self.skipped, self.unread, format)


def _relative_place(where: str, root: Path | None) -> str:
    """FILE:LINE with the file relative to a folder."""
    if root is None:
        return where
    file, colon, line = where.rpartition(":")
    return os.path.relpath(file, root) + colon + line


def _document(page: Page, root: Path | None) -> str:
    if root is None or page.document != str(page.image):
        return page.document  # named by the data
    is_file = isinstance(page.image, (str, Path))
    return os.path.relpath(page.document, root) if is_file else _relative_place(page.document, root)
