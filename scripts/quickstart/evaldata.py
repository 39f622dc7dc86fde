"""Small POPE and MME data sets on disk, in the columns of the published ones, with images of our own.

lmms-eval's stock tasks `pope` and `mme` name their data by a relative repository name. Started in a folder that holds
that path, they load it from there, offline and under their own names.

    python -m quickstart.evaldata WORKDIR
    cd WORKDIR && lmms-eval --tasks pope,mme …
"""

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from . import questions, render

DEFAULT_NAMESPACE = "lmms-lab-encoder"  # of lmms-eval 0.7; 0.5 has "lmms-lab"
POPE_CATEGORIES = ("adversarial", "popular", "random")
MME_SUFFIX = " Please answer yes or no."
SHARD = "test-00000-of-00001.parquet"


def pope_rows(rng: np.random.Generator, rows_per_category: int = 8) -> list[dict]:
    """POPE rows: is an object there, half yes, half no.

    As in POPE, the absent object is one that is easily confused with what is there (adversarial), one that is
    frequent in the data (popular), or one of another sort (random: an object on an image of digits, a digit on a
    photograph). Every fourth pair is about a photograph.

    Args:
        rng: source of randomness.
        rows_per_category: an even number.
    """
    _check_even("rows_per_category", rows_per_category)
    sampler = questions.Sampler(rng, held_out=True)
    rows = []
    for category in POPE_CATEGORIES:
        for pair in range(rows_per_category // 2):
            sample = sampler.draw_image(photo=pair % 4 == 3)
            present, absent = _present_and_absent(sample, category, rng)
            source = f"QUICKSTART_{category}_{pair:04d}"
            for noun, answer in ((present, "yes"), (absent, "no")):
                number = str(len(rows))
                question = questions.existence_question(noun)
                row = {"id": number, "question_id": number, "question": question, "answer": answer}
                rows.append({**row, "image_source": source, "image": sample.pixels, "category": category})
    return rows


def _present_and_absent(sample: questions.Sample, category: str, rng: np.random.Generator) -> tuple[str, str]:
    """Something the image shows, and something it does not."""
    words = sorted(render.photographs())
    if sample.photo is not None:
        absent = list("0123456789") if category == "random" else [word for word in words if word != sample.photo]
        return sample.photo, str(rng.choice(absent))
    text = sample.text_image.text
    absent = [digit for digit in "0123456789" if digit not in text]
    if category == "random":
        absent = words
    elif category == "adversarial":
        # Not every string has a look-alike that it lacks; then any absent digit has to do.
        absent = [d for d in absent if any(questions.LOOKALIKE[c] == d for c in text)] or absent
    else:
        absent = [digit for digit in "0123" if digit in absent] or absent
    return str(rng.choice(list(text))), str(rng.choice(absent))


def mme_rows(rng: np.random.Generator, images_per_category: int = 4) -> list[dict]:
    """MME rows: two questions an image, one answered yes and one no, in two perception and one cognition category.

    Args:
        rng: source of randomness.
        images_per_category: each gives two rows.
    """
    if images_per_category < 1:
        raise ValueError(f"images_per_category must be at least 1, not {images_per_category}")
    sampler = questions.Sampler(rng, held_out=True)
    rows = []
    for category in ("existence", "OCR", "numerical_calculation"):
        for number in range(images_per_category):
            sample = sampler.draw_image(photo=category == "existence" and number % 2 == 1)
            for question, answer in _mme_pair(sample, category, rng):
                row = {"question_id": f"{category}/{number:04d}.png", "image": sample.pixels}
                rows.append({**row, "question": question + MME_SUFFIX, "answer": answer, "category": category})
    return rows


def _mme_pair(sample: questions.Sample, category: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    if category == "existence":
        present, absent = _present_and_absent(sample, "random", rng)
        return [
            (questions.existence_question(noun, this=True), yes) for noun, yes in ((present, "Yes"), (absent, "No"))
        ]
    text = sample.text_image.text
    if category == "OCR":
        asked = ((text, "Yes"), (questions.near_miss(text, rng), "No"))
        return [(questions.ocr_question(string), answer) for string, answer in asked]
    greater = int(text) > 499
    return [
        (questions.compare_question(), questions.yes_no(greater)),
        (questions.compare_question(less=True), questions.yes_no(not greater)),
    ]


def write_evaldata(
    workdir: str | os.PathLike,
    *,
    rows_per_category: int = 8,
    images_per_category: int = 4,
    namespace: str = DEFAULT_NAMESPACE,
    seed: int = 0,
) -> dict[str, Path]:
    """Writes both data sets as one parquet shard each.

    Args:
        workdir: the folder lmms-eval is to be started in.
        rows_per_category: of POPE's three categories, an even number.
        images_per_category: of MME's three categories, two rows each.
        namespace: first part of the repository names.
        seed: of everything random.

    Returns:
        "POPE" and "MME" -> path of the shard.
    """
    root = Path(workdir).resolve() / namespace
    return {
        "POPE": _write_parquet(pope_rows(np.random.default_rng([seed, 11]), rows_per_category), root / "POPE"),
        "MME": _write_parquet(mme_rows(np.random.default_rng([seed, 12]), images_per_category), root / "MME"),
    }


def shards(workdir: Path, namespace: str = DEFAULT_NAMESPACE) -> list[Path]:
    """Where `write_evaldata` writes both data sets."""
    return [workdir / namespace / name / "data" / SHARD for name in ("POPE", "MME")]


def _write_parquet(rows: list[dict], folder: Path) -> Path:
    import datasets

    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns["image"] = [Image.fromarray(pixels) for pixels in columns["image"]]
    features = {name: datasets.Value("string") for name in columns} | {"image": datasets.Image()}
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    path = folder / "data" / SHARD
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
        fresh = Path(partial) / SHARD
        dataset.to_parquet(fresh)
        os.replace(fresh, path)
    return path


def _check_even(name: str, value: int) -> None:
    if value < 2 or value % 2:
        raise ValueError(f"{name} must be even and at least 2, not {value}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path, help="folder to start lmms-eval in")
    parser.add_argument("--namespace", default=DEFAULT_NAMESPACE, help="first part of the data sets' names")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, path in write_evaldata(args.workdir, namespace=args.namespace, seed=args.seed).items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    main()
