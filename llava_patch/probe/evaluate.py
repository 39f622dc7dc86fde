"""Held-out figures of a trained probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_patch.probe.decoder import ProbeDecoder
from llava_patch.probe.result import Reconstruction
from llava_patch.probe.sequence import CHANNELS, patchify, unpatchify
from llava_patch.probe.settings import RProbe
from llava_patch.probe.store import FrozenData
from llava_patch.probe.transform import Transform

SMALLEST_MSE = 1e-10  # a perfect sample counts as 100 dB


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Held-out figures; the names are those of `RProbeResult`, `variance` is its `target_variance`."""

    mse: float
    psnr: float
    constant_mse: float
    variance: float
    documents: list[dict[str, Any]]
    examples: list[Reconstruction]


@torch.no_grad()
def evaluate(
    decoder: ProbeDecoder, data: FrozenData, constant: Tensor, transform: Transform, settings: RProbe
) -> Evaluation:
    """Measure a probe on held-out samples.

    Args:
        decoder: the trained probe.
        data: frozen held-out samples.
        constant: float32 [pixels], the constant prediction: the mean training target.
        transform: for the pixel statistics and the examples.
        settings: `batch_size` and `examples` are read.
    """
    rebuilt = predict(decoder, data, settings.batch_size)
    owner = torch.arange(len(data)).repeat_interleave(data.counts)
    errors = (rebuilt - data.pixels).double().square().mean(-1)
    shown = (_unit(rebuilt, transform) - _unit(data.pixels, transform)).double().square().mean(-1)
    sample_mse = _mean_by(errors, owner, data.counts)
    sample_psnr = -10 * _mean_by(shown, owner, data.counts).clamp(min=SMALLEST_MSE).log10()
    documents = [
        {
            "id": name,
            "document": document,
            "text": text,
            "tokens": int(data.counts[i]),
            "mse": float(sample_mse[i]),
            "psnr": float(sample_psnr[i]),
        }
        for i, (name, document, text) in enumerate(data.labels)
    ]
    kept = min(settings.examples, len(data))
    chosen = sorted({round(i * (len(data) - 1) / max(1, kept - 1)) for i in range(kept)})
    return Evaluation(
        mse=float(errors.mean()),
        psnr=float(sample_psnr.mean()),
        constant_mse=float((data.pixels - constant).double().square().mean()),
        variance=float(data.pixels.double().var(0, correction=0).mean()),
        documents=documents,
        examples=[_example(i, data, rebuilt[owner == i], transform, float(sample_mse[i])) for i in chosen],
    )


@torch.no_grad()
def predict(decoder: ProbeDecoder, data: FrozenData, batch_size: int) -> Tensor:
    """What the decoder answers for every target, float32 [targets, pixels] on CPU, in the order of `data.pixels`."""
    device = next(decoder.parameters()).device
    rebuilt = []
    with torch.autocast(device.type, enabled=False):
        for index in torch.arange(len(data)).split(batch_size):
            batch = data.batch(index, device)
            rebuilt.append(decoder(batch.image_tokens, batch.text_tokens, batch.sequence, batch.injections).cpu())
    return torch.cat(rebuilt)


def _mean_by(values: Tensor, owner: Tensor, counts: Tensor) -> Tensor:
    """Mean of the values of each owner, float64 [samples]."""
    return torch.zeros(len(counts), dtype=torch.float64).index_add(0, owner, values) / counts


def _unit(pixels: Tensor, transform: Transform) -> Tensor:
    """Normalised pixels [..., pixels] as 0..1, clipped."""
    mean, std = transform.statistics()
    return (pixels.unflatten(-1, (-1, CHANNELS)) * std + mean).clamp(0, 1).flatten(-2)


def _example(index: int, data: FrozenData, rebuilt: Tensor, transform: Transform, mse: float) -> Reconstruction:
    sample = data.samples[index]
    image = sample.open_image()
    patches = patchify(transform.pixel_values([image]), data.grid)
    target = data.target[index]
    painted = patches.clone()
    painted[0, target] = rebuilt
    where = unpatchify(target[None, :, None].expand(1, -1, data.grid.pixels), data.grid)[0, 0]

    def picture(values: Tensor) -> np.ndarray:
        pixels = unpatchify(_unit(values, transform), data.grid)[0]
        return (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()

    return Reconstruction(
        id=sample.id,
        text=sample.text,
        boxes=tuple(transform.box(box, image.size, sample.id) for box in sample.boxes),
        original=picture(patches),
        rebuilt=picture(painted),
        target=where.numpy(),
        mse=mse,
    )
