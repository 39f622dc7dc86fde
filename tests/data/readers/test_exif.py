"""Scans that EXIF turns: in every format the text under a box is where the box says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_patch.core.errors import InputError, SettingError
from llava_patch.data.readers import read_samples, write_jsonl

from .common import document, quad, text

STORED = (100, 60)  # width, height
BOX = (20, 10, 80, 16)  # the one dark place on the stored pixels
FORMATS = ("icdar", "sroie", "funsd", "cocotext", "jsonl", "hf")


def scan(path: Path, orientation: int) -> Path:
    """A page of stored pixels whose `BOX` is black; dots around it tell the four sides apart."""
    pixels = np.full((STORED[1], STORED[0], 3), 255, np.uint8)
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 0
    exif = Image.Exif()
    exif[274] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def displayed(orientation: int) -> tuple[int, ...]:
    """Where the box lies for a viewer, looked up by eye: the picture is turned by PIL and the dark place is found."""
    with Image.open(scan(Path("look.png"), orientation)) as image:
        from PIL import ImageOps

        dark = np.asarray(ImageOps.exif_transpose(image).convert("L")) < 128
    ys, xs = dark.any(1).nonzero()[0], dark.any(0).nonzero()[0]
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def data(folder: Path, format: str, orientation: int, box: Any, size: tuple[int, int]) -> str:
    """One page of a format with one region."""
    scan(folder / "a.png", orientation)
    x0, y0, x1, y1 = (float(v) for v in box)
    if format in ("icdar", "sroie"):
        line = f"{quad(x0, y0, x1, y1)},word" if format == "sroie" else f"{x0},{y0},{x1},{y1},word"
        text(folder / "a.txt", line)
    elif format == "funsd":
        document(folder / "a.json", {"form": [{"text": "word", "box": [x0, y0, x1, y1]}]})
    elif format == "cocotext":
        image = {"id": 1, "file_name": "a.png", "width": size[0], "height": size[1]}
        ann = {"id": 1, "image_id": 1, "bbox": [x0, y0, x1 - x0, y1 - y0], "text": "word"}
        document(folder / "set.json", {"images": [image], "annotations": [ann]})
    elif format == "jsonl":
        text(folder / "list.jsonl", json.dumps({"image": "a.png", "text": "word", "box": [x0, y0, x1, y1]}))
    else:
        datasets = pytest.importorskip("datasets")
        made = datasets.Dataset.from_dict({"image": [str(folder / "a.png")], "words": [["word"]], "boxes": [[box]]})
        made.cast_column("image", datasets.Image()).save_to_disk(folder / "set")
        return str(folder / "set")
    return str(folder)


def dark(sample: Any) -> bool:
    """Whether a sample's box holds the dark place and nothing else."""
    ((x0, y0, x1, y1),) = sample.boxes
    pixels = np.asarray(sample.open_image().convert("L"))
    return bool((pixels[int(y0) : int(y1), int(x0) : int(x1)] < 128).all()) and int((pixels < 128).sum()) == 360


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("format", FORMATS)
def test_the_text_is_where_the_box_says(tmp_path, monkeypatch, format, orientation):
    monkeypatch.chdir(tmp_path)
    shown = STORED if orientation < 5 else STORED[::-1]
    seen = data(tmp_path / "seen", format, orientation, displayed(orientation), shown)
    kept = data(tmp_path / "kept", format, orientation, BOX, STORED)
    for source in (seen, f"{seen}?exif=displayed", f"{kept}?exif=stored"):
        (sample,) = read_samples(source)
        assert dark(sample) and sample.boxes == sample.all_boxes == (tuple(map(float, displayed(orientation))),)
        (again,) = read_samples(write_jsonl([sample], tmp_path / "out.jsonl"))
        assert dark(again)


def test_boxes_that_fit_the_other_way_round_are_told_of_the_option(tmp_path):
    source = data(tmp_path / "set", "icdar", 6, BOX, STORED)  # stored boxes reach beyond the displayed 60 pixels
    text(tmp_path / "set" / "a.txt", "62,10,98,16,word")
    with pytest.raises(InputError, match=r"a.txt:1: .*outside its image of 60 x 100 .*orientation is 6.*exif=stored"):
        read_samples(source)
    assert read_samples(f"{source}?exif=stored")[0].boxes == ((44, 62, 50, 98),)
    text(tmp_path / "set" / "a.txt", "10,62,16,98,word")
    with pytest.raises(InputError, match=r"outside its image of 100 x 60 .*leave \?exif=stored out"):
        read_samples(f"{source}?exif=stored")


def test_sizes_in_coco_files_tell_stored_from_displayed(tmp_path):
    source = data(tmp_path / "set", "cocotext", 6, BOX, STORED)
    with pytest.raises(InputError, match=r"has 60 x 100 pixels, its annotation says 100 x 60: .*exif=stored"):
        read_samples(source)
    assert dark(read_samples(f"{source}?exif=stored")[0])


def test_unknown_values_and_shares_of_a_turned_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = data(tmp_path / "set", "icdar", 6, BOX, STORED)
    with pytest.raises(SettingError, match="exif=on: expected one of displayed, stored"):
        read_samples(f"{source}?exif=on")
    thousandths = [200, 166.66666, 800, 266.66666]  # of the stored width and height
    kept = data(tmp_path / "hf", "hf", 6, thousandths, STORED)
    (sample,) = read_samples(f"{kept}?boxes=1000&exif=stored")
    assert sample.boxes[0] == pytest.approx(displayed(6), abs=1e-3)
