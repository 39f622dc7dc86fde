"""Error map: a whole held-out page rebuilt piece by piece, so that one sees where its tokens lose what is on it.

Each text region is the target once, with its own text; the cells that no region touches follow in blocks of about a
region's size, with a placeholder for text: the probe was not trained on these, so they are no figures to quote.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llava_patch.core import parallel
from llava_patch.core.errors import InputError
from llava_patch.measurements.rprobe.evaluate import answer, spread_over_ranks
from llava_patch.measurements.rprobe.result import ErrorMap
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.store.freeze import Encoder, FrozenData, freeze_samples
from llava_patch.probe.decoder import ProbeDecoder
from llava_patch.probe.sample import Box, Sample
from llava_patch.probe.sequence import patchify
from llava_patch.probe.transform import Plane, WindowTransform, picture

PLACEHOLDER = "."


def error_maps(
    decoder: ProbeDecoder, encoder: Encoder, data: FrozenData, documents: Sequence[Mapping[str, Any]], settings: RProbe
) -> tuple[list[ErrorMap], list[str]]:
    """Maps of `settings.maps` held-out pages, the best and the worst first, and a sentence for each without; on rank 0.

    A map is a look at a page beside a measurement that is finished: what goes wrong in one is said, not raised. The
    tower runs once a page (masked: once a piece), and pages are opened again; `documents` are their figures.
    """
    if not settings.maps or parallel.rank() != 0:
        return [], []
    # Samples of one page carry one document name; a document of several pages is shown by its first.
    pages: dict[str, list[int]] = {}
    for i, (_, document, _) in enumerate(data.labels):
        pages.setdefault(document, []).append(i)
    errors = [
        sum(documents[i]["mse"] * documents[i]["tokens"] for i in members)
        / sum(documents[i]["tokens"] for i in members)
        for members in pages.values()
    ]
    maps, notes = [], []
    for n in spread_over_ranks(errors, settings.maps):
        name, members = list(pages.items())[n]
        try:
            maps.append(_map(decoder, encoder, data, members, settings))
        except Exception as error:
            notes.append(f"R-Probe: there is no error map of {name}: {type(error).__name__}: {error}")
    return maps, notes


def pieces(samples: Sequence[Sample], plane: Plane, seen: Tensor) -> tuple[list[Sample], list[Sample]]:
    """Cut the page of `samples` into (regions whose text is known, all others): together they touch every token's cell.

    `seen`, bool [cells], are the cells that have a token. A host drops some (the first patch, padding that anyres
    cuts off together with the last pixels of the page): nothing can be rebuilt there.
    """
    image = samples[0].open_image()
    texts = dict(zip(samples[0].all_boxes, samples[0].all_texts, strict=False))
    named: dict[tuple[Box, ...], str] = {sample.boxes: sample.text for sample in samples}
    covered = {box for sample in samples for box in sample.boxes}
    silent: list[tuple[Box, ...]] = []
    for box in dict.fromkeys(box for sample in samples for box in sample.all_boxes):
        if box not in covered and (_cells(plane, box) & seen).any():
            if texts.get(box):
                named[(box,)] = texts[box]
            else:
                silent.append((box,))
    touched = [plane.cells([plane.box(box, samples[0].id) for box in boxes]) for boxes in (*named, *silent)]
    size = max(1, round(statistics.median(int(cells.sum()) for cells in touched)))
    left = (seen & ~torch.stack(touched).any(0)).nonzero().flatten().tolist()
    rest = [part for cell in left if (part := plane.original(cell)) is not None]
    silent += [tuple(rest[start : start + size]) for start in range(0, len(rest), size)]

    def sample(boxes: tuple[Box, ...], text: str, number: int) -> Sample:
        first = samples[0]
        return Sample(image, text, boxes, id=f"{first.id}, piece {number}", document=first.document, page=first.page)

    known = [sample(boxes, text, i) for i, (boxes, text) in enumerate(named.items())]
    return known, [sample(boxes, PLACEHOLDER, len(known) + i) for i, boxes in enumerate(silent)]


def _cells(plane: Plane, box: Box) -> Tensor:
    """Cells under a box that is no sample, bool [cells]; none where a crop has cut it away."""
    try:
        return plane.cells([plane.box(box, "")])
    except InputError:
        return plane.cells([])


@torch.no_grad()
def _map(
    decoder: ProbeDecoder, encoder: Encoder, data: FrozenData, members: Sequence[int], settings: RProbe
) -> ErrorMap:
    """The map of the page on which the first of a document's samples (`members`) lies; with windows, of its window."""
    samples, name = [data.samples[i] for i in members], data.labels[members[0]][1]
    transform, first = encoder.transform, samples[0].image
    samples = [s for s in samples if s.image is first or (not hasattr(first, "size") and s.image == first)]
    if isinstance(transform, WindowTransform):
        window = transform.window_of(samples[0])
        samples = [seen for seen in map(window.cut, samples) if seen.boxes]
        transform = transform.still  # each piece is shown in this window, not in one of its own
        encoder = encoder._replace(transform=transform)
    plane = Plane.of(transform, samples[0].open_image(), data.grid.pixels)
    known, rest = pieces(samples, plane, data.seen_of(members[0]))
    patches = patchify(plane.pixels[None], plane.grid)
    painted = torch.zeros_like(patches)
    error = torch.full((plane.grid.tokens,), float("nan"))
    spoken = torch.zeros(plane.grid.tokens, dtype=torch.bool)
    # A piece that cannot be used (a listed text without tokens) stays grey.
    once = dataclasses.replace(settings, store=False, broken="skip")
    # Without an unknown token the placeholder stands for itself.
    has_unknown = getattr(encoder.tokenizer, "unk_token_id", None) is not None
    silent = dataclasses.replace(once, text=False) if has_unknown else once
    for group, setting, with_text in ((known, once, settings.text), (rest, silent, False)):
        if not group:
            continue
        frozen = freeze_samples(encoder, group, setting, label="pieces of a page", warn=False)
        for index in torch.arange(len(frozen)).split(settings.batch_size):
            batch = frozen.batch(index, next(decoder.parameters()).device)
            answers, truths = (v.cpu().split(batch.counts.tolist()) for v in (answer(decoder, batch), batch.pixels))
            for i, rebuilt, true in zip(index.tolist(), answers, truths, strict=True):
                cells = frozen.cells_of(i)
                # A cell that several regions touch is shown as the first of them rebuilt it.
                fresh = error[cells].isnan()
                painted[0, cells[fresh]] = rebuilt[fresh]
                error[cells[fresh]] = (rebuilt - true)[fresh].square().mean(-1)
                spoken[cells[fresh]] = with_text
    every = dict.fromkeys(box for sample in samples for box in (*sample.boxes, *sample.all_boxes))
    boxes = tuple(plane.box(box, name) for box in every if _cells(plane, box).any())
    text, done = plane.cells(boxes), ~error.isnan()
    other = ~text & done
    shape = plane.grid.rows, plane.grid.columns
    return ErrorMap(
        id=name,
        original=picture(patches, plane.grid, transform),
        rebuilt=picture(painted, plane.grid, transform),
        error=error.reshape(shape).numpy(),
        text=text.reshape(shape).numpy(),
        spoken=spoken.reshape(shape).numpy(),
        boxes=boxes,
        cell=plane.grid.cell,
        stretch=plane.stretch,
        inside_mse=float(error[text & done].double().mean()),
        outside_mse=float(error[other].double().mean()) if other.any() else None,
    )
