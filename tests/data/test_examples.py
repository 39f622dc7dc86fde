"""What measurements are made on: every kind of data, and one clear error for what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_patch.core.errors import InputError
from llava_patch.data.examples import QUESTION, check_data, read_examples


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if i % 2 else "human", "value": value} for i, value in enumerate(values)]


def conversations(folder: Path, records: Any, images: str = ".") -> Path:
    (folder / images).mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 10), "red").save(folder / images / name)
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


RECORDS = [
    {"id": "text", "conversations": turns("only words", "yes")},
    {"id": "one", "image": "a.png", "conversations": turns("<image>\nWhat?", "A", "And?", "B")},
    {"id": "two", "image": ["a.png", "b.png"], "conversations": turns("<image>\n<image>\nWhich?", "C")},
    {"image": "b.png", "conversations": turns("Where?\n<image>", "D")},
]


def test_llavas_conversations(tmp_path: Path) -> None:
    found = read_examples(str(conversations(tmp_path, RECORDS)), answers=True)
    assert [(e.id, e.question, e.answer) for e in found] == [("one", "What?", "A"), ("3", "Where?", "D")]
    assert found[0].open_image().size == (20, 10) and "entry 1" in found[0].where
    assert len(read_examples(str(tmp_path / "data.json"), count=1)) == 1
    assert {e.question for e in read_examples(str(tmp_path / "data.json"), question="Why?")} == {"Why?"}


def test_images_of_conversations_may_be_elsewhere(tmp_path: Path) -> None:
    path = conversations(tmp_path, RECORDS, "pictures")
    with pytest.raises(InputError, match=r"entry 1.*a\.png"):
        read_examples(str(path))[0].open_image()
    found = read_examples(f"{path}?images={tmp_path / 'pictures'}")
    assert found[0].open_image().mode == "RGB"


@pytest.mark.parametrize(
    "broken", [[], [{"from": "human", "value": "x"}], [{"value": 3}, {"value": "x"}], "text", None]
)
def test_conversations_that_cannot_be_read_name_file_and_entry(tmp_path: Path, broken: Any) -> None:
    path = conversations(tmp_path, [RECORDS[1], {"image": "a.png", "conversations": broken}])
    with pytest.raises(InputError, match=r"data\.json: entry 1: conversations: expected a question and an answer"):
        read_examples(str(path))


def test_data_without_a_single_image_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.json: no example with an image"):
        read_examples(str(conversations(tmp_path, RECORDS[:1])))


def test_images_and_folders_of_them_have_no_answer(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert [e.id for e in read_examples(str(tmp_path))] == ["a.jpg", "b.png"]
    (one,) = read_examples(str(tmp_path / "b.png"))
    assert one.question == QUESTION and one.answer == "" and one.open_image().size == (8, 8)
    with pytest.raises(InputError, match=r"a\.jpg: its answer is not known.*transcripts"):
        read_examples(str(tmp_path), answers=True)
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"b\.png"):
        one.open_image()


def test_pages_with_their_text(tmp_path: Path) -> None:
    found = read_examples(count=3, side=28)
    assert len(found) == 3 and all(e.answer and e.question == QUESTION for e in found)
    assert found[0].open_image().size == (56, 56)
    assert [e.id for e in read_examples(count=2, side=28)] == [e.id for e in found[:2]]


def test_boxes_of_one_page_are_one_example(tmp_path: Path) -> None:
    for name in ("p.png", "q.png"):
        Image.new("RGB", (50, 50)).save(tmp_path / name)
    rows = [("p", "TOTAL"), ("p", "4.50"), ("q", "hello")]
    lines = [{"image": f"{page}.png", "box": [1, 1 + 20 * (i % 2), 30, 15 + 20 * (i % 2)], "text": text}
             for i, (page, text) in enumerate(rows)]  # fmt: skip
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read_examples(str(tmp_path / "data.jsonl"), answers=True)
    assert sorted(e.answer for e in found) in (["TOTAL\n4.50", "hello"], ["4.50", "TOTAL", "hello"])


def test_a_number_of_examples_is_spread_over_the_data(tmp_path: Path) -> None:
    for i in range(6):
        Image.new("RGB", (30, 30), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    assert [e.id for e in read_examples(str(tmp_path), 3)] == ["0.png", "2.png", "4.png"]
    assert [e.id for e in read_examples(str(tmp_path), 4)] == ["0.png", "1.png", "3.png", "4.png"]
    assert len(read_examples(str(tmp_path), 7)) == len(read_examples(str(tmp_path))) == 6
    assert {e.question for e in read_examples(str(tmp_path), 2, question="What?")} == {"What?"}


def test_data_that_are_not_there_or_of_no_known_kind(tmp_path: Path) -> None:
    check_data("")  # rendered pages
    with pytest.raises(InputError, match=r"DATA .*gone\.json: no such file or folder"):
        check_data(str(tmp_path / "gone.json"))
    (tmp_path / "odd.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match=r"odd\.json is neither LLaVA's conversation JSON .*format not recognised"):
        check_data(str(tmp_path / "odd.json"))
