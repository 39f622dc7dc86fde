"""Recognising formats, our own JSONL, and writing it."""

import json
from pathlib import Path

import pytest
from PIL import Image

from llava_patch.core.errors import InputError, SettingError
from llava_patch.data.pages import Pages
from llava_patch.data.readers import read_jsonl, read_samples, write_jsonl
from llava_patch.data.readers.read import resolve_source
from llava_patch.probe.sample import Sample, split_samples

from .common import document, page, quad, text


def jsonl(folder, *lines, name="list.jsonl"):
    page(folder / "a.png")
    return text(folder / name, *(line if isinstance(line, str) else json.dumps(line) for line in lines))


LINE = {"image": "a.png", "text": "x", "box": [1, 2, 30, 12]}


def test_jsonl(tmp_path):
    several = {**LINE, "text": "two\u2028parts", "box": [[1, 20, 9, 30], [11, 20, 19.5, 30]], "document": "d"}
    file = jsonl(tmp_path, {**LINE, "note": 5}, "", several, {**LINE, "box": [40, 2, 70, 12]})
    for samples in (read_jsonl(file), read_samples(file), read_samples(str(tmp_path))):
        assert [s.text for s in samples] == ["x", "two\u2028parts", "x"]
        assert [s.id for s in samples] == [f"{file.name}:{n}" for n in (1, 3, 4)]
        assert [s.where for s in samples] == [f"{file}:{n}" for n in (1, 3, 4)]
        assert samples[1].boxes == ((1, 20, 9, 30), (11, 20, 19.5, 30))
        assert [s.document for s in samples] == ["a.png", "d", "a.png"]
        assert samples[0].all_boxes == ((1, 2, 30, 12), (40, 2, 70, 12))  # of all lines of its page
    around = {**LINE, "all_boxes": [[1, 2, 30, 12], [50, 2, 60, 9]]}
    assert read_samples(jsonl(tmp_path, around))[0].all_boxes == ((1, 2, 30, 12), (50, 2, 60, 9))


def test_an_image_is_one_document_however_its_path_is_spelt(tmp_path):
    (tmp_path / "x").mkdir()
    file = jsonl(tmp_path, LINE, {**LINE, "image": "x/../a.png", "box": [40, 2, 70, 12]}, {**LINE, "image": "./a.png"})
    samples = read_jsonl(file)
    assert {s.document for s in samples} == {"a.png"}
    assert {s.all_boxes for s in samples} == {((1, 2, 30, 12), (40, 2, 70, 12))}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ({"image": "a.png", "text": "x"}, "lacks box"),
        ({**LINE, "boxes": [1, 2, 3, 4], "box": None}, "box None"),
        ({"image": "a.png", "text": "x", "boxes": [1, 2, 3, 4]}, "unknown key 'boxes': did you mean 'box'"),
        ({**LINE, "allboxes": []}, "unknown key 'allboxes': did you mean 'all_boxes'"),
        ({**LINE, "image": "no.png"}, "image .*no.png is missing"),
        ({**LINE, "image": "list.jsonl"}, "image .*list.jsonl cannot be read"),
        ({**LINE, "text": None}, "text is None: expected a string"),
        ({**LINE, "box": [1, 2, 3]}, r"box \[1, 2, 3\]"),
        ({**LINE, "box": []}, r"box \[\]"),
        ({**LINE, "box": [[1, 2, 3, 4], [1, 2]]}, r"box \[1, 2\]"),
        ({**LINE, "box": ["1", 2, 3, 4]}, "box"),
        ({**LINE, "box": [5, 2, 5, 4]}, "empty box"),
        ({**LINE, "box": [5, 2, 500, 4]}, "outside its image of 100 x 60"),
        ({**LINE, "all_boxes": [[5, 2, 500, 4]]}, "all_boxes: box .* outside its image"),
        ({**LINE, "all_boxes": 5}, "all_boxes is 5"),
    ],
)
def test_broken_jsonl_lines(tmp_path, line, words):
    file = jsonl(tmp_path, LINE, line)
    with pytest.raises(InputError, match=rf"list.jsonl:2: .*{words}"):
        read_samples(file)
    samples = read_samples(file, broken="skip")
    assert (len(samples), len(samples.skipped)) == (1, 1)


