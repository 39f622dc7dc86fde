"""R-Probe's windows (`RProbe.image_mode` "window"): the part of a page around a text region, at a scale to read it."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from llava_patch.probe.sample import Box, Sample

TEXT_HEIGHT = 1.5  # tokens


@dataclass(frozen=True)
class Window:
    """A rectangle of a page, `box` = (left, top, right, bottom) in whole pixels, never beyond the page.

    `whole`: all of the region lies inside; else its beginning does.
    """

    box: tuple[int, int, int, int]
    whole: bool

    @classmethod
    def around(cls, boxes: Sequence[Box], size: tuple[int, int], side: int) -> "Window":
        """The window of `side` pixels with the region in its middle, shifted so that it stays on the page.

        The page of (width, height) cuts it where the page is smaller; the boxes lie on the page. Where they do not fit
        on an axis, the window begins where the first box does.
        """
        starts, lengths, whole = [], [], True
        for axis in (0, 1):
            low = math.floor(min(box[axis] for box in boxes))
            high = math.ceil(max(box[axis + 2] for box in boxes))
            length = min(side, size[axis])
            start = (low + high - length) // 2
            if high - low > length:
                start, whole = math.floor(boxes[0][axis]), False
            starts.append(min(max(start, 0), size[axis] - length))
            lengths.append(length)
        left, top = starts
        return cls((left, top, left + lengths[0], top + lengths[1]), whole)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of the page."""
        return self.box[2] - self.box[0], self.box[3] - self.box[1]

    def moved(self, box: Box) -> Box | None:
        """A box of the page in pixels of the window, cut at its border; None: no part of it lies inside."""
        left, top, right, bottom = self.box
        x0, x1 = (min(max(x, left), right) - left for x in (box[0], box[2]))
        y0, y1 = (min(max(y, top), bottom) - top for y in (box[1], box[3]))
        return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None

    def cut(self, sample: Sample) -> Sample:
        """A sample of the page as one of the window alone: its picture is cut out, and all boxes are moved."""
        texts = [*sample.all_texts, *[""] * (len(sample.all_boxes) - len(sample.all_texts))]
        known = [(self.moved(box), text) for box, text in zip(sample.all_boxes, texts, strict=False)]
        return dataclasses.replace(
            sample,
            image=sample.open_image().crop(self.box),
            page=(sample.image, self.box),
            boxes=tuple(moved for box in sample.boxes if (moved := self.moved(box)) is not None),
            all_boxes=tuple(box for box, _ in known if box is not None),
            all_texts=tuple(text for box, text in known if box is not None) if sample.all_texts else (),
        )
