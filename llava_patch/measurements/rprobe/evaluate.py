"""R-Probe, step 8 of 8: held-out figures, summed batch by batch: memory does not grow with the pixels of the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_patch.core.errors import InputError
from llava_patch.core.parallel import exchange, share
from llava_patch.measurements.rprobe.bootstrap import FEW, interval
from llava_patch.measurements.rprobe.result import Part, Reconstruction
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.store.data import Batch, FrozenData
from llava_patch.probe.decoder import ProbeDecoder
from llava_patch.probe.sequence import CHANNELS, patchify, unpatchify
from llava_patch.probe.transform import Plane, Transform, picture, unit

SMALLEST_MSE = 1e-10  # a perfect sample counts as 100 dB

# Columns of the table of sums, one row a sample; a channel's sums stand side by side.
TOKENS, ERROR, SHOWN, CONSTANT, VARIANCE, INSIDE, OUTSIDE = 0, 1, 2, 3, 4, 5, 5 + 2 + 2 * CHANNELS
COLUMNS = OUTSIDE + 2 + 2 * CHANNELS


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Held-out figures, all of which but the notes go to the fields of `RProbeResult` that have their names."""

    mse: float
    fvu: float
    psnr: float
    constant_mse: float
    target_variance: float
    mse_interval: tuple[float, float] | None
    fvu_interval: tuple[float, float] | None
    inside: Part | None
    outside: Part | None
    documents: list[dict[str, Any]]
    examples: list[Reconstruction]
    notes: list[str]


@torch.no_grad()
def evaluate(
    decoder: ProbeDecoder,
    data: FrozenData,
    constant: Tensor,
    transform: Transform,
    settings: RProbe,
    show: Sequence[str] = (),
) -> Evaluation:
    """Measure a trained probe on frozen held-out samples.

    The constant prediction is float32 [pixels], the mean training target. Samples whose ids `show` has become examples;
    none: `settings.examples` of them, spread over the errors.
    """
    check_shown(data, show)
    table = _table(decoder, data, constant, transform, settings.batch_size)
    tokens = float(table[:, TOKENS].sum())
    documents = _documents(data.labels, table)
    mse = float(table[:, ERROR].sum()) / tokens
    mse_interval = interval(documents, settings.resamples, settings.seed)
    return Evaluation(
        mse=mse,
        fvu=mse / data.target_variance,
        psnr=sum(document["psnr"] for document in documents) / len(documents),
        constant_mse=float(table[:, CONSTANT].sum()) / tokens,
        target_variance=data.target_variance,
        mse_interval=mse_interval,
        fvu_interval=interval(documents, settings.resamples, settings.seed, relative_to="variance"),
        inside=_part(table, INSIDE),
        outside=_part(table, OUTSIDE),
        documents=documents,
        examples=[
            example(decoder, data, i, transform, documents[i]["mse"], documents[i]["psnr"])
            for i in (
                check_shown(data, show)
                or spread_over_ranks([document["mse"] for document in documents], settings.examples)
            )
        ],
        notes=[FEW] if mse_interval is None else [],
    )


def _table(decoder: ProbeDecoder, data: FrozenData, constant: Tensor, transform: Transform, size: int) -> Tensor:
    """Sums of every held-out sample, float64 [samples, COLUMNS] on CPU: all figures are made of these.

    Every process measures its share of the samples, and gets the sums of all.
    """
    device = next(decoder.parameters()).device
    rows = [torch.zeros(0, COLUMNS, dtype=torch.float64)]
    for index in torch.tensor(share(len(data)), dtype=torch.int64).split(size):
        if len(index):
            batch = data.batch(index, device)
            rows.append(sums(answer(decoder, batch), batch, data.inside(index), data.target_mean, constant, transform))
    return torch.cat(exchange(torch.cat(rows)))


@torch.no_grad()
def answer(decoder: ProbeDecoder, batch: Batch) -> Tensor:
    """What the decoder answers for every target of a batch, float32 [targets, pixels] on CPU."""
    with torch.autocast(batch.image_tokens.device.type, enabled=False):
        return decoder(batch.image_tokens, batch.text_tokens, batch.sequence, batch.injections).cpu()


