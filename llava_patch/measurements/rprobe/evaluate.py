"""R-Probe, step 8 of 8: held-out figures, summed batch by batch: memory does not grow with the pixels of the data."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava_patch.core.errors import InputError
from llava_patch.core.parallel import gather_rows, share
from llava_patch.measurements.rprobe.bootstrap import interval
from llava_patch.measurements.rprobe.result import Part, Reconstruction
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.store.freeze import Batch, FrozenData
from llava_patch.probe.decoder import ProbeDecoder
from llava_patch.probe.sequence import CHANNELS, patchify, unpatchify
from llava_patch.probe.transform import Plane, Transform, picture, unit

SMALLEST_MSE = 1e-10  # a perfect sample counts as 100 dB


@torch.no_grad()
def evaluate(
    decoder: ProbeDecoder,
    data: FrozenData,
    constant: Tensor,
    transform: Transform,
    settings: RProbe,
    show: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure a trained probe on frozen held-out samples: those fields of `RProbeResult` that need no training curve.

    The constant prediction is float32 [pixels], the mean training target. Samples whose ids `show` has become examples;
    none: `settings.examples` of them, spread over the errors. Every process measures its share of the samples, and gets
    the figures of all.
    """
    shown = check_shown(data, show)
    device = next(decoder.parameters()).device
    parts = []
    for index in torch.tensor(share(len(data)), dtype=torch.int64).split(settings.batch_size):
        if len(index):
            batch = data.batch(index, device)
            rebuilt, inside = answer(decoder, batch), data.inside(index)
            parts.append(_sums(rebuilt, batch, inside, data.target_mean, constant, transform))
    parts = gather_rows(parts)
    sums = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    documents = _documents(data.labels, sums)
    tokens, variance = float(sums["tokens"].sum()), data.target_variance
    mse, constant_mse = (float(sums[name].sum()) / tokens for name in ("error", "constant"))
    shown = shown or spread_over_ranks([document["mse"] for document in documents], settings.examples)
    drawn = settings.resamples, settings.seed
    return {
        "mse": mse,
        "fvu": mse / variance,
        "psnr": sum(document["psnr"] for document in documents) / len(documents),
        "constant_mse": constant_mse,
        "constant_fvu": constant_mse / variance,
        "target_variance": variance,
        "mse_interval": interval(documents, *drawn),
        "fvu_interval": interval(documents, *drawn, relative_to="variance"),
        "inside": _part(sums, "inside"),
        "outside": _part(sums, "outside"),
        "documents": documents,
        "examples": [example(decoder, data, i, transform, documents[i]) for i in shown],
    }


@torch.no_grad()
def answer(decoder: ProbeDecoder, batch: Batch) -> Tensor:
    """What the decoder answers for every target of a batch, float32 [targets, pixels] on CPU."""
    with torch.autocast(batch.image_tokens.device.type, enabled=False):
        return decoder(batch.image_tokens, batch.text_tokens, batch.sequence, batch.injections).cpu()


def _sums(
    rebuilt: Tensor, batch: Batch, inside: Tensor, mean: Tensor, constant: Tensor, transform: Transform
) -> dict[str, Tensor]:
    """Sums over the targets of each sample of a batch, float64 [batch]: all figures are made of these.

    They are: target tokens; the mean squared error inside a token, the same on de-normalised clipped pixels, the
    constant's (float32 [pixels]), and the deviation from `mean`, the mean held-out target; then of pixels inside and
    outside text (`inside` is bool [targets, cell x cell]): their number, their error (mean over channels), and each
    channel's values and squares, [batch, 3].
    """
    pixels, counts = batch.pixels.cpu(), batch.counts.cpu()
    error = (rebuilt - pixels).double().square()
    columns = {
        "tokens": torch.ones(len(pixels), dtype=torch.float64),
        "error": error.mean(-1),
        "shown": (unit(rebuilt, transform) - unit(pixels, transform)).double().square().mean(-1),
        "constant": (pixels - constant).double().square().mean(-1),
        "variance": (pixels - mean).double().square().mean(-1),
    }
    values = pixels.double().unflatten(-1, (-1, CHANNELS))
    for where, kept in (("inside", inside.cpu().double()), ("outside", (~inside.cpu()).double())):
        columns |= {
            f"{where}_pixels": kept.sum(-1),
            f"{where}_error": (error.unflatten(-1, (-1, CHANNELS)).mean(-1) * kept).sum(-1),
            f"{where}_values": (values * kept[..., None]).sum(-2),
            f"{where}_squares": (values.square() * kept[..., None]).sum(-2),
        }
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    none = {name: torch.zeros(len(counts), *column.shape[1:]).double() for name, column in columns.items()}
    return {name: none[name].index_add(0, owner, column) for name, column in columns.items()}


def _documents(labels: Sequence[tuple[str, str, str]], sums: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Every sample's figures, as `RProbeResult.documents` describes them."""
    found = []
    for i, (name, document, text) in enumerate(labels):
        row = {key: float(column[i]) for key, column in sums.items() if column.ndim == 1}
        tokens = row["tokens"]
        one = {
            "id": name,
            "document": document,
            "text": text,
            "tokens": int(tokens),
            "mse": row["error"] / tokens,
            "psnr": -10 * math.log10(max(row["shown"] / tokens, SMALLEST_MSE)),
            "variance": row["variance"] / tokens,
        }
        for where in ("inside", "outside"):
            pixels = row[f"{where}_pixels"]
            one[f"{where}_mse"] = row[f"{where}_error"] / pixels if pixels else None
            one[f"{where}_pixels"] = int(pixels)
        found.append(one)
    return found


def _part(sums: dict[str, Tensor], where: str) -> Part | None:
    """Error of the pixels inside or outside text; None: there are none."""
    pixels = float(sums[f"{where}_pixels"].sum())
    if not pixels:
        return None
    mse = float(sums[f"{where}_error"].sum()) / pixels
    mean, square = (sums[f"{where}_{what}"].sum(0) / pixels for what in ("values", "squares"))
    variance = float((square - mean.square()).clamp(min=0).mean())
    share = pixels / float(sums["inside_pixels"].sum() + sums["outside_pixels"].sum())
    return Part(mse=mse, variance=variance, fvu=mse / variance if variance else None, share=share)


def check_shown(data: FrozenData, show: Sequence[str]) -> list[int]:
    """Places of the samples with these ids, in their order; an InputError where there is no such held-out sample."""
    places = {name: i for i, (name, _, _) in enumerate(data.labels)}
    if unknown := [name for name in show if name not in places]:
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
    decoder: ProbeDecoder, data: FrozenData, index: int, transform: Transform, figures: dict[str, Any]
) -> Reconstruction:
    """One held-out sample, with its figures, for a picture."""
    sample = transform.focus(data.samples[index])
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
        mse=figures["mse"],
        psnr=figures["psnr"],
        stretch=plane.stretch,
    )
