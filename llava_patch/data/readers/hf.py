"""Hugging Face datasets: of the hub, saved with `save_to_disk`, or a folder of parquet or arrow files.

A row is a page: an image column, and either lists of texts and boxes or one text and one box. Boxes are
[x0, y0, x1, y1] in pixels, unless the source says `?boxes=1000` (LayoutLM's thousandths of width and height) or
`?boxes=1` (shares of them). Without it they are pixels, and an error asks for the setting where they may be something
else: they do not fit, are all within 0..1, or are all within 0..1000 on images that are larger. Where no image has more
than 1000 pixels on a side and every box fits, thousandths cannot be told from pixels: set `?boxes=1000`. Other columns
(labels) are ignored.
"""

from pathlib import Path
from typing import Any

from llava_patch.core.errors import InputError, LlavaPatchError, brief, shown
from llava_patch.core.extras import optional
from llava_patch.data.readers.files import check_name, four_numbers, nothing_there
from llava_patch.data.readers.samples import Collector, SourceError
from llava_patch.probe.sample import Box, EncodedImage, ImageSource
from llava_patch.probe.transform import ROUNDING

IMAGES = ("image", "img", "page_image", "image_path", "file_name")
TEXTS = ("words", "tokens", "texts", "text", "transcription")
BOXES = ("bboxes", "boxes", "bbox", "box")
UNITS = {"pixels": 0.0, "1000": 1000.0, "1": 1.0}
SAVED = ("dataset_dict.json", "state.json")
TABLES = (".parquet", ".arrow")


def read_hf(source: Path | str, split: str, config: str, unit: str, images: Path | None, collector: Collector) -> None:
    """Read one split of a dataset; rows are called SOURCE[SPLIT]:ROW or, in rows of lists, SOURCE[SPLIT]:ROW[INDEX].

    The source is a path, or a name on the hub; split, config, boxes' unit and images are as in `read.Source`.
    """
    name = f"{source}[{split}]" if split else str(source)
    dataset = _select_columns(_load(source, split, config), name)
    folder = images or (source if isinstance(source, Path) and source.is_dir() else Path(source).parent)
    scale = _Scale(unit, name)
    for row in range(len(dataset)):
        with collector.one():
            _read_row(dataset, row, folder, scale, f"{name}:{row}", collector)
    scale.check()


class _Scale:
    """Boxes to pixels; keeps what tells pixels from thousandths."""

    def __init__(self, unit: str, name: str) -> None:
        self.unit, self.name = unit, name
        self.divisor = UNITS[unit or "pixels"]
        self.largest, self.longest, self.doubt = 0.0, 0, ""

    def box(self, box: Box, size: tuple[int, int], where: str) -> Box:
        self.largest, self.longest = max(self.largest, *box), max(self.longest, *size)
        if self.divisor:
            if max(box) > self.divisor:
                raise InputError(f"{where}: box {box} is not in 0..{self.divisor:g}, as ?boxes={self.unit} says")
            width, height = size[0] / self.divisor, size[1] / self.divisor
            return box[0] * width, box[1] * height, box[2] * width, box[3] * height
        outside = box[2] > size[0] + ROUNDING or box[3] > size[1] + ROUNDING
        if not self.unit and outside and max(box) <= 1000 and not self.doubt:
            self.doubt = (
                f"{where}: box {box} is outside its image of {size[0]} x {size[1]} pixels, but within 0..1000: are "
                "these LayoutLM's thousandths? Then add ?boxes=1000 to the source, otherwise ?boxes=pixels"
            )
        if self.doubt:  # not to be skipped: the other boxes would be wrong as well
            raise SourceError(self.doubt)
        return box

    def check(self) -> None:
        """After the last row: refuse boxes that could all be pixels as well as thousandths or shares."""
        if self.unit or not self.longest:
            return
        if self.largest <= 1:
            raise InputError(f"{self.name}: all boxes are within 0..1: add ?boxes=1 to the source if they are shares")
        if self.largest <= 1000 < self.longest:
            raise InputError(
                f"{self.name}: all boxes are within 0..1000 though images have up to {self.longest} pixels: say which "
                "they are, pixels (add ?boxes=pixels to the source) or LayoutLM's thousandths (?boxes=1000)"
            )


