"""One shard's images through the vision tower, and the pixels under the targets of their samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from llava_patch.core.errors import InputError
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.store.shard import Record, Shard
from llava_patch.probe.sample import Box, Sample
from llava_patch.probe.sequence import patchify
from llava_patch.probe.transform import Transform, black_out
from llava_patch.probe.view import View, look, target_tokens


def encode(
    anatomy: Anatomy, transform: Transform, samples: Sequence[Sample], images: Sequence[list[int]], settings: RProbe
) -> Shard:
    """Encode some images in one go.

    Args:
        anatomy: the model under test, in evaluation mode.
        transform: from `make_transform`.
        samples: all samples.
        images: the samples (their numbers) of each image.
        settings: `masked` and `broken` are read; masked samples have each an image of their own.

    Raises:
        InputError: a sample that cannot be used, with `broken="stop"`; it is named.
        HostError: the tokens of this model have no pixels each, or are not finite.
    """
    pictures: list[Image.Image] = []
    members: list[list[tuple[int, Sample, tuple[Box, ...]]]] = []
    skipped: list[tuple[int, str]] = []
    for numbers in images:
        picture, usable = None, []
        for number in numbers:
            try:
                sample = samples[number]
                picture = _open(sample) if picture is None else picture
                boxes = tuple(transform.box(box, picture.size, sample.place) for box in sample.boxes)
                if not boxes:
                    raise InputError(f"{sample.place}: the sample has no box")
                usable.append((number, sample, boxes))
            except InputError as error:
                if settings.broken == "stop":
                    raise
                skipped.append((number, str(error)))
        if picture is not None and usable:
            pictures.append(picture)
            members.append(usable)
    seen = pictures
    if settings.masked:
        seen = [black_out(p, of[0][1].boxes) for p, of in zip(pictures, members, strict=True)]
    views = look(anatomy, transform, seen) if seen else []
    return _shard(transform, pictures, members, views, settings, skipped)


def _open(sample: Sample) -> Image.Image:
    try:
        return sample.open_image()
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # a picture in memory whose file PIL has not read to its end
        raise InputError(f"{sample.place}: its image cannot be read: {error}") from error


def _shard(
    transform: Transform,
    pictures: list[Image.Image],
    members: list[list[tuple[int, Sample, tuple[Box, ...]]]],
    views: list[View],
    settings: RProbe,
    skipped: list[tuple[int, str]],
) -> Shard:
    records: list[Record] = []
    owner, targets, pixels, regions = [], [], [], []
    for image, (picture, of, view) in enumerate(zip(pictures, members, views, strict=True)):
        patches = patchify(transform.plane(picture)[None], view.grid)[0]
        for number, sample, boxes in of:
            try:
                target = target_tokens(view, boxes, sample.place).nonzero()[:, 0]
            except InputError as error:
                if settings.broken == "stop":
                    raise
                skipped.append((number, str(error)))
                continue
            records.append(Record(number, sample.id, sample.document or sample.id, sample.text))
            owner.append(image)
            targets.append(target.to(torch.int32))
            pixels.append(patches[view.cells[target]])
            regions.append(_regions(transform, picture, sample, boxes))
    tensors = {
        "tokens": _cat([v.tokens for v in views], (0, 0), torch.float32),
        "positions": _cat([v.positions for v in views], (0, 2), torch.float32),
        "cells": _cat([v.cells.to(torch.int32) for v in views], (0,), torch.int32),
        "image_counts": torch.tensor([len(v.tokens) for v in views], dtype=torch.int64),
        "grids": torch.tensor([(v.grid.rows, v.grid.columns, v.grid.cell) for v in views]).reshape(-1, 3).long(),
        "text_start": torch.tensor([v.text_start for v in views], dtype=torch.int64),
        "sample_image": torch.tensor(owner, dtype=torch.int64),
        "target": _cat(targets, (0,), torch.int32),
        "target_counts": torch.tensor([len(t) for t in targets], dtype=torch.int64),
        "pixels": _cat(pixels, (0, 0), torch.float32),
        "boxes": _cat(regions, (0, 4), torch.float64),
        "box_counts": torch.tensor([len(r) for r in regions], dtype=torch.int64),
    }
    added = [v.injections.transpose(0, 1) for v in views if v.injections is not None]
    if added:
        tensors["injections"] = torch.cat(added)
    return Shard(tensors, records, skipped)


def _regions(transform: Transform, picture: Image.Image, sample: Sample, boxes: tuple[Box, ...]) -> Tensor:
    """All text regions on the processed image, float64 [boxes, 4]."""
    moved = list(boxes)
    for box in sample.all_boxes:
        try:
            moved.append(transform.box(box, picture.size, sample.place))
        except InputError:
            continue  # not a target, and nothing of it is on the processed image: no pixel lies in it
    return torch.tensor(moved, dtype=torch.float64)


def _cat(parts: list[Tensor], empty: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(empty, dtype=dtype)