def test_nothing_left_or_nothing_there(tmp_path):
    with pytest.raises(InputError, match=r"list.jsonl: no usable sample"):
        read_samples(jsonl(tmp_path, ""))
    with pytest.raises(InputError, match=r"none.jsonl: no such file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"some/set: no such file or folder .*hf:some/set"):
        read_samples("some/set")


def test_unknown_formats_list_what_is_understood_and_what_was_found(tmp_path):
    text(tmp_path / "a.xml", "<page/>")
    document(tmp_path / "b.json", {"pictures": [], "annotations": []})
    with pytest.raises(InputError, match=r"(?s)found 1 .json, 1 .xml.*jsonl:.*icdar:.*funsd:.*cocotext:.*hf:"):
        read_samples(tmp_path)
    text(tmp_path / "c.txt", "hello there")
    with pytest.raises(InputError, match=r"c.txt: format not recognised; found 1 .txt that opens with 'hello there'"):
        read_samples(tmp_path / "c.txt")


def test_two_formats_need_a_word(tmp_path):
    file = jsonl(tmp_path, LINE)
    text(tmp_path / "a.txt", f"{quad(1, 1, 9, 9)},from text")
    with pytest.raises(InputError, match=r"of several formats, icdar: a.txt \(1 files\); jsonl: .*format="):
        read_samples(tmp_path)
    assert read_samples(f"{tmp_path}?format=icdar")[0].text == "from text"
    assert read_samples(tmp_path, format="jsonl")[0].text == "x"
    joined = read_samples(f"{file}, {tmp_path}/a.txt")
    assert [s.text for s in joined] == ["x", "from text"]
    assert joined.format == "jsonl, icdar"
    text(tmp_path / "more.jsonl", json.dumps(LINE))
    with pytest.raises(InputError, match="2 files of jsonl"):
        read_samples(tmp_path, format="jsonl")
    with pytest.raises(InputError, match=r"format=funsd, but there is no .json"):
        read_samples(tmp_path, format="funsd")


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("fromat=icdar", "'fromat' is no setting of a source: known are format, images"),
        ("icdar", "'icdar' is no setting of a source"),
        ("format=pdf", "format=pdf: expected one of jsonl"),
        ("boxes=100", "boxes=100: expected one of pixels"),
        ("boxes=1000", "settings of Hugging Face datasets"),
        ("images=.", "images is no setting of JSONL"),
        ("broken=", "broken has no value: write broken=VALUE"),
        ("broken=maybe", "broken=maybe: expected one of stop, skip"),
        ("broken=skip&broken=stop", "broken is set twice, to skip and to stop"),
        ("coordinates=4", "coordinates is a setting of SROIE and ICDAR files; this is jsonl"),
    ],
)
def test_settings_of_a_source(tmp_path, query, words):
    file = jsonl(tmp_path, LINE)
    with pytest.raises(SettingError, match=words):
        read_samples(f"{file}?{query}")


def named(samples):
    return [(s.id, s.document) for s in samples]


def test_names_do_not_depend_on_how_a_path_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page(tmp_path / "set" / "img" / "a.png")
    page(tmp_path / "set" / "img" / "b.png")
    text(tmp_path / "set" / "box" / "a.txt", f"{quad(1, 1, 9, 9)},x")
    text(tmp_path / "more" / "list.jsonl", json.dumps({**LINE, "image": "../set/img/b.png"}))
    for one, image in (("set", "img/a.png"), ("set/box", "../img/a.png")):
        found = named(read_samples(one))
        assert found[0][1] == image and not found[0][0].startswith("/")
        assert named(read_samples(tmp_path / one)) == named(read_samples(f"more/../{one}")) == found
        assert read_samples(one)[0].open_image().size == (100, 60)
    two = named(read_samples("set/box,more/list.jsonl"))
    assert two == [("set/box/a.txt:1", "set/img/a.png"), ("more/list.jsonl:1", "set/img/b.png")]
    assert named(read_samples(f"{tmp_path}/set/box,{tmp_path}/more/list.jsonl")) == two
    monkeypatch.chdir(tmp_path / "set")
    assert named(read_samples(".")) == named(read_samples(tmp_path / "set"))
    # What goes wrong later names a file that is there.
    (sample,) = read_samples(".")
    Path("img/a.png").unlink()
    with pytest.raises(InputError, match=r"^box/a.txt:1: image"):
        sample.open_image()


