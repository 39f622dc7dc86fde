"""Which image an annotation file is of, where several have its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_patch.core.errors import InputError
from llava_patch.data.readers import read_samples

from .common import document, page, quad, text

LINE = f"{quad(1, 1, 9, 9)},"
TRAIN, TEST = 50, 80  # widths that tell the images apart
ICDAR = {
    "ch4_training_images": "ch4_training_localization_transcription_gt",
    "ch4_test_images": "Challenge4_Test_Task4_GT",
}


def icdar(root: Path, folders: dict[str, str] = ICDAR, prefix: str = "gt_") -> Path:
    """Two sets side by side, whose images have the same names; the second lacks the last."""
    for number, (images, boxes) in enumerate(folders.items()):
        for name in ("img_1", "img_2", "img_10")[: 3 - number]:
            page(root / images / f"{name}.jpg", (TRAIN, TEST)[number])
            text(root / boxes / f"{prefix}{name}.txt", f"{LINE}{images}")
    return root


def widths(samples) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for sample in samples:
        found.setdefault(sample.text, set()).add(sample.open_image().width)
    return found


@pytest.mark.parametrize(
    "folders",
    [
        ICDAR,
        {"trainImages": "trainGT", "testImages": "testGT"},
        {"a_images": "a_boxes", "b_images": "b_boxes"},  # shared words
        {"set1": "boxes1", "set2": "boxes2"},  # shared numbers
        {"some": "these", "more": "those"},  # one-to-one: only the first has a third
        {"images/train": "gt/train", "images/val": "gt/val"},
    ],
)
def test_sets_side_by_side_keep_to_themselves(tmp_path, folders):
    root = icdar(tmp_path / "set", folders)
    first, second = folders
    assert widths(read_samples(root)) == {first: {TRAIN}, second: {TEST}}
    for images, width in ((first, TRAIN), (second, TEST)):  # annotations of one alone
        source = f"{root / folders[images]}{f'?images={root / images}' if '/' in images else ''}"  # too far apart
        assert widths(read_samples(source)) == {images: {width}}
    if "/" not in second:
        assert widths(read_samples(root / folders[second] / "gt_img_1.txt")) == {second: {TEST}}


def test_funsd_side_by_side(tmp_path):
    for split, width in (("training", TRAIN), ("testing", TEST)):
        page(tmp_path / f"{split}_images" / "1.png", width)
        document(tmp_path / f"{split}_annotations" / "1.json", {"form": [{"text": split, "box": [1, 1, 9, 9]}]})
    assert widths(read_samples(tmp_path)) == {"training": {TRAIN}, "testing": {TEST}}


def test_an_image_that_is_missing_is_not_borrowed_from_the_other_set(tmp_path):
    root = icdar(tmp_path)
    (root / "ch4_test_images" / "img_2.jpg").unlink()
    with pytest.raises(InputError, match=r"GT/gt_img_2.txt: its image is missing: .*training_images/img_2.jpg belongs"):
        read_samples(root)
    (root / "ch4_test_images" / "img_1.jpg").unlink()  # nor when all are missing
    with pytest.raises(InputError, match=r"GT/gt_img_1.txt: its image is missing"):
        read_samples(root)
    found = read_samples(root, broken="skip")
    assert widths(found) == {"ch4_training_images": {TRAIN}} and len(found.skipped) == 2


def test_what_stays_ambiguous_names_both_images_and_the_way_out(tmp_path):
    root = icdar(tmp_path, {"some": "these", "more": "those"})
    (root / "some" / "img_10.jpg").unlink()
    (root / "these" / "gt_img_10.txt").unlink()
    with pytest.raises(
        InputError, match=r"these/gt_img_1.txt: which image is it of, .*(some|more)/img_1.jpg or .*\?images=FOLDER"
    ):
        read_samples(root)
    assert widths(read_samples(f"{root}/these?images={root}/some")) == {"some": {TRAIN}}


def test_names_and_numbers_that_disagree_are_ambiguous(tmp_path):
    root = icdar(tmp_path, {"a_images": "b_boxes", "b_images": "a_boxes"})
    with pytest.raises(InputError, match="which image is it of"):
        read_samples(root)


def test_one_image_is_not_read_for_two_folders_of_annotations(tmp_path):
    page(tmp_path / "img" / "1.jpg")
    for folder in ("words", "lines"):
        text(tmp_path / folder / "1.txt", f"{LINE}{folder}")
    with pytest.raises(InputError, match=r"words/1.txt: its image .*img/1.jpg is that of .*lines/1.txt as well: "):
        read_samples(tmp_path)
    assert [s.text for s in read_samples(tmp_path / "words")] == ["words"]


def test_a_link_back_into_its_own_folder_is_not_followed(tmp_path):
    page(tmp_path / "set" / "1.jpg")
    text(tmp_path / "set" / "1.txt", f"{LINE}x")
    (tmp_path / "set" / "again").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    assert [s.text for s in read_samples(tmp_path / "set")] == ["x"]
