"""What is read from a checkpoint's files is what its loaded model says."""

import json

import pytest

from llava_patch import SkipLinks, patch
from llava_patch.core.errors import CheckpointError, HostError, SettingError
from llava_patch.data.configuration import read_transform
from llava_patch.hosts.anatomy import find
from llava_patch.probe.view import make_transform
from tests.support.probes import processor, tiny_model


def checkpoint(folder, model):
    model.config.save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def same(a, b):
    assert (a.mode, a.height, a.width, a.cell) == (b.mode, b.height, b.width, b.cell)
    assert a.processor.to_dict() == b.processor.to_dict()


@pytest.mark.parametrize("mode", ["resize", "crop", "pad"])
def test_hf(tmp_path, mode):
    model = tiny_model()
    same(read_transform(checkpoint(tmp_path, model), mode), make_transform(find(model), processor(), mode))


def test_merged_patches_of_a_patched_checkpoint(tmp_path):
    model = tiny_model()
    handle = patch(model, fusion=SkipLinks(layers=(), merge_size=2))
    model.config._name_or_path = str(tmp_path / "base")
    handle.save(tmp_path / "adapter")
    read = make_transform(find(model), processor(), "resize")
    assert read.cell == 28
    checkpoint(tmp_path / "full", model)
    same(read_transform(tmp_path / "full", "resize"), read)
    with pytest.raises(CheckpointError, match=r"adapter: its base .*base is no folder here: give --size and --patch"):
        read_transform(tmp_path / "adapter", "resize")
    handle.remove()
    checkpoint(tmp_path / "base", model)
    same(read_transform(tmp_path / "adapter", "resize"), read)


def test_llava(tmp_path):
    pytest.importorskip("llava")
    from tests.support import models

    model = models.llava_model(tmp_path)
    model.config.save_pretrained(tmp_path / "model")
    tower = find(model).tower
    same(read_transform(tmp_path / "model", "pad"), make_transform(find(model), tower.image_processor, "pad"))
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "mm_vision_tower": str(tmp_path / "gone")}))
    with pytest.raises(CheckpointError, match=r"its vision tower .*gone cannot be read"):
        read_transform(tmp_path / "model", "pad")


def test_what_is_no_checkpoint_or_has_no_tiles(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a checkpoint, it has no config.json"):
        read_transform(tmp_path, "resize")
    with pytest.raises(HostError, match="does not cut images into tiles"):
        read_transform(checkpoint(tmp_path, tiny_model()), "anyres")


def test_tiles_of_llava_next(tmp_path):
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextImageProcessor

    stock = tiny_model().config
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    config = LlavaNextConfig(
        vision_config=stock.vision_config, text_config=stock.text_config, image_grid_pinpoints=pinpoints
    )
    config.save_pretrained(tmp_path)
    LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=pinpoints
    ).save_pretrained(tmp_path)
    read = read_transform(tmp_path, "anyres")
    anatomy = find(LlavaNextForConditionalGeneration(config))
    theirs = make_transform(anatomy, read.processor, "anyres")
    same(read, theirs)
    assert read.tiling == theirs.tiling
    assert read.plane_size((40, 100)) == (112, 56)


def test_crop_is_refused_where_the_processor_pads(tmp_path):
    from transformers import LlavaImageProcessor

    checkpoint(tmp_path, tiny_model())
    LlavaImageProcessor(**{k: v for k, v in processor().to_dict().items() if k in ("size", "crop_size")}, do_pad=True
                        ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(SettingError, match="LlavaImageProcessor has do_pad = True"):
        read_transform(tmp_path, "crop")
    assert read_transform(tmp_path, "pad").processor.do_pad


def test_windows(tmp_path):
    model = tiny_model()
    read = read_transform(checkpoint(tmp_path, model), "window", 2)
    theirs = make_transform(find(model), processor(), "window", 2)
    same(read, theirs)
    assert read.text_height == theirs.text_height == 2
    with pytest.raises(SettingError, match=r"RProbe.text_height = 5: the vision tower's input is 4 tokens high"):
        read_transform(tmp_path, "window", 5)
