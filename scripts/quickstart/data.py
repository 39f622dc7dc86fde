"""Training data in LLaVA's own format, and the held-out rows that exact match is measured on.

OUT/images/            all images, PNG
OUT/plain.json         stage 1 (--version plain): an image and its caption
OUT/v1.json            stage 2 (--version v1): mostly "What is the number in the image?"
OUT/read_test.jsonl    images of strings that neither of the two shows
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from . import questions
from .fileset import write_atomically

TWO_TURN_SHARE = 0.05  # of the stage-2 rows: a second question about the same digits


@dataclass(frozen=True)
class TrainingData:
    """Absolute paths of the data of one run."""

    images: Path
    plain: Path
    v1: Path
    read_test: Path

    @classmethod
    def at(cls, out: str | os.PathLike) -> "TrainingData":
        """The paths under `out`, whether or not they exist."""
        root = Path(out).resolve()
        return cls(root / "images", root / "plain.json", root / "v1.json", root / "read_test.jsonl")

    def complete(self) -> bool:
        """True if everything is there."""
        return all(path.exists() for path in (self.images, self.plain, self.v1, self.read_test))


def write_data(
    out: str | os.PathLike,
    *,
    num_plain: int = 1024,
    num_v1: int = 4096,
    num_test: int = 512,
    shares: dict[str, float] | None = None,
    image_size: int = 56,
    seed: int = 0,
) -> TrainingData:
    """Writes images, both training files and the test rows, replacing older ones.

    Args:
        out: folder to write into, made if need be.
        num_plain: stage-1 rows.
        num_v1: stage-2 rows.
        num_test: held-out rows.
        shares: kind of question -> share in stage 2; None for `questions.DEFAULT_SHARES`.
        image_size: side of the images, in pixels.
        seed: of everything random. Images differ from those the base was trained on with the same seed.
    """
    if min(num_plain, num_v1, num_test) < 1:
        raise ValueError(f"num_plain={num_plain}, num_v1={num_v1} and num_test={num_test} must be at least 1")
    paths = TrainingData.at(out)
    root = paths.images.parent
    root.mkdir(parents=True, exist_ok=True)
    streams = [np.random.default_rng([seed, stream]) for stream in (1, 2, 3)]
    with_image = {k: v for k, v in (shares or questions.DEFAULT_SHARES).items() if k != "text"}
    plain_sampler = questions.Sampler(streams[0], with_image, image_size=image_size)
    v1_sampler = questions.Sampler(streams[1], shares, image_size=image_size)
    test_sampler = questions.Sampler(streams[2], {"read": 1.0}, held_out=True, image_size=image_size)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=root) as partial:
        folder = Path(partial) / "images"
        folder.mkdir()
        plain = [_plain_row(plain_sampler.draw(), f"plain-{i:06d}", folder) for i in range(num_plain)]
        v1 = [_v1_row(v1_sampler, f"v1-{i:06d}", folder) for i in range(num_v1)]
        test = [_test_row(test_sampler.draw(), f"test-{i:06d}", folder) for i in range(num_test)]
        if paths.images.exists():
            shutil.move(paths.images, Path(partial) / "old-images")
        os.replace(folder, paths.images)
    write_atomically(paths.plain, json.dumps(plain, indent=1).encode())
    write_atomically(paths.v1, json.dumps(v1, indent=1).encode())
    write_atomically(paths.read_test, "".join(json.dumps(row) + "\n" for row in test).encode())
    return paths


def _save(sample: questions.Sample, name: str, folder: Path) -> str:
    file = f"{name}.png"
    Image.fromarray(sample.pixels).save(folder / file, compress_level=1)
    return file


def _turn(human: str, gpt: str) -> list[dict]:
    return [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]


def _plain_row(sample: questions.Sample, name: str, folder: Path) -> dict:
    # llava drops the human's text in stage 1; it is there in the published data as well.
    return {
        "id": name,
        "image": _save(sample, name, folder),
        "conversations": _turn("Provide a brief description of the given image.\n<image>", sample.caption),
    }


def _v1_row(sampler: questions.Sampler, name: str, folder: Path) -> dict:
    sample = sampler.draw()
    if sample.pixels is None:
        return {"id": name, "conversations": _turn(sample.question, sample.answer)}
    turns = _turn(f"<image>\n{sample.question}", sample.answer)
    if sample.kind == "read" and sampler.rng.random() < TWO_TURN_SHARE:
        truth = bool(sampler.rng.integers(2))
        shown = set(sample.text_image.text)
        digit = str(sampler.rng.choice(sorted(shown if truth else set("0123456789") - shown)))
        turns += _turn(questions.existence_question(digit) + questions.SHORT_ANSWER, questions.yes_no(truth))
    return {"id": name, "image": _save(sample, name, folder), "conversations": turns}


def _test_row(sample: questions.Sample, name: str, folder: Path) -> dict:
    return {"image": _save(sample, name, folder), "question": sample.question, "answer": sample.answer}
