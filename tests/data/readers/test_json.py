"""FUNSD, COCO-Text and TextOCR."""

import pytest

from llava_patch.core.errors import InputError
from llava_patch.data.readers import read_samples

from .common import document, page, text

FORM = [
    {"id": 0, "box": [1, 2, 30, 12], "text": "Weight:", "words": [{"box": [1, 2, 30, 12], "text": "Weight:"}]},
    {"id": 1, "box": [40, 2, 70, 12], "text": "", "words": []},
    {
        "id": 2,
        "words": [{"box": [1, 20, 10, 30], "text": "12"}, {"box": [12, 21, 30, 33], "text": "kg"}],
    },
]


def funsd(folder, form=FORM):
    page(folder / "images" / "0a.png")
    return document(folder / "annotations" / "0a.json", {"form": form})


def test_funsd_entries(tmp_path):
    file = funsd(tmp_path / "training_data")
    for source in (tmp_path, file, file.parent):
        samples = read_samples(source)
        assert [(s.text, s.boxes) for s in samples] == [
            ("Weight:", ((1, 2, 30, 12),)),
            ("12 kg", ((1, 20, 30, 33),)),
        ]
        assert [s.where for s in samples] == [f"{file}:form[0]", f"{file}:form[2]"]
        assert samples[0].all_boxes == ((1, 2, 30, 12), (40, 2, 70, 12), (1, 20, 30, 33))
        assert (samples.format, samples.unread) == ("funsd", 1)
        assert samples[0].open_image().size == (100, 60)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"text": "x", "box": [1, 2, 3]}, r"form\[0\]: box \[1, 2, 3\]: expected \[x0, y0, x1, y1\]"),
        ({"text": "x", "box": [1, 2, "3", 4]}, r"form\[0\]: box"),
        ({"text": "x"}, r"form\[0\]: lacks box"),
        ({"text": 5, "box": [1, 2, 3, 4]}, r"form\[0\]: text is 5"),
        ({"text": "x", "box": [1, 2, 300, 4]}, r"form\[0\]: box .* outside its image"),
        ("x", r"form\[0\]: expected an object"),
        ({"text": "x", "box": [1, 2, 3, 4], "words": 5}, r"form\[0\]: words is 5: expected a list"),
    ],
)
def test_broken_funsd_entries(tmp_path, entry, words):
    funsd(tmp_path, [entry, FORM[0]])
    with pytest.raises(InputError, match=rf"0a.json:{words}"):
        read_samples(tmp_path)
    samples = read_samples(tmp_path, broken="skip")
    assert (len(samples), len(samples.skipped)) == (1, 1)


def test_broken_funsd_files(tmp_path):
    file = funsd(tmp_path)
    text(file, '{"form": [', '{"text": }')
    with pytest.raises(InputError, match=r"0a.json:2: not JSON"):
        read_samples(tmp_path)
    document(file, {"form": {}})
    with pytest.raises(InputError, match=r"0a.json: not a FUNSD file"):
        read_samples(tmp_path)
    funsd(tmp_path)
    (tmp_path / "images" / "0a.png").unlink()
    with pytest.raises(InputError, match=r"0a.json: its image is missing"):
        read_samples(tmp_path)


def coco(folder, anns, images=None, name="set.json", **more):
    images = images or {"7": {"id": 7, "file_name": "a.jpg", "width": 100, "height": 60}}
    anns = {str(i): {"image_id": 7, "bbox": [1, 2, 20, 10], **ann} for i, ann in enumerate(anns)}
    return document(folder / name, {"imgs": images, "anns": anns, **more})


def test_coco_text(tmp_path):
    page(tmp_path / "train2014" / "a.jpg")
    anns = [
        {"utf8_string": "open", "legibility": "legible", "language": "english"},
        {"utf8_string": "", "legibility": "illegible", "bbox": [30, 2, 20.5, 10]},
        {"utf8_string": "shut", "legibility": "legible", "bbox": [30, 20, 20.5, 10]},
    ]
    file = coco(tmp_path, anns, imgToAnns={"7": [2, 0, 1], "9": []})
    samples = read_samples(tmp_path)
    assert [(s.text, s.boxes) for s in samples] == [("shut", ((30, 20, 50.5, 30),)), ("open", ((1, 2, 21, 12),))]
    assert [s.where for s in samples] == [f"{file}:anns[2]", f"{file}:anns[0]"]
    assert len(samples[0].all_boxes) == 3
    assert (samples.format, samples.unread) == ("cocotext", 1)


