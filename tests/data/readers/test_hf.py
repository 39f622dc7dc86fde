import io

import pytest
from PIL import Image

from llava_patch.core.errors import InputError
from llava_patch.data.readers import read_samples, write_jsonl

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(width=100, height=60, grey=200):
    return Image.new("L", (width, height), grey)


def lists(width=100, height=60, scale=1.0):
    """Two pages of words, as LayoutLM's data sets have them."""
    boxes = [[[10, 5, 40, 15], [50, 5, 90, 15]], [[10, 25, 40, 35]]]
    return datasets.Dataset.from_dict(
        {
            "id": ["0", "1"],
            "tokens": [["gross", "weight"], ["net"]],
            "bboxes": [[[n * scale for n in box] for box in page] for page in boxes],
            "ner_tags": [[0, 1], [0]],
            "image": [picture(width, height, grey) for grey in (10, 20)],
        },
        features=datasets.Features(
            {
                "id": datasets.Value("string"),
                "tokens": datasets.Sequence(datasets.Value("string")),
                "bboxes": datasets.Sequence(datasets.Sequence(datasets.Value("float64" if scale < 1 else "int64"))),
                "ner_tags": datasets.Sequence(datasets.ClassLabel(names=["O", "B"])),
                "image": datasets.Image(),
            }
        ),
    )


def save(dataset, folder, how):
    if how == "disk":
        dataset.save_to_disk(folder)
        return folder
    folder.mkdir()
    if how == "parquet":
        dataset.to_parquet(folder / "train-00000-of-00001.parquet")
        return folder
    dataset.save_to_disk(folder / "all")
    return next((folder / "all").glob("*.arrow"))


@pytest.mark.parametrize("how", ["disk", "parquet", "arrow"])
def test_pages_of_words(tmp_path, how):
    source = save(lists(), tmp_path / "set", how)
    samples = read_samples(source)
    assert [s.text for s in samples] == ["gross", "weight", "net"]
    assert [s.where for s in samples] == [f"{source}:0[0]", f"{source}:0[1]", f"{source}:1[0]"]
    assert [s.id for s in samples] == [f"{source.name}:0[0]", f"{source.name}:0[1]", f"{source.name}:1[0]"]
    assert samples[0].boxes == ((10, 5, 40, 15),)
    assert samples[0].all_boxes == ((10, 5, 40, 15), (50, 5, 90, 15))
    assert samples.format == "hf"
    assert samples[0].document == samples[1].document != samples[2].document
    assert samples[0].image is samples[1].image
    assert [s.open_image().getpixel((0, 0))[0] for s in samples] == [10, 10, 20]
    again = read_samples(write_jsonl(samples, tmp_path / "out.jsonl"))
    assert [(s.text, s.boxes, s.all_boxes) for s in again] == [(s.text, s.boxes, s.all_boxes) for s in samples]
    assert len(list((tmp_path / "out_images").iterdir())) == 2


def test_a_region_a_row_and_splits(tmp_path):
    rows = {"image": [picture(), picture()], "text": ["one", "two"], "box": [[1, 2, 30, 12], [1, 20, 30, 32]]}
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    both = datasets.DatasetDict({"train": made, "test": made.select([1])})
    both.save_to_disk(tmp_path / "set")
    with pytest.raises(InputError, match="several splits: it has train, test"):
        read_samples(tmp_path / "set")
    with pytest.raises(InputError, match="no split 'dev': it has train, test"):
        read_samples(f"{tmp_path}/set?split=dev")
    assert [s.text for s in read_samples(f"{tmp_path}/set?split=train")] == ["one", "two"]
    (sample,) = read_samples(f"{tmp_path}/set?split=test")
    assert (sample.text, sample.id, sample.where) == ("two", "set[test]:0", f"{tmp_path}/set[test]:0")
    (tmp_path / "parts").mkdir()
    for name, part in both.items():
        part.to_parquet(tmp_path / "parts" / f"{name}-00000-of-00001.parquet")
    assert len(read_samples(f"{tmp_path}/parts?split=test")) == 1


def test_paths_instead_of_images(tmp_path):
    picture().save(tmp_path / "p.png")
    made = datasets.Dataset.from_dict({"image_path": ["p.png"], "words": [["a"]], "boxes": [[[1, 2, 30, 12]]]})
    made.to_parquet(tmp_path / "x.parquet")
    assert read_samples(tmp_path / "x.parquet")[0].image == tmp_path / "p.png"


