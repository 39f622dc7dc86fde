"""One probe sample: an image, one text region of it and where that region is; and the split into train and held-out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from llava_patch.core.errors import InputError
from llava_patch.probe.images import ImageSource, open_rgb

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False, repr=False)
class Sample:
    """A text region of an image.

    Attributes:
        image: the picture, or the file it is in (opened when it is needed; an `EncodedImage` lies inside another file).
        text: transcript of the region.
        boxes: the region: one (x0, y0, x1, y1) or several, in pixels of the image, x to the right, y down.
        all_boxes: boxes of all text regions of the image.
        id: names the sample in results. A file and line where it came from one; the file is relative to the source, so
            that the same data have the same ids wherever they lie.
        document: samples of one document are never split between train and held-out; "" means the id.
        all_texts: transcripts of `all_boxes`, where they are known: error maps rebuild each region with its text.
        where: file and line with a path that finds it, for errors; "" means the id.
    """

    image: ImageSource
    text: str
    boxes: tuple[Box, ...]
    all_boxes: tuple[Box, ...] = ()
    id: str = ""
    document: str = ""
    all_texts: tuple[str, ...] = ()
    where: str = ""

    @property
    def place(self) -> str:
        """Names the sample in errors."""
        return self.where or self.id

    def __repr__(self) -> str:
        return f"Sample({self.id!r}, {self.text!r}, boxes={self.boxes})"

    def open_image(self) -> Image.Image:
        """The picture in 8-bit RGB and stored pixels (`llava_patch.probe.images` says how modes are converted).

        Raises:
            InputError: the file is missing, broken or too large; names sample and file.
        """
        return open_rgb(self.image, self.place)


def split_samples(samples: Sequence[Sample], heldout_share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Split by document: the same seed and documents give the same split, whatever the order of the samples.

    Args:
        samples: all samples; one without a document is a document of its own, named by its id.
        heldout_share: share of the documents held out, 0..1; at least one document lands on either side.
        seed: of the split.

    Returns:
        (train, held-out), each in the given order.

    Raises:
        InputError: fewer than two documents.
    """
    documents = sorted({sample.document or sample.id for sample in samples})
    if len(documents) < 2:
        raise InputError(
            f"R-Probe needs at least two documents, one to train on and one held out; got {len(samples)} samples of "
            f"{len(documents)} document{'s' * (len(documents) != 1)} (samples without a document are told apart by "
            "their id): add documents, or give those to measure on apart (--heldout, run_rprobe(heldout=...))"
        )
    random.Random(seed).shuffle(documents)
    count = min(max(1, round(heldout_share * len(documents))), len(documents) - 1)
    held = set(documents[:count])
    train = [s for s in samples if (s.document or s.id) not in held]
    return train, [s for s in samples if (s.document or s.id) in held]
