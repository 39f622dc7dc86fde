"""R-Probe, step 2 of 8: the processed image (the plane that targets are cut from), and where a text box lies on it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from llava_patch.core.errors import HostError, InputError, SettingError, shown
from llava_patch.hosts.compat import known_options, layout_options
from llava_patch.hosts.tiles import Tiling
from llava_patch.probe.sample import Box, Sample, image_size
from llava_patch.probe.sequence import CHANNELS, TokenGrid, target_mask, unpatchify
from llava_patch.probe.window import TEXT_HEIGHT, Window

ROUNDING = 1.0  # pixels by which a box may stick out of its image without a question: annotations are rounded


@dataclass(frozen=True)
class Transform:
    """How an image becomes the tower's input, `height` x `width` pixels, of which `cell` x `cell` lie under one token.

    Its mode is "resize" (the whole image, stretched), "crop" (the processor's own resize and centre crop), "pad"
    (padded to a square with the mean colour first, as LLaVA-1.5's `image_aspect_ratio=pad`), "window" (the picture is a
    window already, see `WindowTransform`: padded likewise, then stretched, never cropped) or "anyres", the host's
    `tiling`: resized with its aspect kept, centred on the best of several resolutions.
    """

    processor: Any
    mode: str
    height: int
    width: int
    cell: int = 1
    tiling: Tiling | None = None

    def window_of(self, sample: Sample, size: tuple[int, int] | None = None) -> Window | None:
        """The part of a sample's page that is shown for it; None: the whole page (every mode but "window").

        The page's `size`, (width, height), is read from its header where it is not given.
        """
        return None

    def focus(self, sample: Sample) -> Sample:
        """The sample as it is shown: itself, or cut to its window."""
        window = self.window_of(sample)
        return sample if window is None else window.cut(sample)

    def plane(self, image: Image.Image) -> Tensor:
        """The processed whole image, from which targets are cut: normalised float32 [3, height, width] on CPU.

        In the square modes the tower's input; of anyres the stitched tiles, padding included. What lies behind the last
        whole cell (merge_padding) is left out. A HostError where the processor does not give the size that the tower
        takes.
        """
        if self.tiling is None:
            pixels = self.pixel_values([image])[0]
        else:
            pixels = self.tiling.stitch(self.tiling.cut(self.processor, image), self.tiling.place(image.size))
        height, width = self.plane_size(image.size)
        return pixels[:, :height, :width]

    def plane_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the plane of an image of (width, height), in pixels."""
        whole: Any = self if self.tiling is None else self.tiling.place(size)
        return whole.height // self.cell * self.cell, whole.width // self.cell * self.cell

    def pixel_values(self, images: Sequence[Image.Image]) -> Tensor:
        """Normalised pixels of RGB images in the square modes, float32 [images, 3, height, width] on CPU."""
        if self.tiling is not None:
            raise InputError(
                'image_mode "anyres" cuts an image into tiles: use plane(image), or encode_views for tokens'
            )
        options: dict[str, Any] = {}
        if self.mode in ("pad", "window"):
            fill = tuple(int(x * 255) for x in self.processor.image_mean)
            images = [pad_to_square(image, fill) for image in images]
        if self.mode in ("resize", "window"):
            size = {"height": self.height, "width": self.width}
            options = {"do_resize": True, "size": size, "do_center_crop": False, "do_pad": False}
        if tiled := hasattr(self.processor, "image_grid_pinpoints"):
            # One tile is the least it cuts; the overview in front of it is the whole image, stretched.
            options = {"image_grid_pinpoints": [[self.height, self.width]]}
        known = known_options(self.processor)
        options = {name: value for name, value in options.items() if name in known}
        options |= layout_options(self.processor)
        pixels = self.processor(list(images), return_tensors="pt", **options)["pixel_values"]
        pixels = pixels[:, 0] if tiled else pixels
        if tuple(pixels.shape[1:]) != (3, self.height, self.width):
            raise HostError(
                f"the image processor gives {tuple(pixels.shape[1:])}, the vision tower takes "
                f"{(3, self.height, self.width)}: is it this model's image processor?"
            )
        return pixels.to(torch.float32)

    def box(self, box: Box, size: tuple[int, int], name: str) -> Box:
        """Where a box of an original image of (width, height) lies on `plane`, cut at its border, in its pixels.

        An InputError with `name` where the box is empty, outside the image, or wholly cropped away.
        """
        x0, y0, x1, y1 = check_box(box, size, name)
        width, height = size
        plane_height, plane_width = self.plane_size(size)
        left, top, square = 0.0, 0.0, size
        if self.mode in ("pad", "window"):
            side = max(size)
            left, top, square = float((side - width) // 2), float((side - height) // 2), (side, side)
        new_width, new_height, crop_left, crop_top = self._geometry(square)
        scale_x, scale_y = new_width / square[0], new_height / square[1]
        x0, x1 = (min(max((x + left) * scale_x - crop_left, 0.0), plane_width) for x in (x0, x1))
        y0, y1 = (min(max((y + top) * scale_y - crop_top, 0.0), plane_height) for y in (y0, y1))
        if not (x0 < x1 and y0 < y1):
            cut = 'the centre crop cuts away; use image_mode "resize" or "pad"'
            if self.mode != "crop":
                cut = f"has no whole cell of {self.cell} pixels (merge_padding: its tokens cover padding as well)"
            raise InputError(f"{name}: box {tuple(box)} lies in the part of the {width} x {height} image that {cut}")
        return x0, y0, x1, y1

    def _geometry(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(resized width, resized height, columns cropped on the left, rows cropped at the top); < 0 where padded."""
        if self.tiling is not None:
            place = self.tiling.place(size)
            return place.new_width, place.new_height, -place.left, -place.top
        if self.mode in ("resize", "window") or hasattr(self.processor, "image_grid_pinpoints"):
            return self.width, self.height, 0, 0
        width, height = size
        if self.processor.do_resize:
            wanted = self.processor.size
            if "shortest_edge" in wanted:
                # The long side is truncated, as in transformers' get_resize_output_image_size.
                short, long = wanted["shortest_edge"], int(wanted["shortest_edge"] * max(size) / min(size))
                width, height = (short, long) if width <= height else (long, short)
            else:
                width, height = wanted["width"], wanted["height"]
        if not getattr(self.processor, "do_center_crop", False):  # SigLIP's has none
            return width, height, 0, 0
        return width, height, (width - self.width) // 2, (height - self.height) // 2

    def statistics(self) -> tuple[Tensor, Tensor]:
        """(mean, std) of the processor's normalisation, each float32 [3]: pixels x std + mean lie in 0..1."""
        if not getattr(self.processor, "do_rescale", True):
            raise HostError("the image processor has do_rescale = False: R-Probe cannot tell the pixels' range")
        if not getattr(self.processor, "do_normalize", True):
            return torch.zeros(3, dtype=torch.float32), torch.ones(3, dtype=torch.float32)
        mean, std = self.processor.image_mean, self.processor.image_std
        return torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)


@dataclass(frozen=True)
class WindowTransform(Transform):
    """Mode "window": for each sample a square part of its page, in which its text is at least so many tokens high.

    The square is as large as that allows and at most the page's longer side, where it shows what mode "pad" shows. The
    text's height is that of the lowest of the sample's boxes. The other methods take windows, as `focus` cuts them.
    """

    text_height: float = TEXT_HEIGHT

    def __post_init__(self) -> None:
        rows = self.height // self.cell
        if self.text_height > rows:
            raise SettingError(
                f"RProbe.text_height = {self.text_height:g}: the vision tower's input is {rows} tokens high: ask for "
                "less"
            )

    @property
    def still(self) -> Transform:
        """The same for pictures that are windows already."""
        return Transform(self.processor, self.mode, self.height, self.width, self.cell)

    def window_of(self, sample: Sample, size: tuple[int, int] | None = None) -> Window:
        """See `Transform`; an InputError for an image or box that cannot be used."""
        size = image_size(sample.image, sample.place) if size is None else size
        boxes = [check_box(box, size, sample.place) for box in sample.boxes]
        if not boxes:
            raise InputError(f"{sample.place}: the sample has no box")
        lowest = min(y1 - y0 for _, y0, _, y1 in boxes)
        side = int(lowest * self.height / (self.cell * self.text_height))
        return Window.around(boxes, size, min(max(side, 1), max(size)))


def square_transform(
    processor: Any, mode: str, height: int, width: int, cell: int, text_height: float = TEXT_HEIGHT
) -> Transform:
    """The transform of any mode but "anyres"; `text_height` is that of "window".

    A SettingError where the processor does not do what "crop" says, or the tower is not so many tokens high.
    """
    if mode == "window":
        return WindowTransform(processor, mode, height, width, cell, text_height=text_height)
    if mode == "crop":
        check_crop(processor)
    return Transform(processor, mode, height, width, cell)


def check_crop(processor: Any) -> None:
    """Refuse image mode "crop" where the processor's own way is no resize and centre crop of the image."""
    name = type(processor).__name__
    if hasattr(processor, "image_grid_pinpoints"):
        raise SettingError(
            f'RProbe.image_mode = "crop": {name} has no centre crop of the whole image: use "anyres", "resize" or "pad"'
        )
    if not getattr(processor, "do_pad", False):
        return
    if hasattr(processor, "pad_to_square"):  # LlavaImageProcessor, which pads as mode "pad" does
        raise SettingError(
            f'image mode "crop": {name} has do_pad = True and pads images to a square first, so that boxes lie '
            'elsewhere: use RProbe.image_mode = "pad" (RegionCollator: mode="pad"), or set its do_pad = False'
        )
    raise SettingError(
        f'image mode "crop": {name} has do_pad = True, and where it pads is not known: set its do_pad = False, or use '
        'RProbe.image_mode = "resize" or "pad" (RegionCollator: mode, with images made square before the processor)'
    )


def check_box(box: Box, size: tuple[int, int], name: str) -> Box:
    """A box (pixels) cut at the border of its image of (width, height): more than half of its area must lie inside.

    What sticks out further than that was more likely measured on a copy of another size. An InputError with `name`
    where it does, or where the box has no area or is no four finite numbers.
    """
    try:
        x0, y0, x1, y1 = (float(v) for v in box)
    except (OverflowError, TypeError, ValueError):
        raise InputError(f"{name}: box {shown(box)}: expected four finite numbers") from None
    width, height = size
    if not (x0 < x1 and y0 < y1):  # also catches NaN
        raise InputError(f"{name}: empty box {shown(tuple(box))}: expected x0 < x1 and y0 < y1")
    inside = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    across, down = inside[2] - inside[0], inside[3] - inside[1]
    what = f"{name}: box {shown(tuple(box))} is outside its image of {width} x {height} pixels"
    if not (across > 0 and down > 0):
        raise InputError(what)
    rounded = min(x0, y0) >= -ROUNDING and x1 <= width + ROUNDING and y1 <= height + ROUNDING
    if not rounded and (across / (x1 - x0)) * (down / (y1 - y0)) <= 0.5:
        raise InputError(f"{what} by half of it or more: was it measured on a copy of another size?")
    return inside


def pad_to_square(image: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    """Centre an RGB image on a square of its longer side, as llava's `expand2square` does."""
    side = max(image.size)
    square = Image.new(image.mode, (side, side), fill)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def black_out(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """Copy of an RGB image with every pixel that a box touches set to black (appendix D.2, "masked")."""
    masked = image.copy()
    draw = ImageDraw.Draw(masked)
    for x0, y0, x1, y1 in boxes:
        # PIL's rectangles include their last row and column.
        right, bottom = -int(-x1 // 1) - 1, -int(-y1 // 1) - 1
        draw.rectangle((int(x0), int(y0), right, bottom), fill=(0, 0, 0))
    return masked


INSET = 0.01  # share of a cell by which a cell's own box is smaller, so that rounding does not touch a neighbour


@dataclass(frozen=True, eq=False)
class Plane:
    """A processed image, normalised float32 [3, height, width], and how it lies on the original of (width, height).

    `scale` is (x, y), processed pixels a pixel of the original; `offset` (x, y), where the original's corner lies, in
    processed pixels.
    """

    pixels: Tensor
    grid: TokenGrid
    size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]
    transform: Transform

    @classmethod
    def of(cls, transform: Transform, image: Image.Image, pixels: int) -> "Plane":
        """The plane of an RGB image, for cells of that many values (cell x cell x 3)."""
        plane = transform.plane(image)
        cell = math.isqrt(pixels // CHANNELS)
        grid = TokenGrid(plane.shape[1] // cell, plane.shape[2] // cell, cell)
        # Resize, crop and pad move boxes by a scale and an offset: a box of 1 pixel in the middle, which no crop
        # cuts, tells both.
        x, y = image.width // 2, image.height // 2
        x0, y0, x1, y1 = transform.box((x, y, x + 1, y + 1), image.size, "the image's centre")
        scale = (x1 - x0, y1 - y0)
        return cls(plane, grid, image.size, scale, (x0 - x * scale[0], y0 - y * scale[1]), transform)

    @property
    def stretch(self) -> float:
        """How much taller than wide a processed pixel is on the original (4 on a 1:4 page made square)."""
        return self.scale[0] / self.scale[1]

    def box(self, box: Box, name: str) -> Box:
        """A box of the original on this plane; errors say `name`."""
        return self.transform.box(box, self.size, name)

    def cells(self, boxes: Sequence[Box]) -> Tensor:
        """Cells that boxes on the plane touch, bool [cells] in raster order."""
        return target_mask(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), self.grid).any(0)

    def original(self, cell: int) -> Box | None:
        """The part of the original under a cell (raster order), a little inside it; None: the cell is padding."""
        row, column = divmod(cell, self.grid.columns)
        side, inset = self.grid.cell, INSET * self.grid.cell
        low = [(at * side + inset - self.offset[axis]) / self.scale[axis] for axis, at in enumerate((column, row))]
        high = [((at + 1) * side - inset - self.offset[a]) / self.scale[a] for a, at in enumerate((column, row))]
        x0, y0 = (max(v, 0.0) for v in low)
        x1, y1 = (min(v, float(limit)) for v, limit in zip(high, self.size, strict=True))
        return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def unit(pixels: Tensor, transform: Transform) -> Tensor:
    """Normalised pixels [..., cell x cell x 3] as 0..1, clipped."""
    mean, std = transform.statistics()
    return (pixels.unflatten(-1, (-1, CHANNELS)) * std + mean).clamp(0, 1).flatten(-2)


def picture(patches: Tensor, grid: TokenGrid, transform: Transform) -> np.ndarray:
    """Normalised patches [1, cells, pixels] as a picture, uint8 [height, width, 3]."""
    pixels = unpatchify(unit(patches, transform), grid)[0]
    return (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
