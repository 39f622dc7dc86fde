"""Regions in records: how they are read and refused, in LLaVA's data and in one's own."""

import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaImageProcessor

from llava_patch import AuxiliaryProbe, patch
from llava_patch.core.errors import InputError, SettingError
from llava_patch.integrations.training.auxiliary import RegionCollator
from llava_patch.integrations.training.auxiliary.data import wrap
from llava_patch.probe.auxiliary.regions import Region, parse
from tests.support.probes import processor


class Words:
    """A tokenizer: an id a word."""

    model_max_length = 64

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return {"input_ids": [3 + len(word) for word in text.split() if word != "-"]}


class LlavaData(torch.utils.data.Dataset):
    """What LLaVA's data set is to the wrapper."""

    def __init__(self, records, folder, ratio="pad"):
        self.list_data_dict = records
        self.tokenizer = Words()
        self.data_args = SimpleNamespace(
            data_path="some/data.json", image_folder=str(folder), image_aspect_ratio=ratio, image_processor=processor()
        )

    modality_lengths = property(lambda self: [7] * len(self))

    def __len__(self):
        return len(self.list_data_dict)

    def __getitem__(self, index):
        return {"input_ids": torch.tensor([index]), "image": torch.zeros(3, 56, 56)}


def _collate(instances):
    assert all("rprobe" not in one for one in instances)
    return {"input_ids": torch.stack([one["input_ids"] for one in instances])}


@pytest.fixture
def auxiliary(host):
    return patch(host.model, probe=AuxiliaryProbe(max_text_tokens=3)).auxiliary


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (112, 56), "white").save(tmp_path / "wide.png")
    return tmp_path


def _record(**region):
    return {"id": "r", "image": "wide.png", "conversations": [], "rprobe": region}


def test_llavas_data_keep_their_regions(auxiliary, folder):
    bare = {"id": "b", "conversations": []}
    records = [bare, _record(box=[[0, 0, 28, 28], [84, 28, 112, 56]], text="one two three four"),
               bare, _record(box=[56, 0, 84, 28], text="five")]  # fmt: skip
    data, collator = wrap(auxiliary, LlavaData(records, folder), _collate)
    assert len(data) == 4 and data.modality_lengths == [7] * 4 and data.inner.list_data_dict is records
    assert "rprobe" not in collator([data[0], data[2]])
    batch = collator([data[i] for i in range(4)])
    assert batch["input_ids"].flatten().tolist() == [0, 1, 2, 3]
    found = batch["rprobe"]
    assert found["image"].tolist() == [1, 3]  # LLaVA gives a record without an image a black one
    # 112 x 56 is padded to 112 x 112 and halved: the page lies in rows 1 and 2 of the 4 x 4 tokens.
    assert [t.nonzero().flatten().tolist() for t in found["target"]] == [[4, 11], [6]]
    assert found["text"].tolist() == [[6, 6, 8], [7, 0, 0]] and found["counts"].tolist() == [3, 1]
    assert torch.equal(pickle.loads(pickle.dumps(data))[1]["rprobe"]["text"], data[1]["rprobe"]["text"])  # a worker's
    assert not any(t.is_floating_point() for t in found.values())  # DeepSpeed's Trainer would round them


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"id": "a", "image": "wide.png"}], r"some/data.json: no record has a region .*add \"rprobe\": \{"),
        ([_record(box=[5, 0, 4, 9], text="x")], r"some/data.json: record 1 \(id r\): box \[5, 0, 4, 9\]: expected"),
        ([_record(box=[0, 0, 4, 9], text="x", image_index=1)], r"image_index 1, but the record has 1 image"),
        ([{"rprobe": {"box": [0, 0, 4, 9], "text": "x"}}], "record 1: image_index 0, but the record has 0 image"),
    ],
)  # fmt: skip
def test_bad_records_are_refused_before_anything_is_read(auxiliary, tmp_path, records, message):
    with pytest.raises(InputError, match=message):
        wrap(auxiliary, LlavaData(records, tmp_path), _collate)


