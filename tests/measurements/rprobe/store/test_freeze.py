import dataclasses
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from llava_patch.core.errors import HostError, InputError, SettingError
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.store.freeze import Encoder, freeze_samples
from llava_patch.probe.sample import Sample
from llava_patch.probe.view import make_transform
from tests.support.probes import HIDDEN, SIDE, Characters, processor, samples, targets_of, tiny_model, unique_page


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def freeze(model, data, mode="resize", tokenizer=None, **settings):
    anatomy = find(model)
    transform = make_transform(anatomy, processor(), mode)
    return freeze_samples(Encoder(anatomy, transform, tokenizer or Characters()), data, RProbe(**settings))


def test_names_of_samples_are_not_among_what_the_data_are(model):
    """The same files under another path are the same data; another text is not."""
    key = freeze(model, samples(2), store=False).key
    named = [dataclasses.replace(sample, id=f"elsewhere/{sample.id}", document="d") for sample in samples(2)]
    assert freeze(model, named, store=False).key == key
    other = [dataclasses.replace(sample, text="other") for sample in samples(2)]
    assert freeze(model, other, store=False).key != key


def test_errors_name_a_place_that_finds_the_file(model):
    (sample,) = samples(1)
    for wrong in ({"text": ""}, {"boxes": ()}):
        bad = dataclasses.replace(sample, where="/far/list.jsonl:1", **wrong)
        with pytest.raises(InputError, match=r"^/far/list.jsonl:1: "):
            freeze(model, [bad], store=False)


def tokens_of(data):
    return torch.cat([data.batch(torch.tensor([i])).image_tokens for i in range(len(data))])


def test_targets_are_exactly_the_pixels_under_the_target_tokens(model):
    """On a page of unique colours every target value names the pixel that it came from."""
    page = unique_page()
    boxes = [(3.0, 15.0, 40.0, 27.0), (30.0, 0.0, 56.0, 56.0), (20.5, 20.5, 20.6, 20.6)]
    data = freeze(model, [Sample(page, "abc", (box,), id=str(i)) for i, box in enumerate(boxes)])
    batch = data.batch(torch.tensor([2, 0, 1]))
    assert batch.counts.tolist() == [1, 3, 8]
    mean, std = make_transform(find(model), processor(), "resize").statistics()
    colours = (batch.pixels.unflatten(-1, (14, 14, 3)) * std + mean) * 255
    colours = colours.round().to(torch.uint8).numpy()
    page = np.asarray(page)
    tokens = [(1, 1), *[(1, c) for c in range(3)], *[(r, c) for r in range(4) for c in (2, 3)]]
    for got, (row, column) in zip(colours, tokens, strict=True):
        assert np.array_equal(got, page[14 * row : 14 * row + 14, 14 * column : 14 * column + 14])


def test_tokens_and_text_are_the_models_own(model):
    data = freeze(model, samples(3))
    pixels = make_transform(find(model), processor(), "resize").pixel_values([s.image for s in samples(3)])
    with torch.no_grad():
        assert torch.equal(tokens_of(data), find(model).encode_images(pixels))
        ids = torch.tensor(Characters()("line 2", add_special_tokens=False)["input_ids"])
        batch = data.batch(torch.tensor([2]))
        assert torch.equal(batch.text_tokens[0], find(model).embed_tokens(ids))
    assert torch.equal(batch.image_tokens[0], tokens_of(data)[2])


def test_batches_of_unequal_samples_are_padded(model):
    page = samples(1)[0].image
    data = [Sample(page, "a", ((0, 0, 5, 5),), id="0"), Sample(page, "abcd", ((0, 0, 50, 50),), id="1")]
    frozen = freeze(model, data)
    batch = frozen.batch(torch.tensor([1, 0]))
    assert batch.text_tokens.shape == (2, 4, HIDDEN)
    assert batch.sequence.valid.sum(1).tolist() == [20, 17]
    assert batch.counts.tolist() == [16, 1]
    assert batch.pixels.shape == (17, 588)
    assert frozen.batch(torch.tensor([0])).text_tokens.shape == (1, 1, HIDDEN)


