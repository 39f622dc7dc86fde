"""Data that readers and measurements meet: damaged, ambiguous, empty, or of no known kind."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

from tests.reliability.place import Call, Place, Row

SKIP = "?broken=skip"
LINE = {"image": "page.png", "text": "x", "box": [1, 2, 30, 12]}
QUAD = "1,1,9,1,9,9,1,9"


def _read(source: Any, **options: Any) -> Call:
    def call() -> Any:
        from llava_patch.data.readers import read_samples

        return read_samples(source, **options)

    return call


def _examples(source: Any) -> Call:
    def call() -> Any:
        from llava_patch.data.examples import check_data

        check_data(str(source))

    return call


def _lines(place: Place, *lines: Any) -> Path:
    place.image()
    return place.file("list.jsonl", "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines))


def jsonl(what: str, line: Any, *says: str) -> Row:
    """A second line of our own format."""
    return Row(
        "JSONL", what, lambda place: place.command("rprobe", "export", _lines(place, LINE, line), "out.jsonl"),
        ("list.jsonl:2", *says, SKIP),
    )  # fmt: skip


def raw(kind: str, what: str, name: str, content: Any, *says: str, query: str = "") -> Row:
    """A file of these bytes, with an image of its name."""

    def make(place: Place) -> Call:
        place.image(str(Path(name).with_suffix(".png")))
        return _read(f"{place.file(name, content)}{query}")

    return Row(kind, what, make, (Path(name).name, *says))


def icdar(what: str, line: str, *says: str, query: str = "", size: tuple[int, int] = (100, 60)) -> Row:
    """A second line of an ICDAR file."""

    def make(place: Place) -> Call:
        place.image("set/p.png", size)
        place.file("set/p.txt", f"{QUAD},fine\n{line}" if "coordinates" not in says[-1] else line)
        return place.command("rprobe", "export", f"{place.root}/set{query}", "out.jsonl")

    return Row("ICDAR", what, make, ("p.txt:", *says))


def funsd(what: str, entry: Any, *says: str) -> Row:
    def make(place: Place) -> Call:
        place.image("images/0a.png")
        place.file("annotations/0a.json", {"form": [entry]} if isinstance(entry, (dict, int)) else entry)
        return _read(place.root)

    return Row("FUNSD", what, make, ("0a.json", *says))


def coco(what: str, changes: dict[str, Any], *says: str) -> Row:
    def make(place: Place) -> Call:
        place.image("a.png")
        values = {
            "images": [{"id": 7, "file_name": "a.png"}],
            "annotations": [{"id": 9, "image_id": 7, "bbox": [1, 2, 20, 10], "text": "x"}],
        }
        return _read(place.file("set.json", values | changes))

    return Row("COCO", what, make, ("set.json", *says))


def ann(what: str, fields: dict[str, Any], *says: str) -> Row:
    return coco(what, {"annotations": [{"id": 9, "image_id": 7, "text": "x", **fields}]}, "annotations[9]", *says, SKIP)


def picture(what: str, content: bytes, *says: str) -> Row:
    def make(place: Place) -> Call:
        file = _lines(place, LINE, {**LINE, "image": "bad.png"})
        place.file("bad.png", content)
        return place.command("rprobe", "preview", file, "--output", "look")

    return Row("images", what, make, ("list.jsonl:2: image", "bad.png cannot be read", *says))


def _png(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def turned(place: Place) -> Call:
    from PIL import Image

    exif = Image.Exif()
    exif[274] = 6
    place.root.mkdir(exist_ok=True)
    Image.new("RGB", (100, 60)).save(place.root / "p.jpg", exif=exif)
    place.file("p.txt", "70,10,95,16,word")
    return _read(place.root)


def sides(place: Place) -> Call:
    """Two sets side by side that nothing tells apart."""
    for images, boxes in (("some", "these"), ("more", "those")):
        place.image(f"set/{images}/img_1.jpg")
        place.file(f"set/{boxes}/gt_img_1.txt", f"{QUAD},x")
    return _read(place.root / "set")


def borrowed(place: Place) -> Call:
    place.image("set/ch4_training_images/img_1.jpg")
    place.file("set/Challenge4_Test_Task4_GT/gt_img_1.txt", f"{QUAD},x")
    return _read(place.root / "set")


def shared(place: Place) -> Call:
    place.image("set/img/1.jpg")
    for folder in ("words", "lines"):
        place.file(f"set/{folder}/1.txt", f"{QUAD},x")
    return _read(place.root / "set")


def two_suffixes(place: Place) -> Call:
    place.image("1.jpg")
    place.image("1.png")
    place.file("1.txt", f"{QUAD},x")
    return _read(place.root)


def no_image(place: Place) -> Call:
    place.image("a.png")
    place.file("a.txt", f"{QUAD},x")
    place.file("b.txt", f"{QUAD},x")
    return _read(place.root)


def locked(place: Place) -> Call:
    """An image that is a folder."""
    (place.root / "set" / "a.png").mkdir(parents=True)
    return _read(place.file("set/list.jsonl", {**LINE, "image": "a.png"}))


def several(place: Place) -> Call:
    _lines(place, LINE)
    place.file("more.jsonl", LINE)
    return _read(place.root)


def mixed(place: Place) -> Call:
    _lines(place, LINE)
    place.file("page.txt", f"{QUAD},x")
    return _read(place.root)


def nothing_usable(place: Place) -> Call:
    return _read(_lines(place, "{", "["), broken="skip")


def conversations(what: str, record: Any, *says: str) -> Row:
    def make(place: Place) -> Call:
        place.image("a.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A"}]
        sound = {"id": "0", "image": "a.png", "conversations": turns}
        broken = {**sound, **record} if isinstance(record, dict) else record
        return _examples(place.file("data.json", [broken, sound]))

    return Row("conversations", what, make, ("data.json: entry 0", *says))


def setting(what: str, query: str, *says: str) -> Row:
    return Row("settings of a source", what, lambda place: _read(f"{_lines(place, LINE)}?{query}"), says)


def dataset(what: str, columns: dict[str, Any], *says: str) -> Row:
    def make(place: Place) -> Call:
        import datasets

        place.image("p.png", (100, 60))
        datasets.Dataset.from_dict({"image_path": ["p.png"], **columns}).to_parquet(str(place.root / "x.parquet"))
        return _read(place.root / "x.parquet")

    return Row("HF datasets", what, make, ("x.parquet", *says))


def long_question(place: Place) -> Call:
    place.image("a.png")
    data = place.root / "a.png"
    return place.command("saturation", place.stock(), data, "--samples", 1, "--question", "a word " * 75_000)


def refused_image(place: Place) -> Call:
    """An image that a processor cannot take, whatever its version."""
    place.image("dot.png", (1, 1))

    def call() -> Any:
        from unittest import mock

        from llava_patch.data.inputs import Inputs
        from llava_patch.data.target import Target

        def refuses(*args: Any, **options: Any) -> Any:
            raise ValueError("mean must have 1 elements")

        target = Target(str(model), str(place.root / "dot.png"), device="cpu")
        inputs = target.subject.inputs()
        stub = mock.Mock(side_effect=refuses, chat_template=None)
        spoilt = Inputs(inputs.anatomy, inputs.tokenizer, inputs.image_processor, stub)
        with mock.patch.object(type(target.subject), "inputs", lambda self: spoilt):
            return target.samples(1)[0]

    model = place.stock()
    return call


def window(what: str, *says: str, mode: str = "window", height: str) -> Row:
    """A look at windows that cannot be."""

    def make(place: Place) -> Call:
        return place.command("rprobe", "preview", _lines(place, LINE), "--image-mode", mode, "--text-height", height)

    return Row("windows", what, make, says)


def hidden_inside(place: Place) -> Call:
    """An image that breaks off behind its header, found when it is opened."""
    file = _lines(place, LINE, {**LINE, "image": "cut.png"})
    from PIL import Image

    Image.effect_noise((64, 64), 90).save(place.root / "cut.png")
    place.cut(place.root / "cut.png")
    return place.command("rprobe", "preview", file, "--samples", 1)


def weird_name(place: Place) -> Call:
    """A file's name that is no UTF-8."""
    image = os.fsencode(place.image("a.png"))
    os.rename(image, image.replace(b"a.png", b"a\xe9.png"))
    (place.root / os.fsdecode(b"a\xe9.txt")).write_text(f"{QUAD},x")
    return _read(place.root)


