"""R-Probe, step 4 of 8: the projected tokens of an image, and which of them are the target (`target_tokens`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava_patch.core.errors import HostError, InputError, SettingError
from llava_patch.core.finite import why_not_finite
from llava_patch.fusion import deep_stack_decoder
from llava_patch.fusion.base import Join, Taps
from llava_patch.hosts import tiles
from llava_patch.hosts.anatomy import Anatomy, get_handle
from llava_patch.hosts.host import named_weights
from llava_patch.probe.decoder import injection_layers
from llava_patch.probe.sample import Box
from llava_patch.probe.sequence import NO_CELL, Layout, merge_size, square_layout, target_mask, tiled_layout
from llava_patch.probe.transform import Transform, square_transform
from llava_patch.probe.window import TEXT_HEIGHT


@dataclass(frozen=True, eq=False)
class View(Layout):
    """The frozen visual tokens of one image, on CPU, and where they lie on the grid of the whole image.

    `tokens` are [tokens, hidden], in the dtype that the model computed them in; `injections` [layers, tokens, hidden],
    what DeepStack adds to them in the layers of `decoder.injection_layers(anatomy)`, None without it.
    """

    tokens: Tensor
    injections: Tensor | None = None


def make_transform(anatomy: Anatomy, image_processor: Any, mode: str, text_height: float = TEXT_HEIGHT) -> Transform:
    """The image transform of a model, for one of `IMAGE_MODES`.

    "resize", "crop", "pad" and "window" make one square of the side that the vision tower takes, on any model, and in
    "window" a sample's text is at least `text_height` tokens high; "anyres" is the tiling of a host that cuts images
    into tiles. A SettingError for a mode that the model or the processor does not know, a HostError for an image
    processor of another model, or a tower of several scales.
    """
    anatomy.check_one_scale("R-Probe")
    rows, columns = anatomy.grid
    height, width = rows * anatomy.patch_size, columns * anatomy.patch_size
    taps: Taps | None = getattr(get_handle(anatomy.model), "taps", None)
    # Where merge_padding adds to the patches, the last cells lie partly outside of the image and are left out.
    cell = anatomy.patch_size * (1 if taps is None else taps.merge_size)
    if mode == "anyres":
        if not tiles.cuts_tiles(anatomy):
            raise SettingError(
                'RProbe.image_mode = "anyres": this model does not cut images into tiles (a LLaVA-NeXT of Hugging Face '
                'or image_aspect_ratio = "anyres" on llava does): use "resize", "crop" or "pad"'
            )
        return Transform(image_processor, mode, height, width, cell, tiles.make_tiling(anatomy, image_processor))
    return square_transform(image_processor, mode, height, width, cell, text_height)


@torch.no_grad()
def encode_views(anatomy: Anatomy, transform: Transform, images: Sequence[Image.Image]) -> list[View]:
    """Run vision tower, fusion and projector over RGB images, through the host's own path: one view an image.

    The model is in evaluation mode. Tokens stand in the order in which the host gives them to the LLM: with tiles
    (anyres) the overview tile's, context only, then the big grid's; tokens over padding that the host drops are left
    out, and so are the learned vectors at the ends of lines. A HostError where the tower is not loaded or its tokens
    are not finite, an InputError for tokens that cannot be placed on the image.
    """
    if transform.tiling is not None:
        return [_view_of_tiles(anatomy, transform, transform.tiling, image) for image in images]
    tokens, injections = _encode(anatomy, transform.pixel_values(images))
    place = layout_of(anatomy, tokens.shape[1])
    added = [None] * len(tokens) if injections is None else injections.unbind(1)
    return [View(place.grid, place.positions, place.cells, one, more) for one, more in zip(tokens, added, strict=True)]


def _view_of_tiles(anatomy: Anatomy, transform: Transform, tiling: tiles.Tiling, image: Image.Image) -> View:
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
    if injections is not None:
        injections = injections.flatten(1, 2)[:, order]
    tokens = tokens.flatten(0, 1)[order]
    return View(layout.grid, layout.positions[order], layout.cells[order], tokens, injections)


def with_page(view: View, page: View, window: tuple[int, int, int, int], size: tuple[int, int]) -> View:
    """A window's view with its page's tokens in front of it: they are context, and lie where the page lies around it.

    Args:
        view: of the window, which was padded to a square.
        page: of the whole page, stretched.
        window: its (left, top, right, bottom) on the page, in pixels.
        size: (width, height) of the page, in pixels.
    """
    left, top, right, bottom = window
    side = max(right - left, bottom - top)
    corner = torch.tensor([top - (side - (bottom - top)) // 2, left - (side - (right - left)) // 2])
    pixels = torch.tensor([size[1] / page.grid.rows, size[0] / page.grid.columns])  # of the page, under one token
    cells = torch.tensor([view.grid.rows / side, view.grid.columns / side])  # of the window, a pixel of the page
    around = ((page.positions + 0.5) * pixels - corner) * cells - 0.5
    added = None
    if view.injections is not None and page.injections is not None:
        added = torch.cat([page.injections, view.injections], dim=1)
    return View(
        view.grid,
        torch.cat([around, view.positions]),
        torch.cat([torch.full_like(page.cells, NO_CELL), view.cells]),
        torch.cat([page.tokens, view.tokens]),
        added,
    )


def target_tokens(view: Layout, boxes: Sequence[Box], name: str) -> Tensor:
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


def layout_of(anatomy: Anatomy, tokens: int) -> Layout:
    """Where the tokens of one image (tile) sit; an InputError where tower and fusion explain another number of them."""
    taps: Taps | None = getattr(get_handle(anatomy.model), "taps", None)
    prefix, dropped, merge, pooled = anatomy.prefix_tokens, anatomy.dropped_tokens, 1, 0
    if taps is not None:
        merge, pooled = taps.merge_size, len(taps.groups) if taps.join is Join.TOKENS else 0
    elif not anatomy.drops_patch:
        merge = merge_size(tokens - max(0, prefix - dropped), *anatomy.grid)
    layout = square_layout(anatomy.grid, anatomy.patch_size, merge, pooled, prefix, dropped)
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
        tokens, taps = deep_stack_decoder.encode(anatomy, pixel_values)
        injections = torch.stack([tap.detach().cpu() for tap in taps[: len(layers)]])
    else:
        tokens = anatomy.encode_images(pixel_values)
    tokens = tokens.detach().to(device="cpu", copy=True)
    for what, values in (("DeepStack's features", injections), ("the projected visual tokens", tokens)):
        if values is not None and not torch.isfinite(values).all():
            raise HostError(why_not_finite(what, values.dtype, named_weights(anatomy)))
    return tokens, injections
