"""A shard: the frozen tokens of a fixed number of images, and the pixels under the targets of their samples.

On disk it is one safetensors file: it appears whole by a single rename, carries no pickle, keeps bfloat16 as it is,
its header is checked against its length when it is opened, and its tensors are memory-mapped, so that a page of the
file is read when a batch asks for it and not before.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llava_patch.core.errors import InputError
from llava_patch.core.files import atomic
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.probe.sample import Box, Sample
from llava_patch.probe.sequence import TokenGrid, patchify
from llava_patch.probe.transform import Transform, black_out
from llava_patch.probe.view import View, encode_views, target_tokens

FORMAT = 1
LARGE = ("tokens", "pixels", "injections")  # what is not read when a shard is opened
TABLES = (
    "positions", "cells", "image_counts", "grids", "text_start", "sample_image", "target", "target_counts", "boxes",
    "box_counts",
)  # fmt: skip


class DamagedShard(ValueError):
    """A file that cannot be used; the message says why."""


@dataclass(frozen=True)
class Record:
    """What names a sample: its number in the data, and `id`, `document` and `text` of `Sample`."""

    index: int
    id: str
    document: str
    text: str


@dataclass(frozen=True, eq=False)
class Shard:
    """Images with their samples, in memory or mapped.

    Attributes:
        tensors: `tokens` [tokens of all images, hidden] in the model's dtype; `positions` float32 [tokens, 2] and
            `cells` int32 [tokens] (see `View`); with DeepStack `injections` [tokens, layers, hidden];
            `image_counts` int64 [images], tokens of each; `grids` int64 [images, 3], (rows, columns, cell);
            `text_start` int64 [images];
            `sample_image` int64 [samples]; `target` int32 [targets of all samples], numbers of tokens inside their
            image, and under them `pixels` float32 [targets, pixels]; `target_counts` int64 [samples]; `boxes` float64
            [boxes, 4], all text regions on the processed image; `box_counts` int64 [samples].
        records: of its samples, in that order.
        skipped: (number, message) of the samples that could not be used.
    """

    tensors: dict[str, Tensor]
    records: list[Record]
    skipped: list[tuple[int, str]]
    _starts: dict[str, list[int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        starts = {
            name: [0, *accumulate(self.tensors[name].tolist())]
            for name in ("image_counts", "target_counts", "box_counts")
        }
        object.__setattr__(self, "_starts", starts)
        expected = {"tokens": "image_counts", "positions": "image_counts", "cells": "image_counts",
                    "target": "target_counts", "pixels": "target_counts", "boxes": "box_counts"}  # fmt: skip
        if "injections" in self.tensors:
            expected["injections"] = "image_counts"
        for name, counts in expected.items():
            if len(self.tensors[name]) != starts[counts][-1]:
                raise DamagedShard(f"{len(self.tensors[name])} rows of {name}, {starts[counts][-1]} counted")
        if not len(self.records) == len(self.tensors["sample_image"]) == len(self.tensors["target_counts"]):
            raise DamagedShard("its samples are not all named")

    def _of_image(self, name: str, row: int) -> Tensor:
        image = int(self.tensors["sample_image"][row])
        starts = self._starts["image_counts"]
        return self.tensors[name][starts[image] : starts[image + 1]]

    def _of_sample(self, name: str, counts: str, row: int) -> Tensor:
        return self.tensors[name][self._starts[counts][row] : self._starts[counts][row + 1]]

    def tokens(self, row: int) -> Tensor:
        """[tokens, hidden] of the image of sample `row`."""
        return self._of_image("tokens", row)

    def positions(self, row: int) -> Tensor:
        """float32 [tokens, 2]."""
        return self._of_image("positions", row)

    def cells(self, row: int) -> Tensor:
        """int32 [tokens]."""
        return self._of_image("cells", row)

    def injections(self, row: int) -> Tensor:
        """[tokens, layers, hidden], with DeepStack only."""
        return self._of_image("injections", row)

    def text_start(self, row: int) -> int:
        """Where the text of sample `row` starts: the first place past its image's tokens on both axes."""
        return int(self.tensors["text_start"][int(self.tensors["sample_image"][row])])

    def grid(self, row: int) -> TokenGrid:
        """How cells tile the processed image of sample `row`."""
        return TokenGrid(*self.tensors["grids"][int(self.tensors["sample_image"][row])].tolist())

    def target(self, row: int) -> Tensor:
        """int32 [targets]: which of the image's tokens are targets."""
        return self._of_sample("target", "target_counts", row)

    def pixels(self, row: int) -> Tensor:
        """float32 [targets, pixels]."""
        return self._of_sample("pixels", "target_counts", row)

    def boxes(self, row: int) -> Tensor:
        """float64 [boxes, 4]: all text regions of the image of sample `row`, on the processed image."""
        return self._of_sample("boxes", "box_counts", row)

    @property
    def bytes(self) -> int:
        """Size of its tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


def write_shard(path: Path, shard: Shard, key: str, number: int) -> None:
    """Write a shard so that it is there whole or not at all, also after a power failure."""
    metadata = {
        "format": str(FORMAT),
        "key": key,
        "number": str(number),
        "records": json.dumps([[r.index, r.id, r.document, r.text] for r in shard.records]),
        "skipped": json.dumps(shard.skipped),
    }
    metadata["digest"] = _digest(shard.tensors, metadata)
    with atomic(path) as temporary:
        save_file({name: t.contiguous() for name, t in shard.tensors.items()}, temporary, metadata=metadata)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())


def open_shard(path: Path, key: str, number: int) -> Shard | None:
    """Map a shard; None when there is no such file.

    Raises:
        DamagedShard: it is cut short, of another format or store, or its tables are not those that were written.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            found = metadata.get("format"), metadata.get("key"), metadata.get("number")
            if found != (str(FORMAT), key, str(number)):
                raise DamagedShard("it belongs to another format or store")
            if not {"tokens", "pixels", *TABLES} <= set(stream.keys()):
                raise DamagedShard("a tensor is missing")
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
        digest = metadata.pop("digest", "")
        if digest != _digest(tensors, metadata):
            raise DamagedShard("its tables are damaged")
        records = [Record(*values) for values in json.loads(metadata["records"])]
        return Shard(tensors, records, [(i, message) for i, message in json.loads(metadata["skipped"])])
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise DamagedShard(f"{type(error).__name__}: {error}") from error


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Digest of all that is small: tables, names, and the shapes of what is large."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if name not in LARGE and tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for name in sorted(metadata):
        digest.update(f"{name} {metadata[name]}".encode())
    return digest.hexdigest()


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
    views = encode_views(anatomy, transform, seen) if seen else []
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
