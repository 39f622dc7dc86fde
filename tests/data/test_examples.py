"""What measurements are made on: every kind of data, and one clear error for what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_patch.core.errors import InputError, SettingError
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


def test_what_cannot_be_used_is_left_out_where_the_source_says_so(tmp_path: Path, caplog: Any) -> None:
    """Broken entries and images that break off behind their header; what is chosen stays spread over the data."""
    sound = {"image": "a.png", "conversations": turns("<image>\nWhat?", "A")}
    records = [
        {"id": "gone", **sound, "image": "gone.png"}, {"id": "cut", **sound, "image": "cut.png"},
        {"id": "one", **sound}, {"id": "odd", "image": "a.png", "conversations": 5}, {"id": "two", **sound},
    ]  # fmt: skip
    path = conversations(tmp_path, records)
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-900])
    with pytest.raises(InputError, match=r"data.json: entry 3: conversations: .*\?broken=skip"):
        read_examples(str(path))
    assert [e.id for e in read_examples(f"{path}?broken=skip")] == ["one", "two"]
    assert "3 things left out (?broken=skip); the first: " in caplog.text and "entry 3" in caplog.text
    assert [e.id for e in read_examples(f"{path}?broken=skip", 1)] == ["one"]
    check_data(f"{path}?broken=skip")
    for name in ("gone", "cut", "odd"):
        path.write_text(json.dumps([r for r in records if r["id"] == name]))
        with pytest.raises(InputError, match="no example with an image in it"):
            read_examples(f"{path}?broken=skip")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "pictures" / "b.png")
    (tmp_path / "pictures" / "a.png").write_bytes(b"no picture")
    assert [e.id for e in read_examples(f"{tmp_path / 'pictures'}?broken=skip")] == ["b.png"]
    with pytest.raises(InputError, match=r"a\.png: image .* cannot be read"):
        check_data(str(tmp_path / "pictures"))  # before a model is loaded


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"image": "\ud800.png"}, r"entry 0: image: .*half of a surrogate pair"),
        ({"image": "a\0.png"}, r"entry 0: image is 'a.x00.png': expected the path of a file"),
        ({"conversations": turns("x\udc00", "y")}, r"entry 0: question: .*half of a surrogate pair"),
        ({"conversations": turns("x", "\ud800")}, r"entry 0: answer: .*half of a surrogate pair"),
        ({"id": "\ud800"}, r"entry 0: id: .*half of a surrogate pair"),
        ({"conversations": {"0": "x"}}, r"entry 0: conversations: expected a question and an answer"),
    ],
)
def test_entries_that_cannot_be_used_are_named(tmp_path: Path, record: Any, words: str) -> None:
    path = conversations(tmp_path, [{"image": "a.png", "conversations": turns("x", "y"), **record}])
    with pytest.raises(InputError, match=words):
        read_examples(str(path))


def test_files_that_are_no_conversations(tmp_path: Path) -> None:
    path = conversations(tmp_path, [5, RECORDS[1]])
    with pytest.raises(InputError, match=r"data\.json: entry 0: conversations"):
        read_examples(str(path))
    with pytest.raises(InputError, match=r"folder of images nowhere: no such folder"):
        read_examples(f"{path}?images=nowhere")
    with pytest.raises(SettingError, match=r"exif: LLaVA's conversation JSON has no boxes"):
        read_examples(f"{path}?exif=stored")
    for content, words in (("", "empty: expected JSON"), ("[" * 100_000, ".*too deeply"), ("[1,", "not JSON")):
        path.write_text(content)
        with pytest.raises(InputError, match=rf"data\.json: {words}"):
            read_examples(str(path))
    for source in ("a\0b", "x" * 5000):
        with pytest.raises(InputError, match="no such file or folder"):
            read_examples(source)


def test_a_rotated_scan_is_shown_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_examples(str(tmp_path))[0].open_image().size == (20, 40)