def test_other_data_and_tiles_are_refused(auxiliary, folder):
    with pytest.raises(SettingError, match=r"is not LLaVA's data set: use llava_patch\.\S+\.auxiliary\.RegionCollator"):
        wrap(auxiliary, [1, 2], _collate)
    with pytest.raises(SettingError, match="--image_aspect_ratio anyres"):
        wrap(auxiliary, LlavaData([_record(box=[0, 0, 4, 9], text="x")], folder, "anyres"), _collate)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({"box": [0, 0, 500, 9], "text": "x"}, "outside its image of 112 x 56 pixels"),
        ({"box": [0, 0, 5, 9], "text": "-"}, "has no tokens"),
    ],
)
def test_a_region_that_does_not_fit_its_image_stops_or_is_left_out(host, folder, caplog, region, message):
    handle = patch(host.model, probe=AuxiliaryProbe())
    data, _ = wrap(handle.auxiliary, LlavaData([_record(**region)], folder), _collate)
    with pytest.raises(InputError, match=rf"some/data.json: record 1 \(id r\).*{message}.*broken = \"skip\""):
        data[0]
    handle.remove()
    handle = patch(host.model, probe=AuxiliaryProbe(broken="skip"))
    data, _ = wrap(handle.auxiliary, LlavaData([_record(**region)], folder), _collate)
    assert "rprobe" not in data[0]
    assert message in caplog.text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "expected {"),
        ({"box": [0, 0, 1, 1]}, "needs the region's \"text\""),
        ({"box": [0, 0, 1, 1], "text": " "}, "needs the region's \"text\""),
        ({"text": "x"}, "box None: expected"),
        ({"box": [], "text": "x"}, r"box \[\]: expected"),
        ({"box": [0, 0, 1], "text": "x"}, r"box \[0, 0, 1\]: expected"),
        ({"box": [0, 0, float("nan"), 1], "text": "x"}, "expected"),
        ({"box": [[0, 0, 1, 1], [0, 0, True, 1]], "text": "x"}, "expected"),
        ({"bbox": [0, 0, 1, 1], "text": "x"}, 'has no entry bbox, it takes box'),
        ({"box": [0, 0, 1, 1], "text": "x", "image_index": 2}, "image_index 2, but the record has 2 images"),
    ],
)  # fmt: skip
def test_what_is_no_region(value, message):
    with pytest.raises(InputError, match=f"^here: .*{message}"):
        parse(value, 2, "here")
    assert parse({"box": [0, 0, 1, 1], "text": "x", "image_index": 1}, 2, "here") == Region(((0, 0, 1, 1),), "x", 1)


def test_records_with_several_images(host, folder):
    """The region belongs to the first image unless it says otherwise; images of earlier records are counted."""
    handle = patch(host.model, probe=AuxiliaryProbe())
    seen = []
    collator = RegionCollator(lambda records: seen.extend(records) or {}, handle, processor(), Words())
    page = Image.new("RGB", (56, 56))
    region = {"box": [0, 0, 14, 14], "text": "x"}
    records = [
        {"images": [page, folder / "wide.png"], "rprobe": {**region, "image_index": 1}},
        {"text": "no image"},
        {"images": [page, page], "rprobe": None},
        {"images": [page, page], "rprobe": {**region, "image_index": None}},
    ]
    records[0]["rprobe"]["box"] = [28, 0, 42, 14]  # the crop takes 28 columns away on the left
    batch = collator(records)
    assert batch["rprobe"]["image"].tolist() == [1, 4] and batch["rprobe"]["target"][:, 0].all()
    assert all("rprobe" not in record for record in seen) and len(seen) == 4
    assert "rprobe" not in collator([{"image": page}])
    with pytest.raises(InputError, match=r"record 0 of the batch: image .*gone.png.* cannot be read"):
        collator([{"image": folder / "gone.png", "rprobe": region}])
    handle.remove()
    with pytest.raises(SettingError, match="has no auxiliary loss"):
        RegionCollator(_collate, patch(host.model), processor(), Words())