def test_masked_blacks_out_what_the_tower_sees_but_not_the_targets(model):
    full, masked = freeze(model, samples(3)), freeze(model, samples(3), masked=True)
    assert torch.equal(targets_of(full), targets_of(masked))
    assert not torch.equal(tokens_of(full), tokens_of(masked))
    blacked = []
    for sample in samples(3):
        pixels = np.asarray(sample.image).copy()
        pixels[15:27, 3:40] = 0
        blacked.append(Sample(Image.fromarray(pixels), "x", sample.boxes, id="b"))
    assert torch.equal(tokens_of(freeze(model, blacked)), tokens_of(masked))


def images(data):
    return sum(len(shard.tensors["image_counts"]) for shard in data.shards)


def test_lines_of_one_page_share_its_tokens(model, tmp_path):
    """Also where they do not follow each other, and where two files hold the same page; masked lines never do."""
    page, other = (s.image for s in samples(2))
    for name in ("page.png", "copy.png"):
        page.save(tmp_path / name)
    pages = [page, other] * 20 + [tmp_path / "page.png", str(tmp_path / "copy.png")]
    lines = [Sample(p, "x", ((0, i, 9, i + 5),), id=str(i)) for i, p in enumerate(pages)]
    data = freeze(model, lines)
    assert images(data) == 2 + 1  # a picture in memory is not compared with a file
    assert torch.equal(tokens_of(data)[0], tokens_of(data)[38])
    assert torch.equal(tokens_of(data)[0], tokens_of(data)[41])
    assert not torch.equal(tokens_of(data)[0], tokens_of(data)[1])
    assert [label[0] for label in data.labels] == [str(i) for i in range(42)]
    assert images(freeze(model, lines[:4], masked=True)) == 4


def test_without_text_every_token_is_the_unknown_one(model):
    data = freeze(model, samples(2), text=False)
    batch = data.batch(torch.tensor([0, 1]))
    with torch.no_grad():
        unknown = find(model).embed_tokens(torch.tensor([0]))
    assert torch.equal(batch.text_tokens, unknown.expand(2, 6, -1))
    tokenizer = Characters()
    tokenizer.unk_token_id = None
    with pytest.raises(SettingError, match=r"RProbe\.text = False"):
        freeze(model, samples(1), tokenizer=tokenizer, text=False)


def test_texts_that_are_cut_are_counted_and_told(model):
    page = unique_page()
    data = [Sample(page, text, ((0.0, 0.0, 5.0, 5.0),), id=text) for text in ("abcd", "abcde", "a")]
    with pytest.warns(UserWarning, match="cuts the texts of 1 of 3 samples to RProbe.max_text_tokens = 4 tokens"):
        assert freeze(model, data, max_text_tokens=4).texts_cut == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert freeze(model, data, max_text_tokens=5).texts_cut == 0


def test_long_texts_are_cut(model):
    assert freeze(model, samples(1), max_text_tokens=4).text.counts.tolist() == [4]


