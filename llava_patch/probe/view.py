"""R-Probe, step 4 of 8: the projected tokens of an image, and which of them are the target (`target_tokens`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava_patch.core.errors import HostError, InputError, SettingError
from llava_patch.fusion import stack
from llava_patch.fusion.taps import Join, Taps
from llava_patch.hosts import tiles
from llava_patch.hosts.anatomy import Anatomy, get_handle
from llava_patch.probe.decoder import injection_layers
from llava_patch.probe.layout import Layout, square_layout, tiled_layout
from llava_patch.probe.sample import Box
from llava_patch.probe.sequence import TokenGrid, merge_size, target_mask
from llava_patch.probe.transform import Transform, check_crop


@dataclass(frozen=True, eq=False)
class View:
    """The frozen visual tokens of one image, on CPU.

    Attributes:
        tokens: [tokens, hidden], in the dtype that the model computed them in.
        positions: float32 [tokens, 2], (row, column) on the grid of the whole image; fractions are possible.
        cells: int64 [tokens], number (raster order) of the grid's cell under each token; -1: no pixels of its own, so
            that it is context only.
        grid: how cells tile `Transform.plane(image)`.
        injections: what DeepStack adds to these tokens in the probe's layers: [layers, tokens, hidden], dtype as
            tokens; None without DeepStack. The layers are those of `decoder.injection_layers(anatomy)`, in order.
    """

    tokens: Tensor
    positions: Tensor
    cells: Tensor
    grid: TokenGrid
    injections: Tensor | None = None

    @property
    def text_start(self) -> int:
        """The first text token sits at (p, p) for this p, the first place past all tokens on both axes."""
        return max(self.grid.text_start, int(self.positions.max().floor()) + 1)


def make_transform(anatomy: Anatomy, image_processor: Any, mode: str) -> Transform:
    """The image transform of a model, for one of `IMAGE_MODES`.

    "resize", "crop" and "pad" make one square of the side that the vision tower takes, on any model; on one that cuts
    images into tiles this is what its overview tile is made of. "anyres" is the host's own tiling.

    Raises:
        SettingError: a mode that the model or the processor does not know.
        HostError: an image processor of another model, or a tower of several scales.
    """
    if hasattr(anatomy.tower, "s2_scales"):
        raise HostError("R-Probe does not know multi-scale (S2) towers: load the model without s2")
    rows, columns = anatomy.grid
    height, width = rows * anatomy.patch_size, columns * anatomy.patch_size
    taps = _taps(anatomy)
    # Where merge_padding adds to the patches, the last cells lie partly outside of the image and are left out.
    cell = anatomy.patch_size * (1 if taps is None else taps.merge_size)
    if mode == "anyres":
        if not tiles.cuts_tiles(anatomy):
            raise SettingError(
                'RProbe.image_mode = "anyres": this model does not cut images into tiles (a LLaVA-NeXT of Hugging Face '
                'or image_aspect_ratio = "anyres" on llava does): use "resize", "crop" or "pad"'
            )
        return Transform(image_processor, mode, height, width, cell, tiles.make_tiling(anatomy, image_processor))
    if mode == "crop":
        check_crop(image_processor)
    return Transform(image_processor, mode, height, width, cell)


@torch.no_grad()
def encode_views(anatomy: Anatomy, transform: Transform, images: Sequence[Image.Image]) -> list[View]:
    """Run vision tower, fusion and projector over RGB images, through the host's own path: one view an image.

    The model is in evaluation mode. Tokens stand in the order in which the host gives them to the LLM. With tiles
    (anyres) that is the overview tile's tokens, context only, then the big grid's; tokens over padding that the host
    drops are left out, and so are the learned vectors at the ends of lines, which hold nothing of the image.

    Raises:
        HostError: the tower is not loaded, or its tokens are not finite.
        InputError: tokens that cannot be placed on the image.
    """
    if transform.tiling is None:
        tokens, injections = _encode(anatomy, transform.pixel_values(images))
        layout = layout_of(anatomy, tokens.shape[1])
        return [
            View(one, layout.positions, layout.cells, layout.grid, None if injections is None else injections[:, i])
            for i, one in enumerate(tokens)
        ]
    return [_look_at_tiles(anatomy, transform, image) for image in images]


def _look_at_tiles(anatomy: Anatomy, transform: Transform, image: Image.Image) -> View:
    tiling = transform.tiling
    assert tiling is not None
    tokens, injections = _encode(anatomy, tiling.cut(transform.processor, image))
    rows, columns = anatomy.grid
    if anatomy.tiles and tokens.shape[1] != rows * columns:
        raise InputError(
            f"a tile has {tokens.shape[1]} visual tokens, the host lays out {rows} x {columns}: it needs one token a "
            'patch (a CLS token that is kept, or a first patch that is dropped): use RProbe.image_mode = "resize"'
        )
    place = tiling.place(image.size)
    layout = tiled_layout(
        layout_of(anatomy, tokens.shape[1]),
        (place.height // tiling.side, place.width // tiling.side),
        (place.left, place.top, place.new_width, place.new_height),
        tiling.side,
    )
    order = tiles.order_of_tokens(anatomy, tokens.shape[:2], image.size)
    return View(
        tokens.flatten(0, 1)[order],
        layout.positions[order],
        layout.cells[order],
        layout.grid,
        None if injections is None else injections.flatten(1, 2)[:, order],
    )


def target_tokens(view: View | Layout, boxes: Sequence[Box], name: str) -> Tensor:
    """Tokens whose pixels meet one of the boxes (in pixels of `Transform.plane(image)`), bool [tokens].

    Cells without a token (a first patch that HF drops, padding that anyres cuts off) are not measured; an InputError
    with `name` where no token has pixels under the boxes.
    """
    cells = target_mask(torch.tensor(boxes, dtype=torch.float32), view.grid).any(0)
    # Cell -1 looks at the place added at the end, which is never a target.
    target = torch.cat([cells, cells.new_zeros(1)])[view.cells]
    if not target.any():
        raise InputError(
            f"{name}: no visual token has its pixels under {[tuple(b) for b in boxes]} of the processed image "
            f"({view.grid.columns} x {view.grid.rows} cells of {view.grid.cell} pixels): the host drops the tokens "
            "that would cover it"
        )
    return target


def _taps(anatomy: Anatomy) -> Taps | None:
    return getattr(get_handle(anatomy.model), "taps", None)


def layout_of(anatomy: Anatomy, tokens: int) -> Layout:
    """Where the tokens of one image (tile) sit; an InputError where tower and fusion explain another number of them."""
    taps, prefix, dropped = _taps(anatomy), anatomy.prefix_tokens, anatomy.dropped_tokens
    if taps is not None:
        pooled = len(taps.groups) if taps.join is Join.TOKENS else 0
        layout = square_layout(anatomy.grid, anatomy.patch_size, taps.merge_size, pooled, prefix, dropped)
    else:
        kept = max(0, prefix - dropped)
        merge = 1 if anatomy.drops_patch else merge_size(tokens - kept, *anatomy.grid)
        layout = square_layout(anatomy.grid, anatomy.patch_size, merge, 0, prefix, dropped)
    if len(layout.cells) != tokens:
        raise InputError(
            f"an image has {tokens} visual tokens, but a grid of {anatomy.grid[0]} x {anatomy.grid[1]} patches under "
            f"this model's fusion gives {len(layout.cells)}: R-Probe cannot tell which pixels each token covers"
        )
    return layout


def _encode(anatomy: Anatomy, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Projected visual tokens [images, tokens, hidden] and DeepStack's [layers, images, tokens, hidden].

    Both lie on CPU and share nothing with the model.
    """
    vision = anatomy.vision_model
    if vision is None:
        raise HostError("the vision tower is not loaded yet: call its load_model() first")
    weight = next(vision.parameters())
    dtype = next(anatomy.projector.parameters(), weight).dtype
    pixel_values = pixel_values.to(device=weight.device, dtype=dtype)
    layers = injection_layers(anatomy)
    injections = None
    if layers:
        tokens, taps = stack.encode(anatomy, pixel_values)
        injections = torch.stack([tap.detach().cpu() for tap in taps[: len(layers)]])
        _check_finite(injections, "DeepStack's features")
    else:
        tokens = anatomy.encode_images(pixel_values)
    tokens = tokens.detach().to(device="cpu", copy=True)
    _check_finite(tokens, "the projected visual tokens")
    return tokens, injections


def _check_finite(values: Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        raise HostError(f"{what} are not finite (computed in {values.dtype}): load the model in float32")