def test_an_inner_collator_that_drops_images_is_refused(host):
    handle = patch(host.model, probe=AuxiliaryProbe())
    page = Image.new("RGB", (56, 56))
    records = [{"images": [page, page]}, {"image": page, "rprobe": {"box": [0, 0, 14, 14], "text": "x"}}]

    def collate(count):
        return RegionCollator(lambda _: {"pixel_values": torch.zeros(count, 3, 56, 56)}, handle, processor(), Words())

    assert collate(3)(records)["rprobe"]["image"].tolist() == [2]
    with pytest.raises(InputError, match="hold 3 images, but the inner collator gave the model 2"):
        collate(2)(records)
    assert "rprobe" not in collate(2)(records[:1])


@pytest.mark.parametrize("as_array", [torch.tensor, np.array], ids=["torch", "numpy"])
def test_boxes_of_tensors_and_arrays(as_array):
    one, two = [0, 0, 1, 1], [2.5, 0.0, 3.0, 1.0]
    plain = parse({"box": [one, two], "text": "x", "image_index": 1}, 2, "here")
    for box in (as_array([one, two]), [as_array(one), as_array(two)], [[as_array(v) for v in b] for b in (one, two)]):
        assert parse({"box": box, "text": "x", "image_index": as_array(1)}, 2, "here") == plain
    assert parse({"box": as_array(one), "text": "x"}, 1, "here").boxes == ((0.0, 0.0, 1.0, 1.0),)
    assert parse({"box": [np.int64(0), np.float32(0), 1, 1], "text": np.str_("x")}, 1, "here").text == "x"
    with pytest.raises(InputError, match=r"here: box .*expected"):
        parse({"box": as_array(one[:3]), "text": "x"}, 1, "here")


def test_none_is_what_exports_write_for_a_missing_value(auxiliary, folder):
    missing = {"box": None, "text": None, "image_index": None}
    records = [
        {**_record(), "rprobe": None},
        _record(**missing),
        _record(box=[56, 0, 84, 28], text="five", image_index=None),
    ]
    data, collator = wrap(auxiliary, LlavaData(records, folder), _collate)
    assert ["rprobe" in data[i] for i in range(3)] == [False, False, True]
    assert collator([data[i] for i in range(3)])["rprobe"]["image"].tolist() == [2]
    with pytest.raises(InputError, match="no record has a region"):
        wrap(auxiliary, LlavaData(records[:2], folder), _collate)
    with pytest.raises(InputError, match=r"box None: expected"):
        wrap(auxiliary, LlavaData([_record(text="x", box=None)], folder), _collate)


def test_a_processor_that_pads_is_marked_as_it_pads(host):
    """HF's LlavaImageProcessor with do_pad: a white block of a wide black page is the brightest marked cell."""
    pads = LlavaImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_pad=True)
    handle = patch(host.model, probe=AuxiliaryProbe())
    with pytest.raises(SettingError, match=r'do_pad = True.*RegionCollator: mode="pad"'):
        RegionCollator(_collate, handle, pads, Words())
    page = Image.new("RGB", (112, 56), "black")
    page.paste((255, 255, 255), (56, 0, 84, 28))
    region = Region(((56.0, 0.0, 84.0, 28.0),), "x")
    pixels = pads([page], return_tensors="pt")["pixel_values"][0]
    brightness = pixels.mean(0).unfold(0, 14, 14).unfold(1, 14, 14).mean((-1, -2)).flatten()
    marked = handle.auxiliary.marker(pads, Words(), "pad").mark(region, page.size, "here")["target"]
    assert marked.nonzero().flatten().tolist() == [int(brightness.argmax())] == [6]
    off = LlavaImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_pad=False)
    RegionCollator(_collate, handle, off, Words())


def test_a_record_of_the_docs_can_be_read():
    record = json.loads('{"image": "a.jpg", "rprobe": {"box": [12, 30, 220, 48], "text": "TOTAL 12.50"}}')
    assert parse(record["rprobe"], 1, "here").boxes == ((12.0, 30.0, 220.0, 48.0),)


def test_a_collator_is_not_asked_for_parts_of_a_page(host):
    handle = patch(host.model, probe=AuxiliaryProbe())
    for mode in ("window", "anyres", "square"):
        with pytest.raises(SettingError, match=f"RegionCollator: mode = '{mode}': expected one of crop, pad, resize"):
            RegionCollator(_collate, handle, processor(), Words(), mode=mode)
