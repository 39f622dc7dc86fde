"""R-Probe, step 5 of 8: frozen tokens and the pixels under their targets are gathered (`encode`) and kept in shards.

On disk a shard is one safetensors file: it appears whole by a single rename, keeps bfloat16 as it is, its header is
checked against its length when it is opened, and its tensors are memory-mapped: read when a batch asks for them.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llava_patch.core.errors import InputError
from llava_patch.core.files import atomic
from llava_patch.core.stored import UNREADABLE
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.probe.sample import Sample, open_rgb
from llava_patch.probe.sequence import TokenGrid, patchify
from llava_patch.probe.transform import Transform, black_out
from llava_patch.probe.view import View, encode_views, target_tokens, with_page

FORMAT = 1
SKIP = 'RProbe.broken = "skip" leaves out what cannot be used'
LARGE = ("tokens", "pixels", "injections")  # what is not read when a shard is opened
COUNTED_BY = {
    "tokens": "image_counts", "positions": "image_counts", "cells": "image_counts", "injections": "image_counts",
    "target": "target_counts", "pixels": "target_counts", "boxes": "box_counts",
}  # fmt: skip
NEEDED = {*COUNTED_BY, *COUNTED_BY.values(), "grids", "text_start", "sample_image"} - {"injections"}


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
    """Images with their samples, in memory or mapped; `skipped` are (number, message) of those that could not be used.

    The tensors are `tokens` [tokens of all images, hidden] in the model's dtype, `positions` float32 [tokens, 2] and
    `cells` int32 [tokens] (see `View`); with DeepStack `injections` [tokens, layers, hidden]; `image_counts` int64
    [images], tokens of each; `grids` int64 [images, 3], (rows, columns, cell); `text_start` int64 [images]. Of the
    samples, in the order of `records`: `sample_image` int64 [samples]; `target` int32 [targets of all samples], numbers
    of tokens inside their image, and under them `pixels` float32 [targets, pixels]; `target_counts` int64 [samples];
    `boxes` float64 [boxes, 4], all text regions on the processed image; `box_counts` int64 [samples]; with windows
    `cut` uint8 [samples], 1 where only the beginning of the region lies inside.
    """

    tensors: dict[str, Tensor]
    records: list[Record]
    skipped: list[tuple[int, str]]
    _starts: dict[str, list[int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        starts = {name: [0, *accumulate(self.tensors[name].tolist())] for name in set(COUNTED_BY.values())}
        object.__setattr__(self, "_starts", starts)
        for name, counts in COUNTED_BY.items():
            if name in self.tensors and len(self.tensors[name]) != starts[counts][-1]:
                raise DamagedShard(f"{len(self.tensors[name])} rows of {name}, {starts[counts][-1]} counted")
        if not len(self.records) == len(self.tensors["sample_image"]) == len(self.tensors["target_counts"]):
            raise DamagedShard("its samples are not all named")

    def rows(self, name: str, sample: int) -> Tensor:
        """The part of a tensor of `COUNTED_BY` that belongs to a sample, or to its image; shapes as in `tensors`."""
        counts = COUNTED_BY[name]
        place = int(self.tensors["sample_image"][sample]) if counts == "image_counts" else sample
        return self.tensors[name][self._starts[counts][place] : self._starts[counts][place + 1]]

    def text_start(self, sample: int) -> int:
        """Where the text of a sample starts: the first place past its image's tokens on both axes."""
        return int(self.tensors["text_start"][int(self.tensors["sample_image"][sample])])

    def grid(self, sample: int) -> TokenGrid:
        """How cells tile the processed image of a sample."""
        return TokenGrid(*self.tensors["grids"][int(self.tensors["sample_image"][sample])].tolist())

    def is_cut(self, sample: int) -> bool:
        """Whether only the beginning of a sample's region lies in its window."""
        return "cut" in self.tensors and bool(self.tensors["cut"][sample])

    @property
    def bytes(self) -> int:
        """Size of its tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


def encode(
    anatomy: Anatomy, transform: Transform, samples: Sequence[Sample], images: Sequence[list[int]], settings: RProbe
) -> Shard:
    """Send some images through the vision tower in one go, and cut the pixels under the targets of their samples.

    `images` has the samples (their numbers) of each image, or of each window; masked samples have each an image of
    their own. With `broken="stop"` a sample that cannot be used is an InputError that names it.
    """
    records: list[Record] = []
    skipped: list[tuple[int, str]] = []

    def skip(number: int, error: InputError) -> None:
        if settings.broken == "stop":
            raise InputError(f"{error}; {SKIP}") from error
        skipped.append((number, str(error)))

    usable = []
    for numbers in images:
        picture, members = None, []
        for number in numbers:
            try:
                sample = samples[number]
                if (window := transform.window_of(sample)) is not None:
                    sample = window.cut(sample)
                picture = sample.open_image() if picture is None else picture
                boxes = [transform.box(box, picture.size, sample.place) for box in sample.boxes]
                if not boxes:
                    raise InputError(f"{sample.place}: the sample has no box")
                members.append((number, sample, boxes, window))
            except InputError as error:
                skip(number, error)
        if picture is not None and members:
            usable.append((picture, members))
    seen = [black_out(page, of[0][1].boxes) if settings.masked else page for page, of in usable]
    views = encode_views(anatomy, transform, seen) if seen else []
    if settings.page:
        views = _with_pages(anatomy, transform, [of[0][1] for _, of in usable], views, settings.masked)
    owner, targets, pixels, regions, cut = [], [], [], [], []
    for image, ((page, of), view) in enumerate(zip(usable, views, strict=True)):
        patches = patchify(transform.plane(page)[None], view.grid)[0]
        for number, sample, boxes, window in of:
            try:
                target = target_tokens(view, boxes, sample.place).nonzero()[:, 0]
            except InputError as error:
                skip(number, error)
                continue
            for box in sample.all_boxes:
                # A box that is no target and is wholly cut away: no pixel lies in it.
                with contextlib.suppress(InputError):
                    boxes.append(transform.box(box, page.size, sample.place))
            records.append(Record(number, sample.id, sample.document or sample.id, sample.text))
            owner.append(image)
            targets.append(target.to(torch.int32))
            pixels.append(patches[view.cells[target]])  # of the unmasked image, whatever the tower saw
            regions.append(torch.tensor(boxes, dtype=torch.float64))
            cut += [] if window is None else [not window.whole]
    tensors = _tensors(views, owner, targets, pixels, regions)
    if len(cut) == len(records) > 0:
        tensors["cut"] = torch.tensor(cut, dtype=torch.uint8)
    return Shard(tensors, records, skipped)


def _with_pages(
    anatomy: Anatomy, transform: Transform, samples: Sequence[Sample], views: Sequence[View], masked: bool
) -> list[View]:
    """The views of windows, each behind its page's tokens; of masked samples the page is black there as well."""
    stretched = Transform(transform.processor, "resize", transform.height, transform.width, transform.cell)
    pages: dict[Any, View] = {}
    found = []
    for sample, view in zip(samples, views, strict=True):
        assert sample.page is not None  # it was cut to a window
        source, window = sample.page
        page = open_rgb(source, sample.place)
        name = sample.id if masked else id(source) if isinstance(source, Image.Image) else source
        if name not in pages:
            left, top = window[:2]
            boxes = [(x0 + left, y0 + top, x1 + left, y1 + top) for x0, y0, x1, y1 in sample.boxes]
            (pages[name],) = encode_views(anatomy, stretched, [black_out(page, boxes) if masked else page])
        found.append(with_page(view, pages[name], window, page.size))
    return found


