"""From what a reader finds to samples: boxes are checked, regions of a page joined, and what is left out is counted."""

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava_patch.core.errors import InputError, SettingError
from llava_patch.probe.sample import Box, ImageSource, Sample, image_size
from llava_patch.probe.transform import check_box
from llava_patch.settings.checks import BROKEN


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
    """One image of (width, height) stored pixels, with the boxes of all its text regions in order, without repeats."""

    image: ImageSource
    size: tuple[int, int]
    document: str
    boxes: dict[Box, None] = field(default_factory=dict)


class Collector:
    """Takes pages and regions from a reader, in order; `broken`: "stop" at what cannot be used, or "skip" it."""

    def __init__(self, broken: str) -> None:
        if broken not in BROKEN:
            raise SettingError(f"broken = {broken!r}: expected one of {', '.join(BROKEN)}")
        self._skip = broken == "skip"
        self._regions: list[tuple[Page, str, tuple[Box, ...], str]] = []  # page, text, boxes and place
        self.skipped: list[str] = []
        self.unread = 0

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Around one thing of the data (line, file, entry): what is wrong in it stops the reading, or is noted."""
        try:
            yield
        except InputError as error:
            if not self._skip:
                raise
            self.skipped.append(str(error))

    def page(self, image: ImageSource, document: str, where: str) -> Page:
        """Open a page: its image must be there."""
        return Page(image, image_size(image, where), document)

    def region(self, page: Page, text: str | None, boxes: Sequence[Box], where: str) -> None:
        """Add a text region, its boxes in pixels; without a text (None or blank) it is a box of the page alone."""
        checked = tuple(check_box(box, page.size, where) for box in boxes)
        page.boxes.update(dict.fromkeys(checked))
        if text is None or not text.strip():
            self.unread += 1
        else:
            self._regions.append((page, text, checked, where))

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