def test_textocr(tmp_path):
    page(tmp_path / "train_images" / "ab12.jpg")
    images = {"ab12": {"id": "ab12", "file_name": "train/ab12.jpg", "width": 100, "height": 60, "set": "train"}}
    anns = [{"utf8_string": "form"}, {"utf8_string": "."}, {"utf8_string": "tilt", "points": [5, 9, 30, 5, 28, 20]}]
    file = coco(tmp_path, anns, images, imgToAnns={"ab12": ["0", "1", "2"]})
    found = read_samples(file)
    assert [s.text for s in found] == ["form", "tilt"]  # a word that looks like FUNSD's key
    assert found[0].image == tmp_path / "train_images" / "ab12.jpg"


def test_points_stand_for_a_missing_bbox_and_images_elsewhere(tmp_path):
    page(tmp_path / "far" / "a.jpg")
    file = coco(tmp_path / "deep" / "er", [{"utf8_string": "x"}])
    values = {"image_id": 7, "utf8_string": "x", "points": [5, 9, 30, 5, 28, 20]}
    document(file, {"imgs": {"7": {"file_name": "a.jpg"}}, "anns": {"0": values}})
    with pytest.raises(InputError, match=r"set.json:imgs\[7\]: image a.jpg is missing: .*images=FOLDER"):
        read_samples(file)
    (sample,) = read_samples(f"{file}?images={tmp_path}/far")
    assert sample.boxes == ((5, 5, 30, 20),)


@pytest.mark.parametrize(
    ("ann", "words"),
    [
        ({"bbox": [1, 2, 20]}, r"bbox \[1, 2, 20\]: expected \[x, y, width, height\]"),
        ({"bbox": [1, 2, 0, 5]}, "empty box"),
        ({"bbox": [90, 2, 20, 5]}, "outside its image"),
    ],
)
def test_broken_coco_annotations(tmp_path, ann, words):
    page(tmp_path / "a.jpg")
    coco(tmp_path, [{"utf8_string": "x", **ann}, {"utf8_string": "y"}])
    with pytest.raises(InputError, match=rf"set.json:anns\[0\]: .*{words}"):
        read_samples(tmp_path)
    assert [s.text for s in read_samples(tmp_path, broken="skip")] == ["y"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"imgToAnns": {"7": 5, "8": [0]}}, r"imgToAnns\[7\]: 5: expected a list"),
        ({"imgToAnns": {"7": None, "8": [0]}}, r"imgToAnns\[7\]: None: expected a list"),
        (
            {"anns": {"0": {"image_id": 8, "bbox": [1, 2, 9, 9], "utf8_string": "x"}, "1": [1]}},
            r"anns\[1\]: expected an obj",
        ),
        (
            {
                "imgs": {"7": {"file_name": "a.jpg", "width": "wide", "height": 60}, "8": {"file_name": "a.jpg"}},
                "imgToAnns": {"7": ["0"], "8": ["0"]},
            },
            r"imgs\[7\]: width and height are \('wide', 60\)",
        ),
    ],
)
def test_broken_parts_of_a_coco_file_are_named_and_can_be_skipped(tmp_path, more, words):
    page(tmp_path / "a.jpg")
    images = {name: {"file_name": "a.jpg", "width": "100", "height": "60"} for name in "78"}  # sizes as texts are sound
    anns = {"0": {"image_id": 8, "bbox": [1, 2, 20, 10], "utf8_string": "x"}}
    document(tmp_path / "set.json", {"imgs": images, "anns": anns, **more})
    with pytest.raises(InputError, match=rf"set.json:{words}"):
        read_samples(tmp_path)
    found = read_samples(tmp_path, broken="skip")
    assert ([s.text for s in found], len(found.skipped)) == (["x"], 1)


def test_a_coco_file_whose_table_is_none(tmp_path):
    page(tmp_path / "a.jpg")
    coco(tmp_path, [{"utf8_string": "x"}], imgToAnns=[["0"]])
    with pytest.raises(InputError, match=r"set.json:imgToAnns: expected an object of lists, got list"):
        read_samples(tmp_path)


@pytest.mark.parametrize("name", ["caption", "text", "utf8_string"])
def test_plain_coco(tmp_path, name):
    page(tmp_path / "a.jpg")
    file = tmp_path / "set.json"
    image = {"id": 3, "file_name": "a.jpg", "width": 100, "height": 60}
    ann = {"id": 9, "image_id": 3, "bbox": [1, 2, 20, 10], name: "open"}
    document(file, {"images": [image], "annotations": [ann, {**ann, "id": 10, name: None}]})
    (sample,) = read_samples(tmp_path)
    assert (sample.text, sample.boxes, sample.id) == ("open", ((1, 2, 21, 12),), "set.json:annotations[9]")
    assert read_samples(tmp_path).unread == 1
    document(file, {"images": [image], "annotations": [ann, ann]})
    with pytest.raises(InputError, match=r"annotations\[1\]: the id 9 is there twice"):
        read_samples(tmp_path)


