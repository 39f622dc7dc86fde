"""What must change the key of a store does, and what need not does not."""

import dataclasses
import os
import shutil

import pytest
import torch
from PIL import Image, ImageOps

from llava_patch import SkipLinks, patch
from llava_patch.core.files import digest
from llava_patch.data.pages import Pages
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.rprobe import keys as key_module
from llava_patch.measurements.rprobe.keys import images_of, store_key
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.probe.sample import Sample
from llava_patch.probe.view import make_transform
from tests.support.probes import processor, samples, tiny_model, unique_page


def key_of(model, data, image_processor=None, mode="resize", **settings):
    anatomy, settings = find(model), RProbe(**settings)
    transform = make_transform(anatomy, image_processor or processor(), mode)
    return digest(store_key(anatomy, transform, images_of(data, settings).key, settings))


@pytest.fixture(scope="module")
def before():
    return key_of(tiny_model(), samples(3))


def test_the_same_again_has_the_same_key(before):
    assert key_of(tiny_model(), samples(3)) == before


@pytest.mark.parametrize(
    "settings",
    [
        dict(text=False),
        dict(max_text_tokens=3),
        dict(steps=7, batch_size=3, lr=1.0, seed=4, rope="embedding", threshold=0.1),
        dict(broken="skip", store_gb=1.0, boxes_per_sample=2, trained="head"),
    ],
)
def test_settings_that_tokens_do_not_depend_on(before, settings):
    assert key_of(tiny_model(), samples(3), **settings) == before


@pytest.mark.parametrize("mode", ["resize", "pad", "crop"])
def test_the_answer_tells_of_another_way_to_resize(mode):
    """An overridden method is in no configuration; a picture of the tower's own size would not show it."""
    anatomy, plain, other = find(tiny_model()), processor(), processor()
    original = plain.resize
    other.resize = lambda *args, **kwargs: original(*args, **{**kwargs, "resample": Image.Resampling.NEAREST})
    one, two, three = (
        key_module.answer_key(anatomy, make_transform(anatomy, p, mode)) for p in (plain, processor(), other)
    )
    assert one == two != three


def test_versions_name_what_fast_processors_resize_with():
    assert "torchvision" in key_module.LIBRARIES


def test_a_mode_of_training_and_a_moved_text_model_are_the_same_model(before):
    model = tiny_model()
    model.train()
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight.add_(1)
        model.lm_head.weight.add_(1)
        model.model.language_model.embed_tokens.weight.add_(1)
    model.config.use_cache = False
    model.requires_grad_(False)
    assert key_of(model, samples(3)) == before


def nudge(tensor):
    """The smallest change of one value."""
    with torch.no_grad():
        flat = tensor.view(-1)
        flat[len(flat) // 3] = torch.nextafter(flat[len(flat) // 3], torch.tensor(9.0))


@pytest.mark.parametrize(
    "name",
    [
        "model.vision_tower.vision_model.embeddings.patch_embedding.weight",
        "model.vision_tower.vision_model.encoder.layers.1.layer_norm1.bias",
        "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "model.multi_modal_projector.linear_2.weight",
        "model.multi_modal_projector.linear_1.bias",
    ],
)
def test_one_bit_of_one_weight_changes_the_key(before, name):
    model = tiny_model()
    nudge(dict(model.named_parameters())[name])
    assert key_of(model, samples(3)) != before


def test_dtype_and_selected_layer_change_the_key(before):
    assert key_of(tiny_model(dtype=torch.bfloat16), samples(3)) != before
    model = tiny_model()
    model.config.vision_feature_layer = -3
    assert key_of(model, samples(3)) != before
    model = tiny_model()
    model.config.vision_feature_select_strategy = "full"
    assert key_of(model, samples(3)) != before


def test_a_patch_changes_the_key_and_its_removal_brings_it_back(before):
    model = tiny_model()
    with patch(model, fusion=SkipLinks(layers=(1,))):
        assert key_of(model, samples(3)) != before
    assert key_of(model, samples(3)) == before


def test_transform_and_masking_change_the_key(before):
    assert key_of(tiny_model(), samples(3), mode="pad") != before
    assert key_of(tiny_model(), samples(3), masked=True) != before
    other = processor()
    other.image_mean = [0.5, 0.5, 0.5]
    assert key_of(tiny_model(), samples(3), other) != before


@pytest.mark.parametrize("library", ["transformers", "torch", "pillow", "llava_patch"])
def test_another_version_of_a_library_changes_the_key(before, library, monkeypatch):
    installed = key_module.version
    monkeypatch.setattr(key_module, "version", lambda name: "0" if name == library else installed(name))
    assert key_of(tiny_model(), samples(3)) != before


def test_the_tower_must_be_loaded_and_in_memory():
    model = tiny_model()
    model.model.multi_modal_projector.to("meta")
    with pytest.raises(TypeError, match=r"multi_modal_projector.* lies outside memory"):
        key_of(model, samples(1))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda s: dataclasses.replace(s, boxes=((3.0, 15.0, 40.0, 27.5),)), id="box"),
        pytest.param(lambda s: dataclasses.replace(s, all_boxes=((0.0, 0.0, 5.0, 5.0),)), id="other boxes"),
        pytest.param(lambda s: dataclasses.replace(s, image=ImageOps.invert(s.image)), id="picture"),
    ],
)
def test_data_that_change_the_key(before, change):
    data = samples(3)
    assert key_of(tiny_model(), [*data[:2], change(data[2])]) != before
    assert key_of(tiny_model(), data[:2]) != before
    assert key_of(tiny_model(), data[::-1]) != before


