"""Image files to 8-bit RGB, in stored pixels, whatever their mode.

EXIF orientation is not applied: LLaVA's own loading (`Image.open(...).convert("RGB")`) does not apply it either, and
boxes are in pixels of what the model sees. Unlike that loading, 16-bit grey is scaled to 8 bits (PIL would cut it off
at 255) and transparent pixels show white paper (PIL would show the colour hidden under them). Of a file with several
pages the first is read.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import numpy as np
from PIL import Image, ImageFile

from llava_patch.core.errors import InputError

BROKEN_FILE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What PIL raises on files that are missing, cut short, damaged or far too large."""


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image file that lies inside another file, such as a row of a parquet file; read again whenever it is asked.

    Attributes:
        name: names it in errors; the same image has the same name.
        read: gives the file's bytes.
    """

    name: str
    read: Callable[[], bytes]

    def __str__(self) -> str:
        return self.name


ImageSource = Union[Image.Image, str, Path, EncodedImage]


def open_rgb(source: ImageSource, name: str) -> Image.Image:
    """The picture in 8-bit RGB; a copy of one's own.

    The two files that were opened last are kept decoded: samples of one page follow each other.

    Args:
        source: a picture, a file, or a file inside another one.
        name: sample id, or file and line, for errors.

    Raises:
        InputError: missing, broken or too large, or of a mode whose range is not known.
    """
    try:
        with _whole_files():
            if isinstance(source, Image.Image):
                return to_rgb(source)
            if isinstance(source, EncodedImage):
                return _decoded_bytes(source).copy()
            state = os.stat(source)
            return _decoded_file(os.fspath(source), state.st_mtime_ns, state.st_size).copy()
    except BROKEN_FILE as error:
        raise InputError(f"{name}: image {source} cannot be read: {_reason(error)}") from error


def image_size(source: ImageSource, name: str) -> tuple[int, int]:
    """(width, height) in stored pixels; reads the header alone.

    Args:
        source: as for `open_rgb`.
        name: likewise.

    Raises:
        InputError: missing, or not an image.
    """
    try:
        if isinstance(source, Image.Image):
            return source.size
        with Image.open(io.BytesIO(source.read()) if isinstance(source, EncodedImage) else source) as image:
            return image.size
    except BROKEN_FILE as error:
        raise InputError(f"{name}: image {source} cannot be read: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "it is missing"
    if isinstance(error, Image.DecompressionBombError):
        return f"{error}; if it is sound, scale it down (and its boxes with it)"
    return str(error) or type(error).__name__


# Time and size are part of the key: a file that was written anew is read anew.
@functools.lru_cache(maxsize=2)
def _decoded_file(path: str, modified: int, size: int) -> Image.Image:
    with Image.open(path) as image:
        return to_rgb(image)


@contextlib.contextmanager
def _whole_files() -> Iterator[None]:
    """Let PIL refuse files that are cut short: lmms-eval's import tells it to fill them up with grey."""
    asked, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = asked


@functools.lru_cache(maxsize=2)
def _decoded_bytes(source: EncodedImage) -> Image.Image:
    with Image.open(io.BytesIO(source.read())) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode in 8-bit RGB; the argument is left as it was.

    Raises:
        ValueError: 32-bit or floating-point grey whose values leave 0..65535, or are no integers: how bright is white?
    """
    mode = image.mode
    if mode.startswith("I;16"):
        return _from_grey16(np.asarray(image).astype(np.float32))
    if mode in ("I", "F"):
        values = np.asarray(image)
        if mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"mode {mode}: what value is white is not known; save it with 8 or 16 bits")
        return _from_grey16(values.astype(np.float32))  # 16-bit PNG in older versions of PIL
    if "transparency" in image.info or mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        # "RGBa" carries premultiplied colours, which only "RGBA" knows how to undo.
        clear = image.convert("RGBA")
        paper = Image.new("RGBA", clear.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, clear).convert("RGB")
    return image.convert("RGB")


def _from_grey16(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(values / 257).astype(np.uint8), mode="L").convert("RGB")
