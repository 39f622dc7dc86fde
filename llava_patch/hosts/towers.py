"""Where things are in a vision tower: its blocks, what comes before and after them, and what its tokens mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from llava_patch.errors import HostError


@dataclass(frozen=True, eq=False)
class Tower:
    """The parts of one vision model.

    Attributes:
        before: modules before the first block (patch embedding, a norm).
        blocks: the N transformer blocks.
        after: modules after the last block (final norm, pooling head).
        own: parameters that belong to no child module.
        prefix_tokens: tokens before the patches (1 for a CLS token).
        grid: rows and columns of patches.
        last_is_normed: whether the last hidden state that the model reports comes after the final norm.
    """

    before: list[nn.Module]
    blocks: nn.ModuleList
    after: list[nn.Module]
    own: list[nn.Parameter]
    prefix_tokens: int
    grid: tuple[int, int]
    last_is_normed: bool = False


def describe(vision: Any) -> Tower:
    """Describe a vision model of transformers.

    Raises:
        HostError: its class is not known; the message names what was not found.
    """
    body = getattr(vision, "vision_model", vision)
    blocks = getattr(getattr(body, "encoder", None), "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise HostError(f"vision tower {type(vision).__name__} is not known: it has no encoder.layers")
    names = [name for name, _ in body.named_children()]
    at = names.index("encoder")
    children = dict(body.named_children())
    side = int(vision.config.image_size) // int(vision.config.patch_size)
    return Tower(
        before=[children[n] for n in names[:at]],
        blocks=blocks,
        after=[children[n] for n in names[at + 1 :]],
        own=list(body.parameters(recurse=False)),
        prefix_tokens=1 if hasattr(getattr(body, "embeddings", None), "class_embedding") else 0,
        grid=(side, side),
    )