def sums(rebuilt: Tensor, batch: Batch, inside: Tensor, mean: Tensor, constant: Tensor, transform: Transform) -> Tensor:
    """What one batch adds to the table of sums, float64 [batch, COLUMNS].

    They are: target tokens; sums over them of the mean squared error inside a token, of the same on de-normalised
    clipped pixels, of the constant's, and of the deviation from `mean`; then for pixels inside and outside text: their
    number, the sum of their error (mean over channels), and each channel's sum and sum of squares.

    The decoder's answer is float32 [targets, pixels], `inside` bool [targets, cell x cell] (the pixel lies in a text
    box of its image), the mean held-out target and the constant prediction are float32 [pixels].
    """
    pixels, counts = batch.pixels.cpu(), batch.counts.cpu()
    error = (rebuilt - pixels).double().square()
    shown = (unit(rebuilt, transform) - unit(pixels, transform)).double().square()
    columns = [torch.ones(len(pixels), 1, dtype=torch.float64)]
    columns += [e.mean(-1, keepdim=True) for e in (error, shown)]
    columns += [(pixels - other).double().square().mean(-1, keepdim=True) for other in (constant, mean)]
    by_pixel = error.unflatten(-1, (-1, CHANNELS)).mean(-1)
    values = pixels.double().unflatten(-1, (-1, CHANNELS))
    for where in (inside.cpu(), ~inside.cpu()):
        kept = where.double()
        columns += [kept.sum(-1, keepdim=True), (by_pixel * kept).sum(-1, keepdim=True)]
        columns += [(v * kept[..., None]).sum(-2) for v in (values, values.square())]
    table = torch.cat(columns, dim=-1)
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    return torch.zeros(len(counts), table.shape[1], dtype=torch.float64).index_add(0, owner, table)


def _documents(labels: Sequence[tuple[str, str, str]], table: Tensor) -> list[dict[str, Any]]:
    """Every sample's figures, as `RProbeResult.documents` describes them."""
    found = []
    for (name, document, text), row in zip(labels, table.tolist(), strict=True):
        tokens = row[TOKENS]
        found.append(
            {
                "id": name,
                "document": document,
                "text": text,
                "tokens": int(tokens),
                "mse": row[ERROR] / tokens,
                "psnr": -10 * math.log10(max(row[SHOWN] / tokens, SMALLEST_MSE)),
                "variance": row[VARIANCE] / tokens,
                "inside_mse": row[INSIDE + 1] / row[INSIDE] if row[INSIDE] else None,
                "inside_pixels": int(row[INSIDE]),
                "outside_mse": row[OUTSIDE + 1] / row[OUTSIDE] if row[OUTSIDE] else None,
                "outside_pixels": int(row[OUTSIDE]),
            }
        )
    return found


def _part(table: Tensor, first: int) -> Part | None:
    """Error of the pixels whose sums start at that column; None: there are none."""
    total = table.sum(0)
    pixels = float(total[first])
    if not pixels:
        return None
    mean, square = (total[first + 2 + i * CHANNELS :][:CHANNELS] / pixels for i in (0, 1))
    mse, variance = float(total[first + 1]) / pixels, float((square - mean.square()).clamp(min=0).mean())
    share = pixels / float(total[INSIDE] + total[OUTSIDE])
    return Part(mse=mse, variance=variance, fvu=mse / variance if variance else None, share=share)


def check_shown(data: FrozenData, show: Sequence[str]) -> list[int]:
    """Places of the samples with these ids, in their order; an InputError where there is no such held-out sample."""
    places = {name: i for i, (name, _, _) in enumerate(data.labels)}
    unknown = [name for name in show if name not in places]
    if unknown:
        known = list(places)
        more = f", ... ({len(known)} in all)" if len(known) > 3 else ""
        raise InputError(f"no held-out sample {', '.join(unknown)} to show; there are {', '.join(known[:3])}{more}")
    return [places[name] for name in show]


def spread_over_ranks(mse: Sequence[float], count: int) -> list[int]:
    """Samples to show, best first: best, worst and median, then those that halve the gaps in rank; one: the median."""
    order = sorted(range(len(mse)), key=mse.__getitem__)
    if count == 1:
        return order[(len(order) - 1) // 2 :][:1]
    ranks: dict[int, None] = {}
    parts = 1
    while len(ranks) < min(count, len(order)):
        # 0, 1; then 1/2; then 1/4, 3/4; ...
        for i in range(parts + 1):
            if len(ranks) < count:
                ranks.setdefault(round(i / parts * (len(order) - 1)))
        parts *= 2
    return [order[rank] for rank in sorted(ranks)]


def example(
    decoder: ProbeDecoder, data: FrozenData, index: int, transform: Transform, mse: float, psnr: float
) -> Reconstruction:
    """One held-out sample for a figure."""
    sample = data.samples[index]
    batch = data.batch(torch.tensor([index]), next(decoder.parameters()).device)
    plane = Plane.of(transform, sample.open_image(), batch.pixels.shape[-1])
    boxes = tuple(plane.box(box, sample.id) for box in sample.boxes)
    cells = data.cells_of(index)
    target = torch.zeros(plane.grid.tokens, dtype=torch.bool)
    target[cells] = True
    patches = patchify(plane.pixels[None], plane.grid)
    painted = patches.clone()
    painted[0, cells] = answer(decoder, batch)
    where = unpatchify(target[None, :, None].expand(1, -1, plane.grid.pixels), plane.grid)[0, 0]
    return Reconstruction(
        id=sample.id,
        text=sample.text,
        boxes=boxes,
        original=picture(patches, plane.grid, transform),
        rebuilt=picture(painted, plane.grid, transform),
        target=where.numpy(),
        mse=mse,
        psnr=psnr,
        stretch=plane.stretch,
    )
