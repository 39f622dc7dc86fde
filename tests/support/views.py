"""Tiny models of both hosts for tests of `encode_views`, whose tokens know nothing but their own patches."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from llava_patch.hosts.anatomy import Anatomy, find
from llava_patch.probe.sequence import patchify
from llava_patch.probe.transform import Transform
from tests.support.models import PINPOINTS, hf_model, hf_next_model, llava_model

SIDE, PATCH = 56, 14


def short_sighted(model: nn.Module) -> nn.Module:
    """Reduce the tower's blocks to a constant each: a token then holds its own patch alone, and blocks differ."""
    generator = torch.Generator().manual_seed(0)
    for block in find(model).vision_parts().blocks:
        for linear in (block.self_attn.out_proj, block.mlp.fc2):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(block.mlp.fc2.bias, generator=generator)
    return model


def square_model(host: str, folder) -> nn.Module:
    return short_sighted(hf_model() if host == "hf" else llava_model(folder))


def anyres_model(host: str, folder, merge_type: str = "spatial_unpad") -> tuple[nn.Module, object]:
    """A model that cuts tiles, and its image processor."""
    from transformers import (
        CLIPImageProcessor,
        LlavaNextImageProcessor,
    )

    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    if host == "llava":
        model = llava_model(folder)
        model.config.image_aspect_ratio, model.config.mm_patch_merge_type = "anyres", merge_type
        model.config.image_grid_pinpoints = str(PINPOINTS)
        model.model.image_newline = nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(2)))
        return short_sighted(model), CLIPImageProcessor(**sizes)
    model = hf_next_model()
    nn.init.normal_(model.model.image_newline)
    return short_sighted(model), LlavaNextImageProcessor(**sizes, image_grid_pinpoints=PINPOINTS)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A page on which no two places look alike."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def with_block(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """The page with one block inverted: it differs from the page everywhere in the block and nowhere else."""
    pixels = np.array(image)
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] ^= 255
    return Image.fromarray(pixels)


def changed_cells(transform: Transform, view, before: Image.Image, after: Image.Image) -> Tensor:
    """Which cells' pixels differ between two images, bool [cells]."""
    cells = patchify(torch.stack([transform.plane(before), transform.plane(after)]), view.grid)
    return (cells[0] != cells[1]).any(-1)


def encode(anatomy: Anatomy, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return anatomy.encode_images(pixels)


def paper_with_rectangle(size: tuple[int, int], box, paper=(122, 116, 104)) -> Image.Image:
    image = Image.new("RGB", size, paper)
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=(255, 0, 0))
    return image
