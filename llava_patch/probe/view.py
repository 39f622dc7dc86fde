"""One image as the probe sees it: its projected tokens, where each sits, and whose pixels each covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from llava_patch.errors import HostError
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.probe.sequence import TokenGrid, merge_size
from llava_patch.probe.transform import Transform


@dataclass(frozen=True, eq=False)
class View:
    """The frozen visual tokens of one image, on CPU.

    Attributes:
        tokens: [tokens, hidden], in the dtype that the model computed them in.
        positions: float32 [tokens, 2], (row, column) on the grid of the whole image.
        cells: int64 [tokens], number (raster order) of the grid's cell under each token; -1: no pixels of its own, so
            that it is context only.
        grid: how cells tile the processed image.
    """

    tokens: Tensor
    positions: Tensor
    cells: Tensor
    grid: TokenGrid


@torch.no_grad()
def look(anatomy: Anatomy, transform: Transform, images: Sequence[Image.Image]) -> list[View]:
    """Run vision tower, fusion and projector over RGB images, through the host's own path.

    Args:
        anatomy: the model under test, in evaluation mode.
        transform: from `make_transform`.
        images: RGB images.

    Raises:
        HostError: the tower is not loaded, or its tokens are not finite.
        InputError: the tokens of this model have no pixels each.
    """
    tokens = _encode(anatomy, transform.pixel_values(images))
    merge = merge_size(tokens.shape[1], *anatomy.grid)
    rows, columns = (n // merge for n in anatomy.grid)
    grid = TokenGrid(rows, columns, anatomy.patch_size * merge)
    places = grid.positions().to(torch.float32)
    cells = torch.arange(grid.tokens)
    return [View(one, places, cells, grid) for one in tokens]


def _encode(anatomy: Anatomy, pixel_values: Tensor) -> Tensor:
    """Projected visual tokens [images, tokens, hidden] on CPU, sharing nothing with the model."""
    vision = anatomy.vision_model
    if vision is None:
        raise HostError("the vision tower is not loaded yet: call its load_model() first")
    weight = next(vision.parameters())
    dtype = next(anatomy.projector.parameters(), weight).dtype
    tokens = anatomy.encode_images(pixel_values.to(device=weight.device, dtype=dtype))
    tokens = tokens.detach().to(device="cpu", copy=True)
    if not torch.isfinite(tokens).all():
        raise HostError(f"the projected visual tokens are not finite (computed in {dtype}): load the model in float32")
    return tokens