def test_a_replaced_file_of_the_same_name_size_and_time_is_noticed(tmp_path):
    """And a folder that was moved is known again."""
    file = tmp_path / "page.bmp"
    unique_page().save(file)
    sample = Sample(file, "x", ((0, 0, 5, 5),), id="a")
    model, state = tiny_model(), file.stat()
    first = key_of(model, [sample])
    (tmp_path / "moved").mkdir()
    shutil.copy(file, tmp_path / "moved" / "other.bmp")
    moved = dataclasses.replace(sample, image=str(tmp_path / "moved" / "other.bmp"), text="y", id="b")
    assert key_of(model, [moved]) == first
    ImageOps.invert(unique_page()).save(file)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert file.stat().st_size == state.st_size
    assert key_of(model, [sample]) != first


def test_a_missing_file_that_comes_back_is_noticed(tmp_path):
    sample, model = Sample(tmp_path / "page.png", "x", ((0, 0, 5, 5),), id="a"), tiny_model()
    missing = key_of(model, [sample])
    unique_page().save(tmp_path / "page.png")
    assert key_of(model, [sample]) != missing


def test_pictures_that_only_live_while_they_are_drawn_are_told_apart():
    """Python gives an object's number again once the object is gone."""

    class Drawn(list):
        def __getitem__(self, index):
            return Sample(Image.new("RGB", (8, 8), (index, 0, 0)), "x", ((0, 0, 5, 5),), id=str(index))

    plan = images_of(Drawn(range(20)), RProbe())
    assert plan.images == [[i] for i in range(20)]


def pages(count=4, side=56, seed=0, split="train", noise=True):
    return Pages(count, side, seed, split, noise)


def test_pages_are_told_apart_without_drawing_them_all(monkeypatch):
    drawn = []
    draw = Pages.draw
    monkeypatch.setattr(Pages, "draw", lambda self, index: drawn.append(index) or draw(self, index))
    first = digest(pages().identity())
    assert drawn == [0]
    assert digest(pages().identity()) == first
    for other in (pages(count=5), pages(side=84), pages(seed=1), pages(split="heldout"), pages(noise=False)):
        assert digest(other.identity()) != first


def test_a_page_drawn_otherwise_changes_their_key(monkeypatch):
    first = digest(pages().identity())
    colour = Pages._colour
    monkeypatch.setattr(Pages, "_colour", lambda *args, **kwargs: ImageOps.invert(colour(*args, **kwargs)))
    assert digest(pages().identity()) != first


def test_what_weights_do_not_tell_of_changes_the_key(before):
    model = tiny_model()
    hook = find(model).projector.register_forward_pre_hook(lambda _, arguments: (arguments[0].roll(1, 1),))
    assert key_of(model, samples(3)) != before
    hook.remove()
    assert key_of(model, samples(3)) == before


def test_windows_are_part_of_the_key():
    box, page = (30.0, 100.0, 50.0, 112.0), unique_page(200, 300)

    def key(mode, height=1.5):
        data, settings = [Sample(page, "x", (box,), id="a")], RProbe()
        transform = make_transform(find(tiny_model()), processor(), mode, height)
        plan = images_of(data, settings, transform)
        return digest(plan.key), digest(store_key(find(tiny_model()), transform, plan.key, settings))

    assert key("window") == key("window")
    for one, two in zip(key("window"), key("window", 1.4), strict=True):  # of the data, and of all
        assert one != two
    assert key("pad") == key("pad", 1.4)  # no other mode has a height
    assert key("pad")[0] == digest(images_of([Sample(page, "x", (box,), id="a")], RProbe()).key)


def test_a_decoder_trained_before_there_were_windows_is_known_again():
    from llava_patch.measurements.rprobe.keys import make_key
    from llava_patch.probe.decoder import ProbeDecoder
    from llava_patch.probe.sequence import TokenGrid

    decoder = ProbeDecoder(find(tiny_model()), TokenGrid(4, 4, 14))

    def key(**settings):
        return make_key(decoder, "", torch.zeros(0), RProbe(**settings), 1.0)

    assert "RProbe.text_height" not in key() and "RProbe.page" not in key()
    assert key(image_mode="window", text_height=2)["RProbe.text_height"] == 2
