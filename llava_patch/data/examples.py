"""What the measurements look at: images with a question and, where it is known, the answer.

`read_examples` takes what people have: LLaVA's training JSON, everything that R-Probe reads, a folder of images, or
nothing at all (rendered pages).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.core.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from llava_patch.probe.sample import ImageSource

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

        return open_rgb(self.image, self.where or self.id)


def read_examples(
    data: str = "", count: int | None = None, side: int = 336, question: str = "", answers: bool = False
) -> list[Example]:
    """Examples to measure on; images are opened later, one at a time.

    Args:
        data: LLaVA's conversation JSON (images beside it, or PATH?images=FOLDER), a source that
            `llava_patch.data.readers.read_samples` takes (one example a page, its transcript the answer), an image, or
            a folder of images; "": rendered pages.
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
    found = list(_read(data, count, side))
    if count is not None and count < len(found):
        found = [found[i * len(found) // count] for i in range(count)]
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
        read_examples(data, 1)


def _read(data: str, count: int | None, side: int) -> Sequence[Example]:
    if not data:
        from llava_patch.data.pages import Pages

        pages = Pages(32 if count is None else count, side, split="heldout")
        return [Example(page.image, QUESTION, "\n".join(page.all_texts), page.id) for page in pages]
    from llava_patch.data.readers.files import IMAGE_SUFFIXES, load_json, walk
    from llava_patch.data.readers.read import parse_source, read_samples

    source = parse_source(data)
    path, told = Path(source.path), source.hub or source.format  # told: what is there needs no guess
    if not source.hub and not path.exists():
        raise InputError(f"DATA {data}: no such file or folder (a data set of the Hugging Face hub is hf:{data})")
    if not told and path.is_file() and path.suffix.lower() == ".json":
        found = load_json(path)
        if isinstance(found, list) and found and all(isinstance(v, dict) and "conversations" in v for v in found[:8]):
            return _from_conversations(found, path, Path(source.images) if source.images else path.parent)
    files = [] if told else [path] if path.is_file() else walk(path)
    if files and all(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
        return [Example(file, QUESTION, id=file.name, where=str(file)) for file in files]
    documents: dict[str, list[Any]] = {}
    try:
        for sample in read_samples(data):
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


def _from_conversations(records: list[Any], path: Path, images: Path) -> list[Example]:
    found = []
    for number, record in enumerate(records):
        where = f"{path}: entry {number}"
        try:
            if not record.get("image") or not isinstance(record["image"], str):
                continue
            asked, answered = (record["conversations"][i]["value"] + "" for i in (0, 1))  # text
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            expected = "expected a question and an answer, each {from, value}"
            raise InputError(f"{where}: conversations: {expected}") from error
        question, name = asked.replace(IMAGE, "").strip(), str(record.get("id", number))
        found.append(Example(images / record["image"], question, answered, name, where))
    return found
