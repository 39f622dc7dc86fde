"""Regions in training data: of Hugging Face's Trainer by a collator around the user's, of LLaVA's script unasked.

LLaVA's data set and collator drop what they do not know, so both are wrapped.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from llava_patch.core.errors import InputError, SettingError
from llava_patch.patching.handle import Handle
from llava_patch.probe.auxiliary.attach import Auxiliary
from llava_patch.probe.auxiliary.regions import KEY, Marker, Region, collate, entry, parse

MODES = {"pad": "pad", "square": "crop"}  # --image_aspect_ratio: the transform that does the same


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


# --- LLaVA's training script ------------------------------------------------------------------------------------------


class _Around:
    """Stands for an object of LLaVA's and has its other attributes."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # while a worker process unpickles this object
            raise AttributeError(name)
        return getattr(self.inner, name)


class RegionDataset(_Around, Dataset):
    """LLaVA's data set (`lengths`, `modality_lengths`, ...), whose items carry their region as well."""

    def __init__(self, inner: Any, marker: Marker, regions: dict[int, Region], folder: str, source: str) -> None:
        """Wrap LLaVA's, with the regions of its records by number, its images' folder and its records' file."""
        super().__init__(inner)
        self._marker, self._regions, self._folder, self._source = marker, regions, folder, source

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """LLaVA's item; with "rprobe" where the record has a region."""
        item = self.inner[index]
        region = self._regions.get(int(index))
        if region is None:
            return item
        record = self.inner.list_data_dict[index]
        name = _name(self._source, int(index), record)
        files = _files(record)
        with Image.open(os.path.join(self._folder, files[region.image_index])) as image:  # LLaVA has read it by now
            size = image.size
        marked = self._marker.mark(region, size, name)
        return item if marked is None else {**item, KEY: {**marked, "image_index": region.image_index}}


class LlavaCollator(_Around):
    """LLaVA's collator, with the batch's regions under "rprobe" (no key where no record has one)."""

    def __call__(self, instances: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch; LLaVA gives the model one image a record, a black one where the record has none."""
        batch = self.inner([{k: v for k, v in one.items() if k != KEY} for one in instances])
        places = [i for i, one in enumerate(instances) if KEY in one]
        if places:
            batch[KEY] = collate([instances[i][KEY] for i in places], places)
        return batch


def wrap(auxiliary: Auxiliary, train_dataset: Any, data_collator: Any) -> tuple[RegionDataset, LlavaCollator]:
    """Make LLaVA's `LazySupervisedDataset` and its collator carry regions.

    InputError: a record's region is not one, or no record has any; names file and record. SettingError: a data set
    that is not LLaVA's, or images in tiles.
    """
    dataset = train_dataset
    records, about = getattr(dataset, "list_data_dict", None), getattr(dataset, "data_args", None)
    if records is None or about is None:
        raise SettingError(
            f"AuxiliaryProbe: {type(dataset).__name__} is not LLaVA's data set: use "
            "llava_patch.integrations.training.auxiliary.RegionCollator and follow(trainer) with data of your own"
        )
    ratio = str(getattr(about, "image_aspect_ratio", "square"))
    if ratio not in MODES:
        raise SettingError(
            f"AuxiliaryProbe does not know --image_aspect_ratio {ratio}: its boxes follow {', '.join(MODES)}"
        )
    source = str(about.data_path)
    regions = {}
    for index, record in enumerate(records):
        value = entry(record)
        if value is not None:
            files, name = _files(record), _name(source, index, record)
            regions[index] = parse(value, len(files), name)
            if regions[index].image_index:
                raise InputError(
                    f"{name}: image_index {regions[index].image_index}: LLaVA's data has one image a record"
                )
    if not regions:
        raise InputError(
            f'{source}: no record has a region for AuxiliaryProbe: add "rprobe": {{"box": [x0, y0, x1, y1], '
            '"text": "..."} to records, or leave the setting out'
        )
    marker = auxiliary.marker(about.image_processor, dataset.tokenizer, MODES[ratio])
    return RegionDataset(dataset, marker, regions, about.image_folder or "", source), LlavaCollator(data_collator)


def _files(record: dict[str, Any]) -> list[str]:
    image = record.get("image", [])
    return [image] if isinstance(image, str) else list(image)


def _name(source: str, index: int, record: dict[str, Any]) -> str:
    own = f" (id {record['id']})" if "id" in record else ""
    return f"{source}: record {index + 1}{own}"