def _tensors(
    views: list[View], owner: list[int], targets: list[Tensor], pixels: list[Tensor], regions: list[Tensor]
) -> dict[str, Tensor]:
    def joined(parts: list[Tensor], *empty: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.cat(parts) if parts else torch.empty(empty, dtype=dtype)

    def counted(parts: Sequence[Tensor]) -> Tensor:
        return torch.tensor(list(map(len, parts)), dtype=torch.int64)

    tensors = {
        "tokens": joined([v.tokens for v in views], 0, 0),
        "positions": joined([v.positions for v in views], 0, 2),
        "cells": joined([v.cells.to(torch.int32) for v in views], 0, dtype=torch.int32),
        "image_counts": counted([v.tokens for v in views]),
        "grids": torch.tensor([(v.grid.rows, v.grid.columns, v.grid.cell) for v in views]).reshape(-1, 3).long(),
        "text_start": torch.tensor([v.text_start for v in views], dtype=torch.int64),
        "sample_image": torch.tensor(owner, dtype=torch.int64),
        "target": joined(targets, 0, dtype=torch.int32),
        "target_counts": counted(targets),
        "pixels": joined(pixels, 0, 0),
        "boxes": joined(regions, 0, 4, dtype=torch.float64),
        "box_counts": counted(regions),
    }
    added = [v.injections.transpose(0, 1) for v in views if v.injections is not None]
    return {**tensors, "injections": torch.cat(added)} if added else tensors


def write_shard(path: Path, shard: Shard, key: str, number: int) -> None:
    """Write a shard so that it is there whole or not at all, also after a power failure."""
    records = json.dumps([[r.index, r.id, r.document, r.text] for r in shard.records])
    metadata = {"format": str(FORMAT), "key": key, "number": str(number), "records": records}
    metadata["skipped"] = json.dumps(shard.skipped)
    metadata["digest"] = _digest(shard.tensors, metadata)
    with atomic(path) as temporary:
        save_file({name: t.contiguous() for name, t in shard.tensors.items()}, temporary, metadata=metadata)


def open_shard(path: Path, key: str, number: int) -> Shard | None:
    """Map a shard; None when there is no such file, a DamagedShard when it is cut short, changed or another one."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            if [metadata.get(name) for name in ("format", "key", "number")] != [str(FORMAT), key, str(number)]:
                raise DamagedShard("it belongs to another format or store")
            if not set(stream.keys()) >= NEEDED:
                raise DamagedShard("a tensor is missing")
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
        digest = metadata.pop("digest", "")
        if digest != _digest(tensors, metadata):
            raise DamagedShard("its tables are damaged")
        records = [Record(*values) for values in json.loads(metadata["records"])]
        return Shard(tensors, records, [(i, message) for i, message in json.loads(metadata["skipped"])])
    except DamagedShard:
        raise
    except (SafetensorError, *UNREADABLE, LookupError, TypeError, RuntimeError, AttributeError) as error:
        raise DamagedShard(f"{type(error).__name__}: {error}") from error


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Digest of all that is small: tables, names, and the shapes of what is large."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if name not in LARGE and tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for name in sorted(metadata):
        digest.update(f"{name} {metadata[name]}".encode())
    return digest.hexdigest()