def _read_row(dataset: Any, row: int, folder: Path, scale: _Scale, where: str, collector: Collector) -> None:
    image_column, text_column, box_column = dataset.column_names
    try:
        value, texts, boxes = dataset[row].values()
    except Exception as error:  # arrow and the columns' decoders raise dozens of kinds
        raise InputError(f"{where}: the row cannot be read: {brief(error)}") from error
    if isinstance(value, dict) and value.get("bytes"):
        name = f"{where} ({Path(value['path']).name})" if value.get("path") else where
        image: ImageSource = EncodedImage(name, lambda: dataset[row][image_column]["bytes"])
    elif isinstance(path := value.get("path") or None if isinstance(value, dict) else value, str):
        image = folder / check_name(path, f"{where}: {image_column}")
    else:
        raise InputError(f"{where}: no image in column {image_column}")
    page = collector.page(image, str(image), where)
    listed = isinstance(texts, list)
    if not listed:
        texts, boxes = [texts], [boxes]
    elif not texts and boxes is None:
        boxes = []
    if not isinstance(boxes, list) or len(texts) != len(boxes):
        raise InputError(f"{where}: {text_column} has {len(texts)} values, {box_column} does not have as many")
    for index, (text, box) in enumerate(zip(texts, boxes, strict=True)):
        with collector.one():
            place = f"{where}[{index}]" if listed else where
            if text is not None and not isinstance(text, str):
                raise InputError(f"{place}: {text_column} is {shown(text)}: expected a string")
            if not (text or "").strip() and nothing_there(box):
                collector.region(page, None, [], place)
                continue
            numbers = four_numbers(box, f"{place}: {box_column}", "[x0, y0, x1, y1]")
            collector.region(page, text, [scale.box(numbers, page.size, place)], place)


def _select_columns(dataset: Any, name: str) -> Any:
    """The dataset with the columns of image, text and box alone, found by their names; images stay encoded."""
    Image = optional("datasets").Image
    features = dataset.features
    pictures = [key for key, feature in features.items() if isinstance(feature, Image)]
    found: list[str] = []
    wanted = {
        "image": ((*IMAGES, *pictures[:1]), pictures or features),
        "text": (TEXTS, features),
        "box": (BOXES, features),
    }
    for what, (known, among) in wanted.items():
        column = next((one for one in known if one in among), None)
        if column is None:
            expected = f"expected one called {' or '.join(known)}"
            raise InputError(f"{name}: no {what} column among {', '.join(features)}: {expected}")
        found.append(column)
    image = found[0]
    # What an image column becomes when its file does not say that it is one.
    holds_bytes = isinstance(features[image], dict) and "bytes" in features[image]
    if isinstance(features[image], Image):
        dataset = dataset.cast_column(image, Image(decode=False))
    elif getattr(features[image], "dtype", "") != "string" and not holds_bytes:
        raise InputError(f"{name}: column {image} holds neither images nor paths, but {features[image]}")
    return dataset.select_columns(found)  # other columns are not even decoded


def _load(source: Path | str, split: str, config: str) -> Any:
    datasets = optional("datasets", f"{source}: a Hugging Face dataset")
    try:
        read = datasets.load_dataset
        found = _from_disk(datasets, source) if isinstance(source, Path) else read(source, config or None)
    except LlavaPatchError:
        raise
    except Exception as error:  # datasets and its network layers raise dozens of kinds
        raise InputError(f"{shown(str(source), 300)[1:-1]}: datasets cannot load it: {brief(error)}") from error
    if isinstance(found, dict):
        if not split and len(found) == 1:
            return next(iter(found.values()))
        if split not in found:
            asked = f"no split {split!r}" if split else "several splits"
            raise InputError(f"{source}: {asked}: it has {', '.join(found)}; name one with ?split=NAME")
        return found[split]
    if split:
        raise InputError(f"{source}: it has no splits: leave out {split!r}")
    return found


def _from_disk(datasets: Any, source: Path) -> Any:
    if source.is_dir() and any((source / name).is_file() for name in SAVED):
        return datasets.load_from_disk(str(source))
    tables = [p for p in source.rglob("*") if p.suffix.lower() in TABLES and not p.name.startswith("cache-")]
    if not source.is_file() and not tables:
        raise InputError(f"{source}: no {' or '.join(TABLES)} file in it, and no {' or '.join(SAVED)}")
    splits: dict[str, list[Any]] = {}
    for file in [source] if source.is_file() else sorted(tables):
        # The hub's file names: train-00000-of-00002.parquet, or a folder a split.
        named = source.is_file() or file.parent == source or "-of-" in file.stem
        read = datasets.Dataset.from_file if file.suffix.lower() == ".arrow" else datasets.Dataset.from_parquet
        splits.setdefault(file.stem.split("-")[0] if named else file.parent.name, []).append(read(str(file)))
    joined = {name: datasets.concatenate_datasets(parts) for name, parts in splits.items()}
    return joined if len(joined) > 1 else next(iter(joined.values()))
