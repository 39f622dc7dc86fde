"""What the measurements look at: images with a question and, where it is known, the answer.

`read_examples` takes what people have: LLaVA's training JSON, everything that R-Probe reads, a folder of images, or
nothing at all (rendered pages).
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.core.errors import InputError, SettingError, shown

if TYPE_CHECKING:
    from PIL import Image

    from llava_patch.data.readers.read import Source
    from llava_patch.probe.sample import ImageSource

logger = logging.getLogger("llava_patch")
QUESTION = "What is written in the image?"
IMAGE = "<image>"  # where LLaVA's data have the image


@dataclass(frozen=True, eq=False)
class Example:
    """An image and a question about it.

    Attributes:
        image: the picture, or the file it is in (opened when it is needed).
        question: what is asked, without a placeholder for the image.
        answer: the right answer; "": not known, so that nothing can be trained on it.
        id: names the example in results.
        where: file and entry, for errors; "": the id.
    """

    image: "ImageSource"
    question: str
    answer: str = ""
    id: str = ""
    where: str = ""

    def open_image(self) -> "Image.Image":
        """The picture in 8-bit RGB; where its file is missing or broken an InputError that names example and file."""
        from llava_patch.probe.sample import open_rgb

        try:
            return open_rgb(self.image, self.where or self.id)
        except InputError as error:
            raise InputError(f"{error}; ?broken=skip behind the data leaves out what cannot be read") from error


def read_examples(
    data: str = "", count: int | None = None, side: int = 336, question: str = "", answers: bool = False
) -> list[Example]:
    """Examples to measure on; images are opened later, one at a time.

    Args:
        data: LLaVA's conversation JSON (images beside it, or PATH?images=FOLDER), a source that
            `llava_patch.data.readers.read_samples` takes (one example a page, its transcript the answer), an image, or
            a folder of images; "": rendered pages. `?broken=skip` behind it leaves out what cannot be used, images
            included, and says so; otherwise the first such thing is an error.
        count: how many at most, spread evenly over the data, which often come sorted by kind; None: all (32 rendered
            pages).
        side: of the vision tower's input in pixels; rendered pages have twice that.
        question: asked about every image; "": the data's own, or `QUESTION`.
        answers: whether the answer must be known.

    Returns:
        At least one example.

    Raises:
        InputError: nothing usable there; names the file.
    """
    skipped: list[str] = []
    found = list(_read(data, count, side, skipped))
    spread: Sequence[int] = range(len(found))
    if count is not None and count < len(found):
        spread = [i * len(found) // count for i in range(count)]
    found = _usable(found, list(spread), skipped) if _skips(data) else [found[i] for i in spread]
    if skipped:
        logger.warning("%s: %d things left out (?broken=skip); the first: %s", data, len(skipped), skipped[0])
    if question:
        found = [replace(example, question=question) for example in found]
    if answers and (silent := next((e for e in found if not e.answer), None)) is not None:
        raise InputError(
            f"{silent.where or silent.id}: its answer is not known, and this measurement needs the loss: give data "
            "with transcripts, or LLaVA's conversation JSON"
        )
    if not found:
        raise InputError(f"{data}: no example with an image in it")
    return found


def check_data(data: str) -> None:
    """Refuse data that cannot be read as `read_examples` does, before minutes are spent on loading a model."""
    if data:
        read_examples(data, 1)[0].open_image()


def _skips(data: str) -> bool:
    """Whether a source leaves out what cannot be used."""
    from llava_patch.data.readers.read import skips

    return bool(data) and not os.path.exists(data) and skips(data, "")


def _usable(found: list[Example], chosen: list[int], skipped: list[str]) -> list[Example]:
    """As many of the examples as are chosen, these first, whose image can be opened; in their order."""
    taken: list[int] = []
    for index in dict.fromkeys([*chosen, *range(len(found))]):
        if len(taken) == len(chosen):
            break
        try:
            found[index].open_image()
            taken.append(index)
        except InputError as error:
            skipped.append(str(error.__cause__))
    return [found[index] for index in sorted(taken)]


def _read(data: str, count: int | None, side: int, skipped: list[str]) -> Sequence[Example]:
    if not data:
        from llava_patch.data.pages import Pages

        pages = Pages(32 if count is None else count, side, split="heldout")
        return [Example(page.image, QUESTION, "\n".join(page.all_texts), page.id) for page in pages]
    from llava_patch.data.readers.files import IMAGE_SUFFIXES, load_json, walk
    from llava_patch.data.readers.read import parse_source, read_samples

    source = parse_source(data)
    path, told = Path(source.path), source.hub or source.format  # told: what is there needs no guess
    if not source.hub and not os.path.exists(path):
        named = shown(data, 300)[1:-1]
        raise InputError(f"DATA {named}: no such file or folder (a data set of the Hugging Face hub is hf:{named})")
    if not told and path.is_file() and path.suffix.lower() == ".json":
        found = load_json(path)
        if isinstance(found, list) and any(isinstance(v, dict) and "conversations" in v for v in found[:8]):
            return _from_conversations(found, path, source, skipped)
    files = [] if told else [path] if path.is_file() else walk(path)
    if files and all(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
        return [Example(file, QUESTION, id=file.name, where=str(file)) for file in files]
    documents: dict[str, list[Any]] = {}
    try:
        samples = read_samples(data)
        skipped += samples.skipped
        for sample in samples:
            documents.setdefault(sample.document or sample.id, []).append(sample)
    except InputError as error:
        if told:
            raise
        raise InputError(
            f"DATA {data} is neither LLaVA's conversation JSON nor an image nor a folder of images only; as data with "
            f"text: {error}"
        ) from error
    return [
        Example(of_page[0].image, QUESTION, "\n".join(s.text for s in of_page if s.text), name, of_page[0].place)
        for name, of_page in documents.items()
    ]


def _from_conversations(records: list[Any], path: Path, source: "Source", skipped: list[str]) -> list[Example]:
    from llava_patch.data.readers.samples import Collector

    images = Path(source.images) if source.images else path.parent
    if told := [name for name in ("boxes", "split", "config", "exif", "coordinates") if getattr(source, name)]:
        raise SettingError(f"{path}: {', '.join(told)}: LLaVA's conversation JSON has no boxes, splits or lines")
    if not os.path.isdir(images):
        raise InputError(f"DATA {path}: folder of images {shown(str(images), 300)[1:-1]}: no such folder")
    collector, found = Collector(source.broken or "stop"), []
    for number, record in enumerate(records):
        with collector.one():
            if (example := _conversation(record, number, f"{path}: entry {number}", images)) is not None:
                found.append(example)
    skipped += collector.skipped
    return found


def _conversation(record: Any, number: int, where: str, images: Path) -> Example | None:
    """The first question and answer of a record; None: it has no image, or several."""
    from llava_patch.data.readers.files import check_name, check_text

    try:
        if not record.get("image") or not isinstance(record["image"], str):
            return None
        asked, answered = (record["conversations"][i]["value"] + "" for i in (0, 1))  # text
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        expected = "expected a question and an answer, each {from, value}"
        raise InputError(f"{where}: conversations: {expected}") from error
    image = images / check_name(record["image"], f"{where}: image")
    texts = {"question": asked.replace(IMAGE, "").strip(), "answer": answered, "id": str(record.get("id", number))}
    return Example(image, **{name: check_text(text, f"{where}: {name}") for name, text in texts.items()}, where=where)