def test_thousandths_are_asked_for_never_guessed(tmp_path):
    """Boxes of 0..1000 on a smaller image stick out, on a larger one they could be pixels."""
    source = save(lists(scale=10), tmp_path / "small", "disk")
    for broken in ("stop", "skip"):
        with pytest.raises(InputError, match=r"small:0\[.\]: .*within 0..1000.*boxes=1000"):
            read_samples(source, broken=broken)
    partly = save(lists(scale=2), tmp_path / "partly", "disk")  # the first of its boxes would fit
    with pytest.raises(InputError, match=r"^\S*partly:0\[1\]: .*within 0..1000.*boxes=1000"):
        read_samples(partly, broken="skip")
    assert len(read_samples(f"{partly}?boxes=pixels", broken="skip")) == 1
    (first, *_) = read_samples(f"{source}?boxes=1000")
    assert first.boxes == ((10, 3, 40, 9),)  # 100..400 of 1000 on 100 x 60 pixels
    large = save(lists(1600, 1200, scale=10), tmp_path / "large", "disk")
    with pytest.raises(InputError, match=r"large: all boxes are within 0..1000 though images have up to 1600"):
        read_samples(large)
    assert read_samples(f"{large}?boxes=pixels")[0].boxes == ((100, 50, 400, 150),)
    assert read_samples(f"{large}?boxes=1000")[0].boxes == ((160, 60, 640, 180),)
    shares = save(lists(scale=0.01), tmp_path / "shares", "disk")
    with pytest.raises(InputError, match=r"within 0..1: add .boxes=1"):
        read_samples(shares)
    assert read_samples(f"{shares}?boxes=1")[0].boxes[0] == pytest.approx((10, 3, 40, 9))
    with pytest.raises(InputError, match=r"small:0\[0\]: box .* is not in 0..1, as .boxes=1 says"):
        read_samples(f"{source}?boxes=1")


def test_missing_columns_broken_rows_and_unknown_names(tmp_path, monkeypatch):
    datasets.Dataset.from_dict({"pixels": [1], "words": [["a"]]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(InputError, match="no image column among pixels, words: expected one called image or"):
        read_samples(tmp_path / "x.parquet")
    stream = io.BytesIO()
    picture().save(stream, "PNG")
    images = [{"bytes": stream.getvalue(), "path": None}, {"bytes": b"no", "path": None}, {"bytes": None, "path": None}]
    words = {"image": images, "words": [["a", "b"], ["c"], ["d"]], "bboxes": [[[1, 2, 3, 9]], [[1, 2, 3, 9]]] + [[]]}
    datasets.Dataset.from_dict(words).to_parquet(tmp_path / "y.parquet")
    with pytest.raises(InputError, match=r"y.parquet:0: words has 2 values, bboxes does not have as many"):
        read_samples(tmp_path / "y.parquet")
    words["words"], words["bboxes"] = [["a"], ["c"], ["d"]], [[[1, 2, 3, 9]]] * 3
    datasets.Dataset.from_dict(words).to_parquet(tmp_path / "z.parquet")
    samples = read_samples(tmp_path / "z.parquet", broken="skip")
    assert [s.text for s in samples] == ["a"]
    assert [message.split("z.parquet:")[1][:28] for message in samples.skipped] == [
        "1: image " + str(tmp_path)[:19], "2: no image in column image"
    ]  # fmt: skip

    def load(name, config):
        raise ConnectionError("no way there\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError, match=r"someone/pages: datasets cannot load it: no way there and more$"):
        read_samples("hf:someone/pages")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a: asked.append(a) or datasets.DatasetDict({"test": lists()}))
    assert len(read_samples("hf:someone/pages:test?config=small")) == 3
    assert asked == [("someone/pages", "small")]


def test_regions_over_the_edge_are_cut_once_the_unit_is_told_and_empty_ones_are_nothing(tmp_path):
    boxes = [[[-3, 5, 40, 15], [50, 5, 104, 15], None, []]]
    words = {"image": [picture()], "words": [["gross", "net", None, ""]], "boxes": boxes}
    made = datasets.Dataset.from_dict(words).cast_column("image", datasets.Image())
    made.save_to_disk(tmp_path / "set")
    with pytest.raises(InputError, match=r"set:0\[1\]: .*boxes=1000 to the source, otherwise .boxes=pixels"):
        read_samples(tmp_path / "set")
    found = read_samples(f"{tmp_path}/set?boxes=pixels")
    assert [s.boxes for s in found] == [((0, 5, 40, 15),), ((50, 5, 100, 15),)]
    assert (found.unread, len(found[0].all_boxes)) == (2, 2)


def test_rows_and_folders_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: no .parquet or .arrow file in it, and no dataset_dict.json"):
        read_samples(f"{tmp_path}/empty?format=hf")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nothing of the kind")
    with pytest.raises(InputError, match=r"x.parquet: datasets cannot load it"):
        read_samples(tmp_path / "x.parquet")
    made = datasets.Dataset.from_dict({"image_path": ["a\0.png"], "words": [["a"]], "boxes": [[[1, 2, 3, 9]]]})
    made.save_to_disk(tmp_path / "set")
    with pytest.raises(InputError, match=r"set:0: image_path is 'a.x00.png': expected the path of a file; .bro"):
        read_samples(tmp_path / "set")

    def broken(self, row):
        raise OSError("the row is damaged")

    monkeypatch.setattr(datasets.Dataset, "__getitem__", broken)
    with pytest.raises(InputError, match=r"set:0: the row cannot be read: the row is damaged; .broken=skip"):
        read_samples(tmp_path / "set")
