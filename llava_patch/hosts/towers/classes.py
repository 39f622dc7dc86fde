"""Vision models of transformers that do not answer as a host asks, made to: square pixels in, hidden states out.

Apart from `tower_models`, so that a CLIP tower imports none of them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import InternVLVisionModel, Siglip2VisionModel

from llava_patch.core.undo import UndoStack
from llava_patch.hosts.towers import layout as towers


class SquareSiglip2(Siglip2VisionModel):
    """SigLIP 2 NaFlex on a fixed square grid: takes pixels, as the other towers do, and cuts the patches itself."""

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """[images, 3, side, side], the side a multiple of the patch size, to the stock class's output."""
        size = self.config.patch_size
        patches = patchify(pixel_values, size)
        rows, columns = pixel_values.shape[-2] // size, pixel_values.shape[-1] // size
        mask = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
        shapes = torch.tensor([[rows, columns]]).expand(len(patches), 2)  # on the CPU: read as sizes, one by one
        return super().forward(patches, mask, shapes, **kwargs)


class InternViT(InternVLVisionModel):
    """InternVLVisionModel, which records no hidden states, with them."""

    last_state_is_normed = True

    def forward(self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any) -> Any:
        """[images, 3, side, side] to the stock class's output, with hidden states when asked."""
        return with_states(self, lambda: super(InternViT, self).forward(pixel_values, **kwargs), output_hidden_states)


def with_states(vision: Any, forward: Callable[[], Any], wanted: bool | None) -> Any:
    """Run a stock forward and, if `wanted`, add what goes into each block and comes out at the end as hidden states.

    Entry N is the model's last_hidden_state, after the final norm, as transformers' own recorder has it.
    """
    if not wanted:
        return forward()
    states: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    with UndoStack() as undo:  # taken back before a recomputation of checkpointed blocks, which would be heard again
        for block in towers.describe(vision).blocks:
            undo.push(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
        output = forward()
    output["hidden_states"] = (*states, output.last_hidden_state)
    return output


def patchify(pixels: Tensor, size: int) -> Tensor:
    """Cut images as Siglip2ImageProcessor does: [images, channels, height, width] to [images, patches, values].

    Patches in rows; a patch's values in its rows, columns and channels, channels fastest.
    """
    images, channels, height, width = pixels.shape
    cut = pixels.reshape(images, channels, height // size, size, width // size, size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(images, (height // size) * (width // size), size * size * channels)
