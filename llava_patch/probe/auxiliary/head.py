"""The head of the auxiliary loss: R-Probe's decoder, in the precision of the run, on batches of a training step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.core.errors import InputError
from llava_patch.hosts import lora, zero
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.probe.decoder import ProbeDecoder, quarter
from llava_patch.probe.sequence import Layout, ProbeSequence, build_sequence, patchify
from llava_patch.settings.auxiliary import AuxiliaryProbe


class Head(nn.Module):
    """R-Probe's decoder as a module of the model that trains.

    DeepSpeed ZeRO-3 may have partitioned the model (then every rank must make the head), and peft's LoRA may wrap its
    Linear layers: the copies are plain layers with the update merged in.
    """

    positions: Tensor
    cells: Tensor

    def __init__(self, anatomy: Anatomy, layout: Layout, settings: AuxiliaryProbe) -> None:
        super().__init__()
        sources = [*anatomy.layers[: quarter(len(anatomy.layers))], anatomy.norm]
        with zero.gathered(p for module in sources for p in module.parameters()):
            self.decoder = ProbeDecoder(anatomy, layout.grid, settings.rope, settings.seed)
        lora.merge(self.decoder)
        device = next(self.decoder.parameters()).device
        self.register_buffer("positions", layout.positions.to(device), persistent=False)
        self.register_buffer("cells", layout.cells.to(device), persistent=False)
        self.text_start = layout.text_start
        self._exact = {n: b.detach().to("cpu", copy=True) for n, b in self.named_buffers()}
        self.to(next(anatomy.layers[0].parameters()).dtype)
        self.requires_grad_(True)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "Head":
        """Move or cast the head; positions and rotary frequencies would be wrong in half precision and keep theirs."""
        super()._apply(fn, *args, **kwargs)
        for name, exact in self._exact.items():
            buffer = self.get_buffer(name)
            buffer.data = exact.to(buffer.device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def forward(
        self, image_tokens: Tensor, text_tokens: Tensor, sequence: ProbeSequence, injections: Tensor | None = None
    ) -> Tensor:
        """Rebuilt pixels of every target, float32 [targets, pixels]; arguments as in `ProbeDecoder`.

        A reentrant checkpoint gives no gradient to a layer none of whose inputs requires one.
        """
        image_tokens, text_tokens = image_tokens.to(self.dtype), text_tokens.to(self.dtype)
        if not image_tokens.requires_grad:
            image_tokens = image_tokens.detach().requires_grad_()
        if injections is not None:
            injections = injections.to(self.dtype)
        return self.decoder(image_tokens, text_tokens, sequence, injections).float()


@dataclass(frozen=True, eq=False)
class Seen:
    """What a forward pass of the model made of its images, with the gradient.

    `tokens` are [images, tokens, hidden], projected; `pixels` [images, 3, height, width], what the tower saw;
    `injections` [layers, images, tokens, hidden], what DeepStack adds in the head's layers, None without it.
    """

    tokens: Tensor
    pixels: Tensor
    injections: Tensor | None = None


def token_errors(head: Head, embed: Callable[[Tensor], Tensor], seen: Seen, regions: Mapping[str, Tensor]) -> Tensor:
    """Mean squared error inside each target token of a batch, float32 [targets]; no gradient goes back through `embed`.

    The collator's regions are "image" int64 [samples], whose image it is; "target" bool [samples, tokens]; "text" int64
    [samples, width], padded with 0; "counts" int64 [samples], text tokens.
    """
    device = head.cells.device  # of its weights as well; on several devices (device_map) tokens may lie elsewhere
    regions = {name: value.to(device) for name, value in regions.items()}
    image, target = regions["image"], regions["target"]
    count = len(head.cells)
    if (seen.tokens.shape[1], target.shape[1]) != (count, count):
        raise InputError(
            f"the loss's head knows {count} tokens an image, the model gave {seen.tokens.shape[1]} and the collator "
            f"marked {target.shape[1]}"
        )
    injections = None if seen.injections is None else seen.injections.to(device)[:, image].transpose(0, 1)
    text = _embedded(embed, regions["text"])
    sequence = _sequence(head, head.positions, target, regions["counts"], text.shape[1])
    rebuilt = head(seen.tokens.to(device)[image], text, sequence, injections)
    grid = head.decoder.grid
    patches = patchify(seen.pixels.to(device)[:, :, : grid.rows * grid.cell, : grid.columns * grid.cell], grid)
    sample, token = target.nonzero(as_tuple=True)
    wanted = patches[image[sample], head.cells[token]].float()
    return (rebuilt - wanted).square().mean(-1)


def check_images(regions: Mapping[str, Tensor], images: int) -> None:
    """Refuse a region of an image that the batch does not have, where looking costs no wait for a device."""
    image = regions["image"]
    for number in image.tolist() if image.device.type == "cpu" else ():
        if not 0 <= number < images:
            raise InputError(
                f"a region belongs to image {number} of the batch, which has {images} (counted from 0): the collator "
                "must give the model all images of its records, in their order"
            )


def zero_gradient_pass(head: Head, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """The head on one made-up image token and one of text, times zero: a scalar 0 whose gradient reaches its weights.

    DDP and DeepSpeed reduce the same tensors on all ranks, and ZeRO-3 wants the same modules in the same order: the
    ranks and batches without a region run this. Nobody reads the values, so two tokens do.
    """
    device = head.cells.device
    one = torch.ones(1, 1, dtype=torch.int64, device=device)
    text = _embedded(embed, torch.zeros_like(one))
    tokens = torch.zeros(1, 1, text.shape[-1], dtype=head.dtype, device=device)
    layers = len(head.decoder.injection_layers)
    injections = tokens[:, None].expand(-1, layers, -1, -1) if layers else None
    return 0.0 * head(tokens, text, _sequence(head, head.positions[-1:], one.bool(), one[0], 1), injections).sum()


def _sequence(head: Head, positions: Tensor, target: Tensor, counts: Tensor, width: int) -> ProbeSequence:
    """The order of a batch of images that all have the same tokens, at `positions` [tokens, 2]."""
    places = positions.expand(len(target), -1, -1)
    start = torch.full_like(counts, head.text_start)
    return build_sequence(target, torch.ones_like(target), places, counts, start, width)


def _embedded(embed: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    weight = getattr(embed, "weight", ids)
    with torch.no_grad():
        return embed(ids.to(weight.device)).detach().to(ids.device)