def test_the_model_is_left_as_it_was():
    model = tiny_model()
    model.train()
    model.model.vision_tower.eval()
    model.lm_head.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()], [m.training for m in model.modules()]
    freeze(model, samples(3))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert ([(p.requires_grad, p.grad) for p in model.parameters()], [m.training for m in model.modules()]) == flags
    with pytest.raises(InputError):  # after an exception too
        freeze(model, [Sample(samples(1)[0].image, "", ((0, 0, 5, 5),), id="x")])
    assert [m.training for m in model.modules()] == flags[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_are_kept_as_the_model_made_them_and_given_as_float32(dtype):
    model = tiny_model(dtype=dtype)
    data = freeze(model, samples(2))
    batch = data.batch(torch.tensor([0, 1]))
    pixels = make_transform(find(model), processor(), "resize").pixel_values([s.image for s in samples(2)])
    with torch.no_grad():
        expected = find(model).encode_images(pixels.to(dtype))
    assert data.shards[0].rows("tokens", 0).dtype == dtype
    assert torch.equal(batch.image_tokens, expected.float())
    assert batch.image_tokens.dtype == batch.text_tokens.dtype == batch.pixels.dtype == torch.float32


@pytest.mark.parametrize("store", [True, False])
def test_nothing_comes_out_as_an_inference_tensor(model, store):
    with torch.inference_mode():
        data = freeze(model, samples(2), store=store)
    batch = data.batch(torch.tensor([0]))
    given = (batch.image_tokens, batch.text_tokens, batch.pixels, data.text.table, *data.shards[0].tensors.values())
    assert not any(t.is_inference() for t in given)


BAD = [
    (dict(boxes=((5.0, 5.0, 5.0, 9.0),)), "ocr.csv:4: empty box"),
    (dict(boxes=((5.0, 5.0, 190.0, 9.0),)), "ocr.csv:4: .*outside its image"),
    (dict(boxes=()), "ocr.csv:4: the sample has no box"),
    (dict(text=""), "ocr.csv:4: the text '' has no tokens"),
    (dict(image="/nowhere/page.jpg"), "ocr.csv:4: image /nowhere/page.jpg"),
]


def bad(fields):
    return Sample(**dict(image=unique_page(), text="a", boxes=((0.0, 0.0, 5.0, 5.0),), id="ocr.csv:4") | fields)


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_samples_stop_with_their_name(model, fields, message):
    with pytest.raises(InputError, match=f"{message}.*; RProbe.broken = .skip. leaves out"):
        freeze(model, [*samples(1), bad(fields)])


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_samples_are_left_out_counted_and_told(model, fields, message):
    first, last = samples(2)
    with pytest.warns(UserWarning, match=f"leaves out 1 of 3 samples; the first: {message}"):
        data = freeze(model, [first, bad(fields), last], broken="skip")
    assert len(data) == len(data.labels) == len(data.samples) == len(data.counts) == 2
    assert data.samples[1] is last
    assert data.samples[0:2] == [first, last]
    assert len(data.skipped) == 1
    whole = freeze(model, [first, last])
    assert torch.equal(targets_of(data), targets_of(whole))
    with pytest.raises(InputError, match=message):  # what was written with "skip" does not loosen "stop"
        freeze(model, [first, bad(fields), last])


def test_one_bad_line_of_a_page_leaves_the_others(model):
    page = unique_page()
    boxes = [(0.0, 0.0, 0.0, 9.0), (0.0, 0.0, 20.0, 9.0), (30.0, 0.0, 90.0, 9.0), (0.0, 30.0, 9.0, 40.0)]
    lines = [Sample(page, "a", (box,), id=str(i)) for i, box in enumerate(boxes)]
    with pytest.warns(UserWarning, match="leaves out 2 of 4 samples; the first: 0: empty box"):
        data = freeze(model, lines, broken="skip")
    assert [label[0] for label in data.labels] == ["1", "3"]
    assert images(data) == 1


def test_a_picture_whose_file_ends_early_is_a_bad_sample(model, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval's import sets it
    unique_page().resize((300, 300)).save(tmp_path / "page.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "page.jpg").read_bytes()[:2000])
    with Image.open(tmp_path / "cut.jpg") as image:
        with pytest.raises(InputError, match=r"ocr.csv:4: .*cannot be read"):
            freeze(model, [bad(dict(image=image))])


def test_no_usable_sample_left(model):
    with pytest.raises(InputError, match=r"none of the 2 samples can be used; the first: ocr.csv:4: empty box"):
        freeze(model, [bad(BAD[0][0]), bad(BAD[3][0])], broken="skip")


def test_a_box_smaller_than_a_patch_is_kept(model):
    assert freeze(model, samples(1, box=(20.0, 20.0, 20.5, 20.5))).counts.tolist() == [1]


def test_no_sample_left(model):
    with pytest.raises(InputError, match="got no samples"):
        freeze(model, [])


def test_wrong_tokenizer_and_broken_features_are_noticed(model):
    with pytest.raises(InputError, match="gives id 5000, the model embeds 120 tokens"):
        freeze(model, samples(1), tokenizer=lambda text, add_special_tokens: {"input_ids": [5000]})
    broken = tiny_model()
    torch.nn.init.constant_(broken.model.multi_modal_projector.linear_2.bias, float("inf"))
    with pytest.raises(HostError, match="not finite"):
        freeze(broken, samples(1))


def test_tiny_tower_is_what_these_tests_think(model):
    assert find(model).grid == (SIDE // 14, SIDE // 14)


WIDE, SHORT = (30.0, 100.0, 70.0, 112.0), (30.0, 100.0, 50.0, 112.0)  # their windows are 32 pixels wide
WINDOW = (24, 90, 56, 122)  # of the second


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", ["resize", "pad"])
def test_a_sample_of_a_window_is_frozen_as_one_that_was_cut_by_hand(model, mode, masked):
    page, other = unique_page(200, 300), (0.0, 80.0, 40.0, 95.0)
    lines = [Sample(page, "a", (SHORT,), (SHORT, other, (150.0, 0.0, 190.0, 20.0)), id="0")]
    by_hand = Sample(page.crop(WINDOW), "a", ((6.0, 10.0, 26.0, 22.0),), ((6, 10, 26, 22), (0, 0, 16, 5)), id="0")
    got = freeze(model, lines, "window", masked=masked)
    expected = freeze(model, [by_hand], mode, masked=masked)
    for name in ("tokens", "pixels", "target", "cells", "boxes", "positions"):
        assert torch.equal(got.shards[0].rows(name, 0), expected.shards[0].rows(name, 0)), name
    assert torch.equal(got.inside(torch.tensor([0])), expected.inside(torch.tensor([0])))
    assert got.regions_cut == 0 and got.key != expected.key
    if masked:
        full = freeze(model, lines, "window")
        assert torch.equal(targets_of(full), targets_of(got)) and not torch.equal(tokens_of(full), tokens_of(got))


def test_lines_share_tokens_only_where_their_windows_are_equal(model):
    page = unique_page(200, 300)
    boxes = [SHORT, (30.0, 150.0, 50.0, 162.0), (32.0, 100.0, 48.0, 112.0), SHORT]
    lines = [Sample(page, "a", (box,), id=str(i)) for i, box in enumerate(boxes)]
    data = freeze(model, lines, "window")
    assert images(data) == 2 and images(freeze(model, lines, "pad")) == 1
    assert [int(data.shards[0].tensors["sample_image"][row]) for _, row in data.places] == [0, 1, 0, 0]
    for i in range(4):
        alone = freeze(model, lines[i : i + 1], "window")
        assert torch.equal(tokens_of(data)[i], tokens_of(alone)[0])
        assert torch.equal(targets_of(alone), data.batch(torch.tensor([i])).pixels)


def test_a_store_of_windows_is_found_again_and_by_its_height_alone(model, monkeypatch):
    from llava_patch.measurements.rprobe.store import freeze as module

    encoded = []
    encode = module.encode
    monkeypatch.setattr(module, "encode", lambda *args: encoded.append(args) or encode(*args))
    lines = [Sample(unique_page(200, 300), "a", (SHORT,), id="own store")]
    anatomy = find(model)

    def times(height):
        before = len(encoded)
        transform = make_transform(anatomy, processor(), "window", height)
        freeze_samples(Encoder(anatomy, transform, Characters()), lines, RProbe())
        return len(encoded) - before

    assert [times(height) for height in (1.25, 1.25, 1.3, 1.25)] == [1, 0, 1, 0]


def test_regions_of_which_only_the_beginning_is_shown_are_counted_and_told(model):
    page = unique_page(200, 300)
    lines = [Sample(page, "a", (box,), id=str(i)) for i, box in enumerate((WIDE, SHORT))]
    for _ in range(2):  # and again from the store
        with pytest.warns(
            UserWarning, match="only the beginning of the regions of 1 of 2 samples: .*text_height = 1.5"
        ):
            data = freeze(model, lines, "window")
        assert data.regions_cut == 1
    beginning = Sample(page.crop((30, 90, 62, 122)), "a", ((0.0, 10.0, 32.0, 22.0),), id="0")
    expected = freeze(model, [beginning], "pad")
    assert torch.equal(data.batch(torch.tensor([0])).pixels, targets_of(expected))
    assert torch.equal(tokens_of(data)[0], tokens_of(expected)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert freeze(model, lines, "pad").regions_cut == 0


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_samples_of_windows_are_left_out_too(model, fields, message):
    first, last = samples(2)
    with pytest.warns(UserWarning, match=f"leaves out 1 of 3 samples; the first: {message}"):
        data = freeze(model, [first, bad(fields), last], "window", broken="skip")
    assert [label[0] for label in data.labels] == [first.id, last.id]
    with pytest.raises(InputError, match=f"{message}.*; RProbe.broken = .skip. leaves out"):
        freeze(model, [first, bad(fields)], "window")
