"""Regions for Hugging Face's own Trainer: a collator around the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from llava_patch.core.errors import InputError, SettingError
from llava_patch.patching.handle import Handle
from llava_patch.probe.auxiliary.regions import KEY, collate, entry, parse


class RegionCollator:
    """Adds the regions of a batch's records to what another collator makes of them.

    For `LlavaForConditionalGeneration` under Hugging Face's Trainer (LLaVA's train.py needs none of this)::

        handle = llava_patch.patch(model, probe=llava_patch.AuxiliaryProbe(weight=0.1))
        collator = RegionCollator(my_collator, handle, processor.image_processor, processor.tokenizer)
        arguments = TrainingArguments(..., remove_unused_columns=False)
        trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator)
        follow(trainer)
        trainer.train()

    `remove_unused_columns` must be False: the Trainer would otherwise drop what the model's `forward` does not name,
    before this collator sees it (`follow` refuses it).

    A record with a region has the entry "rprobe", as in LLaVA's data: {"box": [x0, y0, x1, y1] or a list of those in
    pixels of the original image, "text": "...", "image_index": 0}; tensors and arrays will do as well. Its image is
    under "image", or its images are a list under "images": PIL images, or paths. A record without the entry is trained
    on as before. The inner collator gets the records without the entry; it must give every image of the batch to the
    model in the records' order ("pixel_values" [images, 3, height, width]), resized and cropped by the image processor
    alone.

    The batch gets the key "rprobe", which the patched model's `forward` takes out again; a batch without a region does
    not have it, and no batch has it while the model has no head (weight 0): entries are then dropped unread.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], dict[str, Any]],
        handle: Handle,
        image_processor: Any,
        tokenizer: Any,
        mode: str = "crop",
    ) -> None:
        """Wrap a collator.

        Args:
            collator: makes a batch of records.
            handle: of the model, patched with `probe=AuxiliaryProbe(...)`.
            image_processor: the model's.
            tokenizer: the model's.
            mode: what happens to an image before the tower: "crop", the image processor's own resize and crop; "pad"
                or "resize" where the caller pads it to a square or stretches it first (see `RProbe.image_mode`). "pad"
                too for a `LlavaImageProcessor` with do_pad = True, which does so itself.

        Raises:
            SettingError: the model has no auxiliary loss, or `mode` is not what the image processor does.
        """
        auxiliary = handle.auxiliary
        if auxiliary is None:
            raise SettingError("RegionCollator: the model has no auxiliary loss: patch(model, probe=AuxiliaryProbe())")
        self.collator = collator
        self._auxiliary = auxiliary
        self.marker = None if auxiliary.head is None else auxiliary.marker(image_processor, tokenizer, mode)

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Raises:
            InputError: a region that cannot be used, or a batch with other images than its records.
        """
        bare = [{k: v for k, v in record.items() if k != KEY} for record in records]
        marker = self.marker
        if marker is None or self._auxiliary.head is None:
            return self.collator(bare)
        marked, places, first = [], [], 0
        for number, record in enumerate(records):
            images = _images(record)
            value = entry(record)
            if value is not None:
                name = f"record {record.get('id', f'{number} of the batch')}"
                region = parse(value, len(images), name)
                found = marker.mark(region, _size(images[region.image_index], name), name)
                if found is not None:
                    marked.append(found)
                    places.append(first + region.image_index)
            first += len(images)
        batch = self.collator(bare)
        pixels = batch.get("pixel_values")
        if marked and pixels is not None and len(pixels) != first:
            raise InputError(
                f"the records of a batch hold {first} images, but the inner collator gave the model {len(pixels)}: it "
                "must give all of them, in the records' order"
            )
        if marked:
            batch[KEY] = collate(marked, places)
        return batch


def _images(record: Mapping[str, Any]) -> list[Any]:
    if record.get("images") is not None:
        return list(record["images"])
    return [] if record.get("image") is None else [record["image"]]


def _size(image: Any, name: str) -> tuple[int, int]:
    if isinstance(image, Image.Image):
        return image.size
    try:
        with Image.open(image) as opened:
            return opened.size
    except (OSError, SyntaxError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{name}: image {image!r} cannot be read: {error}") from error
