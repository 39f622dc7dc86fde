import pytest
from PIL import Image

from llava_patch.core.errors import InputError
from llava_patch.probe.sample import Sample, split_samples


def make(documents):
    return [Sample(Image.new("RGB", (4, 4)), "x", ((0, 0, 2, 2),), id=f"{d}:{i}", document=d) for i, d in documents]


def test_lines_of_a_document_stay_together():
    data = make([(i, f"d{i % 10}") for i in range(40)])
    train, held = split_samples(data, 0.3, seed=0)
    assert {s.document for s in held}.isdisjoint({s.document for s in train})
    assert len({s.document for s in held}) == 3
    assert len(train) + len(held) == 40


def test_split_follows_the_seed_not_the_order():
    data = make([(0, f"d{i}") for i in range(30)])
    held = {s.id for s in split_samples(data, 0.2, seed=1)[1]}
    assert held == {s.id for s in split_samples(data[::-1], 0.2, seed=1)[1]}
    assert held != {s.id for s in split_samples(data, 0.2, seed=2)[1]}


def test_either_side_gets_a_document():
    assert [len(part) for part in split_samples(make([(0, "a"), (1, "b")]), 0.001, 0)] == [1, 1]
    assert [len(part) for part in split_samples(make([(0, "a"), (1, "b")]), 0.999, 0)] == [1, 1]
    with pytest.raises(InputError, match=r"2 samples of 1 document .*--heldout"):
        split_samples(make([(0, "a"), (1, "a")]), 0.2, 0)


def test_missing_and_broken_files_are_named(tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 not really")
    for file in (broken, tmp_path / "missing.png"):
        with pytest.raises(InputError, match=rf"list.jsonl:3: image .*{file.name}"):
            Sample(file, "x", ((0, 0, 1, 1),), id="list.jsonl:3").open_image()


def test_a_file_is_opened_in_rgb(tmp_path):
    Image.new("L", (5, 4), 7).save(tmp_path / "grey.png")
    image = Sample(tmp_path / "grey.png", "x", ((0, 0, 1, 1),)).open_image()
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (5, 4), (7, 7, 7))