def test_images_of_another_size_than_annotated_are_refused(tmp_path):
    page(tmp_path / "a.jpg", 50, 30)
    coco(tmp_path, [{"utf8_string": "x", "bbox": [1, 1, 5, 5]}])
    with pytest.raises(InputError, match=r"imgs\[7\]: .*a.jpg has 50 x 30 pixels, its annotation says 100 x 60"):
        read_samples(tmp_path)


def test_empty_entries_are_nothing_to_read(tmp_path):
    empty = [
        {}, {"text": ""}, {"text": "", "box": []}, {"text": None, "box": None, "words": []}, {"box": [0, 0, 0, 0]},
        {"text": " ", "box": [5, 5, 5, 9]}, {"text": "", "words": [{"text": "", "box": None}]},
    ]  # fmt: skip
    funsd(tmp_path, [*empty, FORM[0], *empty])
    samples = read_samples(tmp_path)
    assert (len(samples), samples.unread, samples.skipped) == (1, 2 * len(empty), [])
    assert samples[0].all_boxes == ((1, 2, 30, 12),)
    words = [{"text": "", "box": []}, {"text": "kg", "box": [12, 21, 30, 33]}]
    funsd(tmp_path, [{"text": "kg", "box": [], "words": words}])
    assert read_samples(tmp_path)[0].boxes == ((12, 21, 30, 33),)
    with pytest.raises(InputError, match=r"form\[0\]: words has 5: expected objects"):
        funsd(tmp_path, [{"words": [5]}])
        read_samples(tmp_path)


def test_empty_coco_annotations_are_nothing_to_read(tmp_path):
    page(tmp_path / "a.jpg")
    empty = [{"bbox": []}, {"bbox": None}, {"bbox": [0, 0, 0, 0]}, {"bbox": [5, 5, 0, 9], "utf8_string": ""}]
    coco(tmp_path, [{"utf8_string": "x"}, *empty])
    samples = read_samples(tmp_path)
    assert (len(samples), samples.unread, len(samples[0].all_boxes)) == (1, 4, 1)


def test_regions_over_the_edge_are_cut_in_json_too(tmp_path):
    page(tmp_path / "coco" / "a.jpg")
    coco(tmp_path / "coco", [{"utf8_string": "x", "bbox": [-2, 50, 30, 13]}])
    funsd(tmp_path / "funsd", [{"text": "x", "box": [-2, 50, 28, 63]}])
    for name in ("coco", "funsd"):
        (sample,) = read_samples(tmp_path / name)
        assert sample.boxes == sample.all_boxes == ((0, 50, 28, 60),)


@pytest.mark.parametrize(
    "raw", ["1" + "0" * 400, "1" + "0" * 5000, "Infinity", "-Infinity", "NaN", "1e400"], ids=lambda raw: raw[:9]
)
def test_numbers_beyond_floats_are_named(tmp_path, raw):
    file = funsd(tmp_path)
    text(file, '{"form": [{"text": "x", "box": [1, 2, ' + raw + ", 12]}]}")
    with pytest.raises(InputError, match=r"0a.json:(form\[0\]: box .*not finite| a number in it cannot be read)"):
        read_samples(tmp_path)


def test_json_that_cannot_be_parsed(tmp_path):
    file = funsd(tmp_path)
    for content, words in (
        (b'{"form": ' + b"[" * 100_000, "0a.json: .*too deeply"),
        (b'{"form": [\n"\xff"]}', "0a.json:2: not UTF-8: .*save it as UTF-8"),
        (b"", "0a.json: empty: expected JSON"),
        (b'{"form": [', "0a.json: not JSON"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=words):
            read_samples(f"{file}?format=funsd")
    file.write_bytes(b'{"pages": [\n')
    with pytest.raises(InputError, match=r"0a.json: not JSON"):
        read_samples(file)


def test_names_and_texts_that_are_none(tmp_path):
    page(tmp_path / "a.jpg")
    for name, words in (
        ("a\0.jpg", "file_name is .*expected the path of a file"),
        ("\ud800.jpg", "half of a surrogate pair"),
        (["a.jpg"], r"file_name is \['a.jpg'\]: expected a string"),
        ("x" * 5000, "is missing"),
    ):
        coco(tmp_path, [{"utf8_string": "x"}], {"7": {"file_name": name}}, imgToAnns={"7": [0]})
        with pytest.raises(InputError, match=rf"set.json:imgs\[7\]: .*{words}"):
            read_samples(tmp_path)
    coco(tmp_path, [{"utf8_string": "a\udc00"}])
    with pytest.raises(InputError, match=r"anns\[0\]: text .*'.udc00' at character 1 is half of a surrogate pair"):
        coco(tmp_path, [{"utf8_string": "a\udc00"}], {"7": {"file_name": "a.jpg"}})
        read_samples(tmp_path)
