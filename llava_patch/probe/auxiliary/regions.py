"""Regions of text in training records: how they are written, checked, and turned into what the loss takes."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_patch.core.errors import InputError
from llava_patch.probe.sample import Box
from llava_patch.probe.sequence import Layout
from llava_patch.probe.transform import Transform
from llava_patch.probe.view import target_tokens
from llava_patch.settings.auxiliary import AuxiliaryProbe
from llava_patch.settings.checks import is_number

logger = logging.getLogger("llava_patch")

KEY = "rprobe"  # of a region in a record, and of the regions in a batch
FIELDS = ("box", "text", "image_index")


@dataclass(frozen=True)
class Region:
    """A text region of one of a record's images, its boxes (x0, y0, x1, y1) in pixels of the original image."""

    boxes: tuple[Box, ...]
    text: str
    image_index: int = 0


def entry(record: Mapping[str, Any]) -> Any:
    """A record's "rprobe" entry; None where it has none, or only fields that are None, as tables of `datasets` have."""
    value = record.get(KEY)
    if isinstance(value, Mapping) and value and all(v is None for v in value.values()):
        return None
    return value


def parse(value: Any, images: int, name: str) -> Region:
    """Read a record's "rprobe" entry; its image need not be open, and the record has `images` of them.

    It is {"box": [x0, y0, x1, y1] or a list of those, "text": str, "image_index": int (0 if left out)}. Boxes and
    numbers may be tensors or arrays; a field that is None counts as left out. An InputError says what is wrong with it.
    """
    if not isinstance(value, Mapping):
        raise InputError(f'{name}: "rprobe" is {value!r}: expected {{"box": [x0, y0, x1, y1], "text": "..."}}')
    value = {k: _plain(v) for k, v in value.items() if v is not None}
    if unknown := sorted(set(value) - set(FIELDS)):
        raise InputError(f'{name}: "rprobe" has no entry {", ".join(unknown)}, it takes {", ".join(FIELDS)}')
    text = value.get("text")
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{name}: "rprobe" needs the region\'s "text", got {text!r}')
    given: Any = value.get("box")
    boxes: Any = given if isinstance(given, list) and given and isinstance(given[0], list) else [given]
    for box in boxes:
        numbers = isinstance(box, list) and len(box) == 4 and all(is_number(v) and math.isfinite(v) for v in box)
        if not numbers or not (box[0] < box[2] and box[1] < box[3]):
            raise InputError(f"{name}: box {box!r}: expected [x0, y0, x1, y1] in pixels with x0 < x1 and y0 < y1")
    index = value.get("image_index", 0)
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < images:
        raise InputError(f"{name}: image_index {index!r}, but the record has {images} images (counted from 0)")
    return Region(tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in boxes), text, index)


def _plain(value: Any) -> Any:
    """Tuples, tensors, arrays and their numbers as Python's own lists and numbers."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value


@dataclass(frozen=True)
class Marker:
    """Marks the visual tokens of a region and numbers its text; the model embeds `vocabulary` tokens."""

    transform: Transform
    layout: Layout
    tokenizer: Any
    settings: AuxiliaryProbe
    vocabulary: int

    def mark(self, region: Region, size: tuple[int, int], name: str) -> dict[str, Tensor] | None:
        """What the loss needs of a region of an original of (width, height); None: unusable, `broken` says to go on.

        It is "target" bool [tokens], the visual tokens to rebuild, and "text" int64 [text tokens].
        """
        try:
            boxes = [self.transform.box(box, size, name) for box in region.boxes]
            ids = list(self.tokenizer(region.text, add_special_tokens=False)["input_ids"])
            if not ids:
                raise InputError(f"{name}: the text {region.text!r} has no tokens")
            target = target_tokens(self.layout, boxes, name)
        except InputError as error:
            if self.settings.broken == "skip":
                logger.warning("AuxiliaryProbe: left out: %s", error)
                return None
            raise InputError(f'{error}; AuxiliaryProbe.broken = "skip" trains on the rest') from None
        if max(ids) >= self.vocabulary:
            raise InputError(
                f"{name}: the tokenizer gives id {max(ids)}, the model embeds {self.vocabulary} tokens: is it its "
                "tokenizer?"
            )
        return {"target": target, "text": torch.tensor(ids[: self.settings.max_text_tokens], dtype=torch.int64)}


def collate(marked: Sequence[dict[str, Tensor]], images: Sequence[int]) -> dict[str, Tensor]:
    """Put the regions of a batch, from `Marker.mark`, together as `token_errors` takes them; `images` are theirs.

    No value is a float: DeepSpeed's Trainer casts those to half precision.
    """
    return {
        "image": torch.tensor(images, dtype=torch.int64),
        "target": torch.stack([one["target"] for one in marked]),
        "text": torch.nn.utils.rnn.pad_sequence([one["text"] for one in marked], batch_first=True),
        "counts": torch.tensor([len(one["text"]) for one in marked], dtype=torch.int64),
    }
