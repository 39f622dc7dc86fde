"""One processed image as a plane of cells: which cells a box touches, and where a cell came from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_patch.probe.sample import Box
from llava_patch.probe.sequence import CHANNELS, TokenGrid, target_mask, unpatchify
from llava_patch.probe.transform import Transform

INSET = 0.01  # share of a cell by which a cell's own box is smaller, so that rounding does not touch a neighbour


@dataclass(frozen=True, eq=False)
class Plane:
    """A processed image and how it lies on the original.

    Attributes:
        pixels: float32 [3, height, width], normalised.
        grid: the cells on it.
        size: (width, height) of the original image.
        scale: (x, y), processed pixels a pixel of the original.
        offset: (x, y), where the original's corner lies, in processed pixels.
    """

    pixels: Tensor
    grid: TokenGrid
    size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]

    @classmethod
    def of(cls, transform: Transform, image: Image.Image, pixels: int) -> Plane:
        """The plane of an RGB image, for cells of that many values (cell x cell x 3)."""
        plane = transform.plane(image)
        cell = math.isqrt(pixels // CHANNELS)
        grid = TokenGrid(plane.shape[1] // cell, plane.shape[2] // cell, cell)
        # Resize, crop and pad move boxes by a scale and an offset: a box of 1 pixel in the middle, which no crop
        # cuts, tells both.
        x, y = image.width // 2, image.height // 2
        x0, y0, x1, y1 = transform.box((x, y, x + 1, y + 1), image.size, "the image's centre")
        scale = (x1 - x0, y1 - y0)
        return cls(plane, grid, image.size, scale, (x0 - x * scale[0], y0 - y * scale[1]))

    @property
    def stretch(self) -> float:
        """How much taller than wide a processed pixel is on the original (4 on a 1:4 page made square)."""
        return self.scale[0] / self.scale[1]

    def box(self, transform: Transform, box: Box, name: str) -> Box:
        """A box of the original on this plane."""
        return transform.box(box, self.size, name)

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
