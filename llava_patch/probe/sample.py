"""R-Probe, step 1 of 8: a text region of an image, its file opened as 8-bit RGB, and the split by document.

A file is turned as its EXIF orientation says, so that boxes are in pixels of what a viewer shows and the model sees
(LLaVA's own training does not turn it); a picture in memory is taken as it is. 16-bit grey is scaled to 8 bits (PIL
would cut it off at 255) and transparent pixels show white paper (PIL would show the colour hidden under them). Of a
file with several pages the first is read.
"""

import contextlib
import functools
import io
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import numpy as np
from PIL import Image, ImageFile

from llava_patch.core.errors import InputError
from llava_patch.core.undo import UndoStack

BROKEN_FILE = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError,
    NotImplementedError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What PIL raises on files that are missing, cut short, damaged or far too large."""

_ORIENTATION = 274  # EXIF's tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What shows the stored pixels of each EXIF orientation upright; 1 is upright."""


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image file inside another one, such as a row of a parquet file; `read` gives its bytes each time."""

    name: str
    read: Callable[[], bytes]

    def __str__(self) -> str:
        return self.name


ImageSource = Union[Image.Image, str, Path, EncodedImage]


def open_rgb(source: ImageSource, name: str) -> Image.Image:
    """The picture in 8-bit RGB, turned upright; a copy of one's own. An InputError says `name` (sample id, or line).

    The two files that were opened last are kept decoded: samples of one page follow each other.
    """
    with _told(source, name):
        if isinstance(source, Image.Image):
            return to_rgb(source)
        # Time and size are part of the key: a file that was written anew is read anew.
        state = None if isinstance(source, EncodedImage) else os.stat(source)
        return _decoded(source, state and (state.st_mtime_ns, state.st_size)).copy()


def image_size(source: ImageSource, name: str) -> tuple[int, int]:
    """(width, height) of the upright picture; reads the header alone. An InputError says `name`."""
    return size_and_orientation(source, name)[0]


def size_and_orientation(source: ImageSource, name: str) -> tuple[tuple[int, int], int]:
    """(width, height) of the upright picture, and the EXIF orientation, 1 to 8, that it is stored in."""
    with _told(source, name):
        if isinstance(source, Image.Image):
            return source.size, 1
        with _opened(source) as image:
            if min(image.size) < 1:
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            orientation = _orientation(image)
            if orientation == 1:
                return image.size, 1
            if image.format == "TIFF":  # whether its size is that of the upright picture depends on PIL's version
                return _upright(image).size, orientation
            width, height = image.size
            return (height, width) if orientation >= 5 else (width, height), orientation


def upright_box(box: "Box", size: tuple[int, int], orientation: int) -> "Box":
    """A box of stored pixels, (width, height), on the upright picture; `orientation` is EXIF's."""
    x0, y0, x1, y1 = box
    width, height = size
    if orientation in (2, 3, 7, 8):
        x0, x1 = width - x1, width - x0
    if orientation in (3, 4, 6, 7):
        y0, y1 = height - y1, height - y0
    return (y0, x0, y1, x1) if orientation >= 5 else (x0, y0, x1, y1)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation of an opened file; 1 where there is none. Of a PNG, what stands before its pixels counts."""
    try:
        found = Image.Image.getexif(image).get(_ORIENTATION, 1)  # PNG's own would decode the whole file
    except Exception:  # damaged EXIF data beside a sound picture
        return 1
    return found if found in _TURNS else 1


def _upright(image: Image.Image) -> Image.Image:
    """An opened file in 8-bit RGB and turned upright."""
    orientation, rgb = _orientation(image), to_rgb(image)
    if image.format == "TIFF":
        orientation = _orientation(image)  # newer versions of PIL have turned it
    return rgb if orientation == 1 else rgb.transpose(_TURNS[orientation])


@contextlib.contextmanager
def _told(source: ImageSource, name: str) -> Iterator[None]:
    """Say which image of which sample cannot be read, and why; files that are cut short are refused as well."""
    with UndoStack() as undo:
        # lmms-eval's import tells PIL to fill those up with grey.
        undo.set_attribute(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
        try:
            yield
        except BROKEN_FILE as error:
            reason = "it is missing" if isinstance(error, FileNotFoundError) else str(error) or type(error).__name__
            if isinstance(error, Image.DecompressionBombError):
                reason = f"{error}; if it is sound, scale it down (and its boxes with it)"
            if "\0" in str(source):
                source = ascii(str(source))
            raise InputError(f"{name}: image {source} cannot be read: {reason}") from error


def _opened(source: str | Path | EncodedImage) -> Image.Image:
    return Image.open(io.BytesIO(source.read()) if isinstance(source, EncodedImage) else source)


@functools.lru_cache(maxsize=2)
def _decoded(source: str | Path | EncodedImage, written: tuple[int, int] | None) -> Image.Image:
    with _opened(source) as image:
        return _upright(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode in 8-bit RGB; the argument is left as it was.

    Raises:
        ValueError: 32-bit or floating-point grey whose values leave 0..65535, or are no integers: how bright is white?
    """
    mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;16"):  # "I": also 16-bit PNG in older versions of PIL
        values = np.asarray(image)
        if mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"mode {mode}: what value is white is not known; save it with 8 or 16 bits")
        grey = np.round(values.astype(np.float32) / 257).astype(np.uint8)
        return Image.fromarray(grey, mode="L").convert("RGB")
    if "transparency" in image.info or mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        # "RGBa" carries premultiplied colours, which only "RGBA" knows how to undo.
        clear = image.convert("RGBA")
        paper = Image.new("RGBA", clear.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, clear).convert("RGB")
    return image.convert("RGB")


Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False, repr=False)
class Sample:
    """A text region of an image.

    Attributes:
        image: the picture, or the file it is in (opened when it is needed; an `EncodedImage` lies inside another file).
        text: transcript of the region.
        boxes: the region: one (x0, y0, x1, y1) or several, in pixels of the upright image, x to the right, y down.
        all_boxes: boxes of all text regions of the image.
        id: names the sample in results. A file and line where it came from one; the file is relative to the source, so
            that the same data have the same ids wherever they lie.
        document: samples of one document are never split between train and held-out; "" means the id.
        all_texts: transcripts of `all_boxes`, where they are known: error maps rebuild each region with its text.
        where: file and line with a path that finds it, for errors; "" means the id.
        page: of a sample that was cut to a window: the page, and the window on it (left, top, right, bottom) in pixels.
    """

    image: ImageSource
    text: str
    boxes: tuple[Box, ...]
    all_boxes: tuple[Box, ...] = ()
    id: str = ""
    document: str = ""
    all_texts: tuple[str, ...] = ()
    where: str = ""
    page: tuple[ImageSource, tuple[int, int, int, int]] | None = None

    @property
    def place(self) -> str:
        """Names the sample in errors."""
        return self.where or self.id

    def __repr__(self) -> str:
        return f"Sample({self.id!r}, {self.text!r}, boxes={self.boxes})"

    def open_image(self) -> Image.Image:
        """The picture in 8-bit RGB, turned upright (`llava_patch.probe.sample` says how modes are converted)."""
        return open_rgb(self.image, self.place)


class DrawnSamples(Sequence[Sample]):
    """Samples that are drawn when they are asked for; a subclass says how many there are, and draws one."""

    def draw(self, index: int) -> Sample:
        """Sample number `index`, from 0."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.draw(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.draw(index % len(self))


def split_samples(samples: Sequence[Sample], heldout_share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(train, held-out), split by document: the same seed and documents split alike, whatever the order of the samples.

    A sample without a document is a document of its own, named by its id. At least one document lands on either side,
    so fewer than two are an InputError.
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
