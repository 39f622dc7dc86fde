"""Which images the data hold, told by what is in them and not by their names."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_patch.core.errors import InputError
from llava_patch.core.files import digest
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.store.shard import Record
from llava_patch.probe.sample import Sample


@dataclass(frozen=True)
class ImagesOfData:
    """The samples (their numbers) of each image, in the order in which images come up, and a key of JSON values.

    `records` are None where names and texts are only known once a sample is drawn.
    """

    images: list[list[int]]
    records: list[Record] | None
    key: Any


def images_of(samples: Sequence[Sample], settings: RProbe) -> ImagesOfData:
    """Find the images of a data set and name its content.

    Samples that draw themselves (they have `identity()`, JSON values) have one image each and are not drawn here. Of
    others every image file is read once: what is in it counts, not its name or time, so that a file that was replaced
    is noticed and a folder that was moved is known again.
    """
    identity = getattr(samples, "identity", None)
    if identity is not None:
        return ImagesOfData([[i] for i in range(len(samples))], None, identity())
    content_of = Contents()
    number_of: dict[Any, int] = {}
    images: list[list[int]] = []
    records, described = [], []
    for index in range(len(samples)):
        sample = samples[index]
        content = content_of(sample)
        # Lines of one page share its tokens, unless each line is blacked out in a copy of its own.
        number = number_of.setdefault(index if settings.masked else content, len(images))
        if number == len(images):
            images.append([])
        images[number].append(index)
        records.append(Record(index, sample.id, sample.document or sample.id, sample.text))
        described.append([content, sample.boxes, sample.all_boxes])
    return ImagesOfData(images, records, {"own": digest(described), "samples": len(described), "images": len(images)})


class Contents:
    """Content of a sample's image; each file and each picture in memory is read once."""

    def __init__(self) -> None:
        self._files: dict[str, str] = {}
        self._pictures: dict[int, tuple[weakref.ref[Any], str]] = {}

    def __call__(self, sample: Sample) -> str:
        """Digest of the file's bytes, or of the pixels in memory; of its name where it cannot be read."""
        image: Any = sample.image
        if isinstance(image, (str, os.PathLike)) or hasattr(image, "read"):
            place = os.path.abspath(image) if isinstance(image, (str, os.PathLike)) else f"inside {image}"
            if place not in self._files:
                self._files[place] = _content(sample) or f"unreadable {place}"
            return self._files[place]
        known = self._pictures.get(id(image))
        if known is None or known[0]() is not image:  # Python gives a number again once its object is gone
            content = _content(sample) or f"unreadable {sample.id}"
            self._pictures[id(image)] = known = weakref.ref(image), content
        return known[1]


def _content(sample: Sample) -> str | None:
    """Digest of a sample's image file, or of its pixels when it is in memory; None: it cannot be read."""
    image: Any = sample.image
    found = hashlib.blake2b(digest_size=16)
    try:
        if isinstance(image, (str, os.PathLike)):
            found.update(Path(image).read_bytes())
        elif hasattr(image, "read"):
            found.update(image.read())
        else:
            picture = sample.open_image()
            found.update(f"{picture.mode} {picture.size}".encode())
            found.update(picture.tobytes())
    except (OSError, SyntaxError, ValueError, InputError):
        return None  # refused, or skipped, when its turn comes
    return found.hexdigest()


def trained_on(train: Sequence[Sample], heldout: Sequence[Sample]) -> tuple[list[str], int]:
    """(held-out documents that are trained on, number of all): told by what is in an image and not by its name.

    Every image file is read once, which costs little beside its way through the tower. An InputError where all held-out
    documents are trained on.
    """
    drawn = [data.identity() for data in (train, heldout) if hasattr(data, "identity")]
    if drawn:  # samples that draw themselves are told apart by what they are, and not drawn here
        if len(drawn) == 2 and drawn[0] == drawn[1]:
            raise InputError("R-Probe: the held-out samples are the training samples: give others, or none")
        return [], len(heldout)
    content_of = Contents()
    known = {content_of(train[i]) for i in range(len(train))}
    documents: dict[str, bool] = {}
    for i in range(len(heldout)):
        sample = heldout[i]
        name = sample.document or sample.id
        documents[name] = content_of(sample) in known or documents.get(name, False)
    shared = [name for name, found in documents.items() if found]
    if shared and len(shared) == len(documents):
        raise InputError(
            f"R-Probe: all {len(documents)} held-out documents are trained on, such as {shared[0]}: hold out "
            "documents whose images are not among the training samples"
        )
    return shared, len(documents)