def test_sources_are_the_same_however_their_path_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans").mkdir()
    (tmp_path / "jpg").mkdir()
    for one, other in (
        ("scans", f"{tmp_path}/scans"),
        ("scans?images=jpg", f"{tmp_path}/jpg/../scans?images={tmp_path}/jpg"),
        ("scans,jpg", f"{tmp_path}/scans, {tmp_path}/jpg"),
    ):
        assert resolve_source(one) == resolve_source(other) != resolve_source("jpg")
    assert resolve_source("") == "" and resolve_source("hf:a/b:train") == "hf:a/b:train"


def test_bad_arguments(tmp_path):
    file = jsonl(tmp_path, LINE)
    with pytest.raises(SettingError, match="broken = 'warn'"):
        read_samples(file, broken="warn")
    with pytest.raises(SettingError, match="boxes_per_sample = 0"):
        read_samples(file, boxes_per_sample=0)
    with pytest.raises(InputError, match=r"folder of images .*nowhere: no such folder"):
        read_samples(f"{file}?images=nowhere")


def test_what_is_exported_reads_the_same(tmp_path):
    for name in ("a", "b", "c"):
        page(tmp_path / "scans" / f"{name}.png")
        lines = [f"{quad(1, 10 * i + 1, 9, 10 * i + 9)},{name}, {i}" for i in range(3)]
        text(tmp_path / "scans" / f"{name}.txt", *lines, f"{quad(50, 1, 59, 9)},###")
    for length in (1, 2):
        first = read_samples(tmp_path / "scans", boxes_per_sample=length)
        for out in (tmp_path / "out.jsonl", tmp_path / "elsewhere" / "out.jsonl"):
            again = read_samples(write_jsonl(first, out))
            for a, b in zip(first, again, strict=True):
                assert (a.text, a.boxes, set(a.all_boxes)) == (b.text, b.boxes, set(b.all_boxes))
                assert a.document == b.document
                assert b.image.samefile(a.image)
            held = [[s.text for s in split_samples(part, 0.4, seed=1)[1]] for part in (first, again)]
            assert held[0] == held[1]
    line = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert line["image"] == "scans/a.png"  # the folder can be moved as a whole


def test_pictures_without_a_file_are_written_once(tmp_path):
    picture = Image.new("RGB", (40, 30), (9, 8, 7))
    two = [Sample(picture, t, ((1, 1, 9, 9),), id=f"p:{t}", document="a page") for t in ("one", "two")]
    again = read_samples(write_jsonl([*two, *Pages(2, 56)], tmp_path / "made.jsonl"))
    assert [s.text for s in again][:2] == ["one", "two"]
    assert sorted(p.name for p in (tmp_path / "made_images").iterdir()) == [
        "000000_a_page.png", "000001_page-train-0-0.png", "000002_page-train-0-1.png"
    ]  # fmt: skip
    assert again[0].open_image().getpixel((0, 0)) == (9, 8, 7)


