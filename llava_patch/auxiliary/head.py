"""The head of the auxiliary loss: R-Probe's decoder, in the precision of the run, on batches of a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.errors import InputError
from llava_patch.hosts import lora, zero
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.probe.decoder import ProbeDecoder, quarter
from llava_patch.probe.sequence import TokenGrid, build_sequence, patchify
from llava_patch.settings.auxiliary import AuxiliaryProbe


class Head(nn.Module):
    """R-Probe's decoder as a module of the model that trains.

    Args:
        anatomy: the model; DeepSpeed ZeRO-3 may have partitioned it (then every rank must make the head), and its
            Linear layers may be wrapped by peft's LoRA: the copies are plain layers with the update merged in.
        grid: its visual tokens.
        settings: of the loss.

    Raises:
        HostError: fewer than 4 decoder layers, quantised weights, or an unknown rotary embedding.
    """

    def __init__(self, anatomy: Anatomy, grid: TokenGrid, settings: AuxiliaryProbe) -> None:
        super().__init__()
        sources = [*anatomy.layers[: quarter(len(anatomy.layers))], anatomy.norm]
        with zero.gathered(p for module in sources for p in module.parameters()):
            self.decoder = ProbeDecoder(anatomy, grid, settings.rope, settings.seed)
        lora.merge(self.decoder)
        self._frequencies = {n: b.detach().to("cpu", copy=True) for n, b in self.decoder.named_buffers()}
        self.to(next(anatomy.layers[0].parameters()).dtype)
        self.requires_grad_(True)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "Head":
        """Move or cast the head; positions would be wrong in half precision, so the frequencies keep theirs."""
        super()._apply(fn, *args, **kwargs)
        for name, exact in self._frequencies.items():
            buffer = self.decoder.get_buffer(name)
            buffer.data = exact.to(buffer.device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def forward(self, image_tokens: Tensor, text_tokens: Tensor, sequence: Any) -> Tensor:
        """Rebuilt pixels of every target, float32 [targets, pixels]; arguments as in `ProbeDecoder`.

        A reentrant checkpoint gives no gradient to a layer none of whose inputs requires one.
        """
        image_tokens, text_tokens = image_tokens.to(self.dtype), text_tokens.to(self.dtype)
        if not image_tokens.requires_grad:
            image_tokens = image_tokens.detach().requires_grad_()
        return self.decoder(image_tokens, text_tokens, sequence).float()


def token_errors(
    head: Head, embed: Callable[[Tensor], Tensor], tokens: Tensor, pixels: Tensor, regions: Mapping[str, Tensor]
) -> Tensor:
    """Mean squared error inside each target token of a batch, float32 [targets].

    Args:
        head: the head.
        embed: the token embedding; no gradient goes back through it.
        tokens: [images, tokens, hidden], projected visual tokens of the batch, with their gradient.
        pixels: [images, 3, height, width], what the vision tower saw.
        regions: from the collator: "image" int64 [samples], whose image it is; "target" bool [samples, tokens];
            "text" int64 [samples, width], padded with 0; "counts" int64 [samples], text tokens.

    Raises:
        InputError: regions and images do not fit together.
    """
    grid = head.decoder.grid
    if tokens.shape[1:2] != regions["target"].shape[1:2] or tokens.shape[1] != grid.tokens:
        raise InputError(
            f"the loss's head rebuilds {grid.tokens} tokens an image, the model gave {tokens.shape[1]} and the "
            f"collator marked {regions['target'].shape[1]}"
        )
    image = regions["image"]
    sequence = build_sequence(regions["target"], regions["counts"], grid, regions["text"].shape[1])
    rebuilt = head(tokens[image], _embedded(embed, regions["text"]), sequence)
    wanted = patchify(pixels, grid)[image][regions["target"]].float()
    return (rebuilt - wanted).square().mean(-1)


def idle(head: Head, embed: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    """The head on a made-up image, times zero: a scalar 0 whose gradient reaches all its weights.

    DDP and DeepSpeed reduce the same tensors on all ranks, and ZeRO-3 wants the same modules in the same order: the
    ranks and batches without a region run this.
    """
    grid = head.decoder.grid
    target = torch.zeros(1, grid.tokens, dtype=torch.bool, device=device)
    target[:, 0] = True
    one = torch.ones(1, dtype=torch.int64, device=device)
    sequence = build_sequence(target, one, grid, 1)
    text = _embedded(embed, torch.zeros(1, 1, dtype=torch.int64, device=device))
    tokens = torch.zeros(1, grid.tokens, text.shape[-1], dtype=head.dtype, device=device)
    return 0.0 * head(tokens, text, sequence).sum()


def _embedded(embed: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    with torch.no_grad():
        return embed(ids).detach()
