"""Regions in LLaVA's own training data: its data set and collator drop what they do not know, so both are wrapped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from llava_patch.core.errors import InputError, SettingError
from llava_patch.probe.auxiliary.attach import Auxiliary
from llava_patch.probe.auxiliary.regions import KEY, Marker, Region, collate, entry, parse

MODES = {"pad": "pad", "square": "crop"}  # --image_aspect_ratio: the transform that does the same


class RegionDataset(Dataset):
    """LLaVA's data set, whose items carry their region as well.

    Everything but `__getitem__` is the inner data set's (`lengths`, `modality_lengths`, ...).
    """

    def __init__(self, inner: Any, marker: Marker, regions: dict[int, Region], folder: str, source: str) -> None:
        """Wrap a data set.

        Args:
            inner: LLaVA's.
            marker: of the run.
            regions: of its records, by number.
            folder: of the images.
            source: the file that the records come from.
        """
        self.inner = inner
        self._marker = marker
        self._regions = regions
        self._folder = folder
        self._source = source

    def __getattr__(self, name: str) -> Any:
        """The inner data set's attribute."""
        if name == "inner":  # while a worker process unpickles this object
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __len__(self) -> int:
        """Records."""
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


class LlavaCollator:
    """LLaVA's collator, with the batch's regions under "rprobe" (no key where no record has one)."""

    def __init__(self, inner: Any) -> None:
        """Wrap a collator."""
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        """The inner collator's attribute."""
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __call__(self, instances: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch; LLaVA gives the model one image a record, a black one where the record has none."""
        batch = self.inner([{k: v for k, v in one.items() if k != KEY} for one in instances])
        places = [i for i, one in enumerate(instances) if KEY in one]
        if places:
            batch[KEY] = collate([instances[i][KEY] for i in places], places)
        return batch


def wrap(auxiliary: Auxiliary, train_dataset: Any, data_collator: Any) -> tuple[RegionDataset, LlavaCollator]:
    """Make LLaVA's data carry regions.

    Args:
        auxiliary: the loss.
        train_dataset: LLaVA's `LazySupervisedDataset`.
        data_collator: its collator.

    Raises:
        InputError: a record's region is not one, or no record has any; names file and record.
        SettingError: a data set that is not LLaVA's, or images in tiles.
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