def test_errors_that_can_be_passed_over_say_how_and_the_source_takes_it(tmp_path):
    file = jsonl(tmp_path, LINE, {**LINE, "box": [5, 2, 5, 4]}, {**LINE, "image": "gone.png"})
    with pytest.raises(InputError, match=r"list.jsonl:2: empty box .*\?broken=skip.*--broken skip") as caught:
        read_samples(file)
    assert str(caught.value).count("broken=skip") == 1
    found = read_samples(f"{file}?broken=skip")
    assert (len(found), len(found.skipped)) == (1, 2) and not any("broken=skip" in m for m in found.skipped)
    with pytest.raises(InputError, match=r"list.jsonl:2"):
        read_samples(f"{file}?broken=stop", broken="skip")
    joined = read_samples(f"{file}?broken=skip,{jsonl(tmp_path, LINE, name='sound.jsonl')}")
    assert (len(joined), len(joined.skipped)) == (2, 2)
    page(tmp_path / "coco" / "a.jpg")
    inside = {"id": 1, "image_id": 1, "bbox": [5, 5, 0, 9], "text": "x"}  # an error inside of an error's block
    document(tmp_path / "coco" / "s.json", {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [inside]})
    with pytest.raises(InputError) as caught:
        read_samples(tmp_path / "coco")
    assert str(caught.value).count("broken=skip") == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({**LINE, "box": [1, 2, 10**400, 12]}, "not finite"),
        ('{"image": "a.png", "text": "x", "box": [1, 2, 1e400, 12]}', "not finite"),
        ('{"image": "a.png", "text": "x", "box": [1, 2, ' + "9" * 5000 + ", 12]}", "a number in it cannot be read"),
        ("[" * 100_000, "too deeply"),
        ({**LINE, "text": "a\ud800"}, "text 'a.ud800': '.ud800' at character 1 is half of a surrogate pair"),
        ({**LINE, "image": "\udfff.png"}, "image: '.udfff' at character 0 is half of"),
        ({**LINE, "image": "a\0.png"}, "image is 'a.x00.png': expected the path of a file"),
        ({**LINE, "image": ""}, "image is '': expected the path of a file"),
        ({**LINE, "image": "."}, "is a folder: expected a file"),
        ({**LINE, "image": "x" * 5000}, "is missing"),
        ({**LINE, "document": ["a"]}, "document is .'a'.: expected a string"),
        ({**LINE, "document": "\ud800"}, "document: .*half of a surrogate pair"),
        ({**LINE, "all_boxes": [[1, 2, 10**400, 12]]}, "not finite"),
    ],
)
def test_what_no_number_text_or_path_can_be(tmp_path, line, words):
    file = jsonl(tmp_path, LINE, line)
    with pytest.raises(InputError, match=rf"list.jsonl:2: .*{words}") as caught:
        read_samples(file)
    assert len(str(caught.value)) < 6000 and str(caught.value).isprintable()
    assert len(read_samples(f"{file}?broken=skip")) == 1


def test_an_empty_line_of_our_format_is_nothing_to_read(tmp_path):
    empty = [{**LINE, "text": "", "box": box} for box in (None, [], [0, 0, 0, 0])]
    found = read_samples(jsonl(tmp_path, LINE, *empty))
    assert (len(found), found.unread, len(found[0].all_boxes)) == (1, 3, 1)
    (over,) = read_samples(jsonl(tmp_path, {**LINE, "box": [80, 2, 107, 12], "all_boxes": [[-4, 2, 30, 12]]}))
    assert over.boxes == ((80, 2, 100, 12),) and over.all_boxes == ((0, 2, 30, 12), (80, 2, 100, 12))


def test_bytes_that_are_no_utf8_are_named_by_line(tmp_path):
    file = jsonl(tmp_path, LINE)
    file.write_bytes(file.read_bytes() + b'\n{"text": "\xe9"}\n')
    with pytest.raises(InputError, match=r"list.jsonl:2: not UTF-8: .*save it as UTF-8"):
        read_samples(file)


@pytest.mark.parametrize("source", ["a\0b", "\ud800", "x" * 5000, "nowhere/at/all"])
def test_paths_that_are_none(source):
    for one in (source, f"{source}?format=icdar"):
        with pytest.raises(InputError, match="no such file or folder") as caught:
            read_samples(one)
        assert str(caught.value).isprintable()


def image_bytes(kind: str) -> bytes:
    import struct
    import zlib

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    width, height = {"bomb": (60_000, 60_000), "empty": (0, 5)}[kind]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["bomb", "empty", "nothing", "text", "cut"])
def test_images_that_are_none(tmp_path, kind):
    whole = page(tmp_path / "whole.png").read_bytes()
    made = {"nothing": b"", "text": b"no picture", "cut": whole[:20]}
    file = jsonl(tmp_path, LINE, {**LINE, "image": "bad.png"})
    (tmp_path / "bad.png").write_bytes(made[kind] if kind in made else image_bytes(kind))
    with pytest.raises(InputError, match=r"list.jsonl:2: image .*bad.png cannot be read: "):
        read_samples(file)
    assert len(read_samples(f"{file}?broken=skip")) == 1