ROWS = [
    # --- our own format
    jsonl("half an object", '{"image": "page.png"', "not JSON"),
    jsonl("a list", "[]", "expected an object"),
    jsonl("too deep", "[" * 100_000, "too deeply", "write them flat"),
    jsonl("an integer of 5,000 digits", '{"image": "page.png", "text": "x", "box": [1, 2, ' + "9" * 5000 + ", 4]}",
          "a number in it cannot be read"),
    jsonl("10**400 as a box", {**LINE, "box": [1, 2, 10**400, 12]}, "not finite", "[x0, y0, x1, y1]"),
    jsonl("1e400 as a box", '{"image": "page.png", "text": "x", "box": [1, 2, 1e400, 12]}', "not finite"),
    jsonl("NaN as a box", {**LINE, "box": [1, 2, float("nan"), 12]}, "not finite"),
    jsonl("infinity around", {**LINE, "all_boxes": [[1, 2, float("inf"), 12]]}, "not finite"),
    jsonl("true as a number", {**LINE, "box": [True, 2, 30, 12]}, "expected [x0, y0, x1, y1]"),
    jsonl("a box of three", {**LINE, "box": [1, 2, 3]}, "expected [x0, y0, x1, y1]"),
    jsonl("a box without area", {**LINE, "box": [5, 2, 5, 12]}, "empty box", "expected x0 < x1"),
    jsonl("a box far outside", {**LINE, "box": [500, 2, 530, 12]}, "outside its image of 64 x 48"),
    jsonl("a box mostly outside", {**LINE, "box": [5, 2, 500, 12]}, "outside its image", "copy of another size"),
    jsonl("a lone surrogate as text", {**LINE, "text": "a\ud800"}, "text", "surrogate", "write the text anew"),
    jsonl("a lone surrogate as a path", {**LINE, "image": "\udfff.png"}, "image", "surrogate"),
    jsonl("a lone surrogate as document", {**LINE, "document": "\udfff"}, "document", "surrogate"),
    jsonl("a NUL in a path", {**LINE, "image": "a\0.png"}, "image is", "expected the path of a file"),
    jsonl("an empty path", {**LINE, "image": ""}, "image is ''", "expected the path of a file"),
    jsonl("a path of 5,000 characters", {**LINE, "image": "x" * 1500}, "is missing"),
    jsonl("a folder as image", {**LINE, "image": "."}, "is a folder: expected a file"),
    jsonl("an image that is not there", {**LINE, "image": "gone.png"}, "gone.png is missing"),
    jsonl("text that is a number", {**LINE, "text": 5}, "text is 5", "expected a string"),
    jsonl("a misspelt key", {"image": "page.png", "text": "x", "bbox": [1, 2, 3, 4]}, "did you mean 'box'"),
    raw("JSONL", "an empty file", "e.jsonl", "", "no usable sample"),
    raw("JSONL", "bytes that are no UTF-8", "e.jsonl", b'{"a": 1}\n\xff\xfe\n', "e.jsonl:2", "save it as UTF-8"),
    Row("JSONL", "an image that is a folder", locked, ("list.jsonl:1", "is a folder: expected a file", SKIP)),
    Row("JSONL", "two files in a folder", several, ("list.jsonl", "more.jsonl", "name one of them")),
    Row("JSONL", "nothing usable", nothing_usable, ("no usable sample", "2 things skipped", "list.jsonl:1")),
    # --- images
    picture("an empty file", b"", "identify"),
    picture("text", b"no picture", "identify"),
    picture("cut short in its header", _png(4, 4)[:20], "cannot"),
    picture("without pixels", _png(0, 5), "identify"),
    picture("a decompression bomb", _png(60_000, 60_000), "scale it down"),
    Row("images", "cut off behind its header", hidden_inside, ("list.jsonl:2: image", "cut.png cannot be read", SKIP)),
    Row("images", "turned by EXIF under stored boxes", turned, ("p.txt:1", "orientation is 6", "?exif=stored", SKIP)),
    Row("images", "a name that is no UTF-8", weird_name, ("surrogate", "rename the file", SKIP)),
    Row("images", "refused by the processor", refused_image, ("dot.png", "1 x 1 pixels", "leave it out")),
    # --- SROIE and ICDAR
    icdar("seven coordinates", "1,2,3,4,5,6,7,word", "2:", "7 coordinates, then 'word'", SKIP),
    icdar("no numbers", "nothing", "2:", "does not open with numbers", SKIP),
    icdar("a box without area", "5,5,5,5,5,9,5,9,word", "2:", "empty box", SKIP),
    icdar("1e400", "1,1,1e400,1,9,9,1,9,x", "2:", "not finite", SKIP),
    icdar("far outside", "500,1,590,1,590,9,500,9,x", "2:", "outside its image of 100 x 60", SKIP),
    icdar("eight or four coordinates", "10,5,60,20,58,35,8,20", "1:", "?coordinates=8 or ?coordinates=4"),
    icdar("four said of eight", f"{QUAD},x", "1:", "empty box", query="?coordinates=4"),
    Row("ICDAR", "two sets side by side that nothing tells apart", sides,
        ("gt_img_1.txt", "some/img_1.jpg", "more/img_1.jpg", "give one subfolder", "?images=FOLDER")),
    Row("ICDAR", "images of the other set alone", borrowed,
        ("Challenge4_Test_Task4_GT/gt_img_1.txt", "its image is missing", "ch4_training_images", "?images=FOLDER")),
    Row("ICDAR", "two annotations of an image", shared, ("words/1.txt", "lines/1.txt as well", "give one subfolder")),
    Row("ICDAR", "two images of a name", two_suffixes, ("1.txt", "1.jpg", "1.png", "which image")),
    Row("ICDAR", "an annotation without an image", no_image, ("b.txt", "its image is missing", "?images=FOLDER", SKIP)),
    # --- FUNSD
    funsd("a number as entry", 5, "form[0]", "expected an object", SKIP),
    funsd("text without a box", {"text": "x"}, "form[0]", "lacks box", SKIP),
    funsd("text with an empty box", {"text": "x", "box": []}, "form[0]", "expected [x0, y0, x1, y1]", SKIP),
    funsd("10**400", {"text": "x", "box": [1, 2, 10**400, 9]}, "form[0]", "not finite", SKIP),
    funsd("words that are numbers", {"words": [5]}, "form[0]", "words has 5", SKIP),
    funsd("a lone surrogate", {"text": "\ud800", "box": [1, 2, 9, 9]}, "form[0]", "surrogate", SKIP),
    funsd("cut off", '{"form": [\n{"text":', "0a.json:2", "not JSON", SKIP),
    funsd("no form", '{"form": {}}', 'expected {"form": [...]}', SKIP),
    raw("FUNSD", "too deep", "0a.json", '{"form": ' + "[" * 100_000, "too deeply", query="?format=funsd"),
    raw("FUNSD", "empty", "0a.json", "", "empty: expected JSON", query="?format=funsd"),
    raw("FUNSD", "bytes that are no UTF-8", "0a.json", b'{"form":\n\xff}', "0a.json:2", "save it as UTF-8"),
    # --- COCO
    ann("1e400 as a box", {"bbox": [1, 2, 1e308 * 10, 5]}, "not finite"),
    ann("10**400 as points", {"points": [1, 2, 10**400, 5, 6, 7]}, "neither a bbox nor points"),
    ann("no box", {}, "neither a bbox nor points"),
    ann("far outside", {"bbox": [500, 2, 20, 5]}, "outside its image"),
    coco("a path with NUL", {"images": [{"id": 7, "file_name": "a\0.png"}]}, "images[7]", "expected the path", SKIP),
    coco("a path that is a list", {"images": [{"id": 7, "file_name": ["a"]}]}, "images[7]", "expected a string", SKIP),
    coco("another size", {"images": [{"id": 7, "file_name": "a.png", "width": 10**400, "height": 5}]}, "images[7]",
         "boxes would not fit", SKIP),
    coco("infinitely wide", {"images": [{"id": 7, "file_name": "a.png", "width": 1e308 * 10, "height": 5}]},
         "images[7]", "expected numbers of pixels", SKIP),
    coco("an image that is not there", {"images": [{"id": 7, "file_name": "b.png"}]}, "b.png is missing", SKIP),
    coco("an id twice", {"images": [{"id": 7}, {"id": 7}]}, "images[1]", "the id 7 is there twice"),
    # --- HF datasets
    dataset("as many boxes as words", {"words": [["a", "b"]], "boxes": [[[1, 2, 9, 9]]]}, "words has 2 values", SKIP),
    dataset("no boxes", {"words": [["a"]]}, "no box column among image_path, words"),
    dataset("thousandths or pixels", {"words": [["a"]], "boxes": [[[1, 2, 900, 9]]]}, "?boxes=1000", "?boxes=pixels"),
    raw("HF datasets", "a parquet file that is none", "x.parquet", b"PAR1 no", "datasets cannot load it"),
    raw("HF datasets", "a folder without a table", "set/readme.md", "x", "datasets cannot load it", query="?format=hf"),
    # --- LLaVA's conversations
    conversations("a number", 5, "expected a question and an answer", SKIP),
    conversations("no answer", {"conversations": [{"value": "x"}]}, "expected a question and an answer", SKIP),
    conversations("a lone surrogate as question", {"conversations": [{"value": "\ud800"}, {"value": "x"}]}, "question",
                  "surrogate", SKIP),
    conversations("a NUL in a path", {"image": "a\0.png"}, "expected the path of a file", SKIP),
    conversations("an image that is not there", {"image": "gone.png"}, "gone.png cannot be read: it is missing", SKIP),
    Row("conversations", "a question of 150,000 words", long_question, ("tokens", "positions", "shorten", "a.png")),
    # --- windows
    window("text of no height", "RProbe.text_height = 0", "a number above 0", height="0"),
    window("text of infinite height", "RProbe.text_height = inf", "a finite number", height="inf"),
    window("text that is higher than the tower", "RProbe.text_height = 25", "24 tokens high", "ask for less",
           height="25"),
    window("a height without a window", "RProbe.text_height = 2", 'image_mode = "window"', mode="pad", height="2"),
    # --- sources
    setting("an unknown setting", "fromat=icdar", "'fromat' is no setting of a source", "coordinates"),
    setting("an unknown format", "format=pdf", "format=pdf", "expected one of"),
    setting("an unknown way", "broken=maybe", "broken=maybe", "expected one of stop, skip"),
    setting("EXIF that is neither", "exif=on", "exif=on", "expected one of displayed, stored"),
    setting("coordinates of JSONL", "coordinates=4", "coordinates", "SROIE and ICDAR"),
    setting("no value", "broken=", "broken has no value", "broken=VALUE"),
    setting("two values", "broken=skip&broken=stop", "set twice"),
    setting("images of JSONL", "images=.", "images is no setting of JSONL"),
    Row("sources", "nothing there", lambda place: place.command("rprobe", "preview", "gone"), ("gone", "hf:gone")),
    Row("sources", "a NUL in the path", lambda place: _read("a\0b"), ("no such file or folder", "a\\x00b")),
    Row("sources", "a path of 5,000 characters", lambda place: _read("x" * 5000), ("no such file or folder",)),
    Row("sources", "a surrogate", lambda place: _examples("\ud800"), ("no such file or folder", "\\ud800")),
    Row("sources", "two formats", mixed, ("list.jsonl", "page.txt", "?format=")),
    Row("sources", "an empty folder", lambda place: _read(place.root), ("format not recognised", "found nothing")),
    raw("sources", "no format", "notes.txt", "hello", "format not recognised", "?format=NAME"),
]  # fmt: skip
