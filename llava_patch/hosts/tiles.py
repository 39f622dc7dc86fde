"""How the hosts cut an image into tiles (anyres), and in which order its tokens come out.

An image is resized with its aspect kept and centred on one of several resolutions; that plane is cut into squares of
the tower's side. In front of them stands the whole image, stretched to one such square: the overview tile.
"""

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava_patch.core.errors import HostError
from llava_patch.core.undo import UndoStack
from llava_patch.hosts.anatomy import HF, LLAVA, Anatomy
from llava_patch.hosts.compat import layout_options


@dataclass(frozen=True)
class Placement:
    """Where an image lies on the plane that its tiles form, in pixels of that plane."""

    width: int  # of the plane
    height: int  # of the plane
    new_width: int  # of the resized image
    new_height: int  # of the resized image
    left: int  # padding on its left
    top: int  # padding above it


@dataclass(frozen=True)
class Tiling:
    """A host's anyres."""

    host: str  # "llava" or "hf"
    resolutions: tuple[tuple[int, int], ...]  # (width, height) of the planes to choose from
    side: int  # of a tile, in pixels

    def place(self, size: tuple[int, int]) -> Placement:
        """Choose the plane of an image of `size` (width, height) by the host's own rule, and centre the image on it."""
        if self.host == LLAVA:
            from llava.mm_utils import select_best_resolution

            width, height = select_best_resolution(size, list(self.resolutions))
        else:
            from transformers.image_processing_utils import select_best_resolution

            height, width = select_best_resolution(size[::-1], [r[::-1] for r in self.resolutions])
        scale = min(width / size[0], height / size[1])
        new_width, new_height = min(math.ceil(size[0] * scale), width), min(math.ceil(size[1] * scale), height)
        return Placement(width, height, new_width, new_height, (width - new_width) // 2, (height - new_height) // 2)

    def cut(self, processor: Any, image: Image.Image) -> Tensor:
        """Tiles of an RGB image through the host's own code: float32 [1 + tiles, 3, side, side], overview first.

        HostError: the image processor does not give tiles of the tower's side.
        """
        if self.host == LLAVA:
            from llava.mm_utils import process_anyres_image

            tiles = process_anyres_image(image, processor, [list(r) for r in self.resolutions])
        else:
            tiles = processor([image], return_tensors="pt", **layout_options(processor))["pixel_values"][0]
        place = self.place(image.size)
        expected = (1 + place.width * place.height // self.side**2, 3, self.side, self.side)
        if tuple(tiles.shape) != expected:
            raise HostError(
                f"the image processor gives tiles of shape {tuple(tiles.shape)}, the model takes {expected}: is it "
                "this model's image processor?"
            )
        return tiles.to(torch.float32)

    def stitch(self, tiles: Tensor, place: Placement) -> Tensor:
        """The plane that the tiles behind the overview were cut from: [3, height, width]."""
        rows, columns = place.height // self.side, place.width // self.side
        grid = tiles[1:].unflatten(0, (rows, columns))
        return grid.permute(2, 0, 3, 1, 4).reshape(3, place.height, place.width)


def cuts_tiles(anatomy: Anatomy) -> bool:
    """Whether the host cuts images into tiles: LLaVA-NeXT and OneVision on HF, `image_aspect_ratio` on `llava`."""
    if anatomy.host == HF:
        return bool(anatomy.tiles)
    return str(getattr(anatomy.model.config, "image_aspect_ratio", "")).startswith(("anyres", "highres", "crop_split"))


def make_tiling(anatomy: Anatomy, processor: Any) -> Tiling:
    """The tiling of a model for which `cuts_tiles` holds, and of its image processor.

    HostError: tiles that do not fit the tower, a processor of another model, or another way of cutting.
    """
    config = anatomy.model.config
    way = str(getattr(config, "vision_aspect_ratio", None) or getattr(config, "image_aspect_ratio", "anyres"))
    if way != "anyres":  # of HF's, OneVision alone says it
        raise HostError(
            f"this model cuts images into tiles as {way} says, which makes tokens of several patches: image mode "
            '"anyres" is known for plain anyres: use "resize", "crop" or "pad"'
        )
    rows, columns = anatomy.grid
    side = rows * anatomy.patch_size
    if rows != columns:
        raise HostError(f"anyres cuts square tiles, but this tower takes {rows} x {columns} patches")
    given = config.image_grid_pinpoints
    resolutions = _pairs(ast.literal_eval(given) if isinstance(given, str) else given)
    if anatomy.host == HF:
        if not hasattr(processor, "image_grid_pinpoints"):
            raise HostError(
                f"{type(processor).__name__} does not cut images into tiles: a LLaVA-NeXT model needs its "
                "LlavaNextImageProcessor"
            )
        theirs = _pairs(processor.image_grid_pinpoints)
        if set(theirs) != set(resolutions):
            raise HostError(
                f"image_grid_pinpoints of the image processor {theirs} and of the model {resolutions} differ: is it "
                "this model's image processor?"
            )
        resolutions = tuple(r[::-1] for r in resolutions)
    for width, height in resolutions:
        if width % side or height % side:
            raise HostError(
                f"image_grid_pinpoints: {width} x {height} pixels are no multiple of the vision tower's {side}"
            )
    sizes = [(name, _side(getattr(processor, name, None))) for name in ("size", "crop_size")]
    if wrong := [f"{name} = {value}" for name, value in sizes if value not in (side, None)]:
        raise HostError(
            f"the image processor's {', '.join(wrong)} is not the vision tower's side of {side}: is it this model's "
            "image processor?"
        )
    return Tiling(anatomy.host, resolutions, side)


def _pairs(sizes: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(a), int(b)) for a, b in sizes)


def _side(size: Any) -> int | None:
    """The side of a square {"shortest_edge"} or {"height", "width"}; 0 for one that is not square."""
    if size is None:
        return None
    if "shortest_edge" in size:
        return int(size["shortest_edge"])
    return int(size["height"]) if size["height"] == size["width"] else 0


def order_of_tokens(anatomy: Anatomy, shape: Sequence[int], size: tuple[int, int]) -> Tensor:
    """Which features of an image's tiles, `shape` (tiles, tokens a tile), the host gives to the decoder, in order.

    The host joins tiles, cuts padding off and adds a learned vector after each line. It does the same to features that
    hold their own number; that vector is no feature and left out. `size` is (width, height) of the original image, the
    result int64 [tokens], rows of the features [tiles * tokens a tile], on CPU.
    """
    tiles, tokens = shape
    if anatomy.host == HF:
        numbers = torch.arange(1, tiles * tokens + 1).view(tiles, tokens, 1)
        strategy = anatomy.model.config.vision_feature_select_strategy
        packed = anatomy.wrapper.pack_image_features(
            [numbers], torch.tensor([size[::-1]]), strategy, image_newline=torch.zeros(1, dtype=torch.int64)
        )[0][0]
        found = packed[:, 0]
    else:
        found = _order_on_llava(anatomy, tiles, tokens, size)
    return found[found > 0].cpu() - 1


def _order_on_llava(anatomy: Anatomy, tiles: int, tokens: int, size: tuple[int, int]) -> Tensor:
    model = anatomy.model
    device = anatomy.embed_tokens.weight.device
    numbers = _numbers((tiles, tokens, int(anatomy.text_config.hidden_size)), device)
    with UndoStack() as undo:
        # To the host a prompt of one token is a step of decoding: a text token stands in front of the image. It
        # must not run its tower on numbers, nor cut the image where a prompt would end.
        undo.set_attribute(model, "encode_images", lambda images: numbers)
        undo.set_attribute(model.config, "tokenizer_model_max_length", None)
        with torch.no_grad():
            embeds = model.prepare_inputs_labels_for_multimodal(
                torch.tensor([[0, anatomy.image_token_id]], device=device), None, None, None, None,
                [torch.zeros(tiles, 3, 1, 1, device=device)], [size],
            )[4]  # fmt: skip
        return _rows(embeds, torch.ones(1, 1, dtype=torch.bool, device=device))[0, 1:]


def _numbers(shape: Sequence[int], device: torch.device) -> Tensor:
    """Features that hold their own row's number, to learn where the host puts each row: float32 of `shape`.

    The host splits, cuts, joins and truncates features [images (or tiles), tokens, hidden] on the way (anyres above
    all); it does the same to these. Channels are 1 + the row and its negative in turn, which no learned vector is.
    """
    tiles, tokens, width = shape
    numbers = torch.arange(1, tiles * tokens + 1, device=device, dtype=torch.float32)
    signs = torch.tensor([1.0, -1.0], device=device).repeat(width // 2)
    return (numbers[:, None] * signs).view(tiles, tokens, width)


def _rows(embeds: Tensor, image_mask: Tensor) -> Tensor:
    """Which row of the image features stands at each place of the decoder's input: int64 [batch, tokens].

    It is 1 + the row, 0 where there is none (text, padding, line ends of anyres). `embeds` [batch, tokens, hidden] is
    what the host made of `_numbers`, `image_mask` bool [batch, tokens] or [1, 1].
    """
    first, second = embeds[..., 0], embeds[..., 1]
    numbered = image_mask & (first == -second) & (first >= 1) & (first == first.round())
    return torch.where(numbered, first, torch.zeros_like(first)).long()
