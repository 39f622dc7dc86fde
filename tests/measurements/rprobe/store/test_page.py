"""`RProbe.page`: a window's page is a second image in front of it, and nothing of a masked region is on either."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from llava_patch.hosts.anatomy import find
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.store.freeze import Encoder, freeze_samples
from llava_patch.probe.sample import Sample
from llava_patch.probe.view import encode_views, make_transform
from tests.measurements.rprobe.test_fit import QUICK, run
from tests.support.probes import Characters, processor, samples, tiny_model, unique_page

WIDE, TALL = (200, 300), (300, 24)
BOXES = {WIDE: (30.0, 100.0, 50.0, 112.0), TALL: (30.0, 6.0, 50.0, 18.0)}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def batch_of(model, picture, box, **settings):
    anatomy = find(model)
    encoder = Encoder(anatomy, make_transform(anatomy, processor(), "window"), Characters())
    lines = [Sample(picture, "ab", (box,), id="p")]
    return freeze_samples(encoder, lines, RProbe(image_mode="window", store=False, **settings)).batch(torch.tensor([0]))


def in_order(batch, what):
    """Image tokens, or their places, in the order in which the host gives them."""
    if what == "tokens":
        return batch.image_tokens[0]
    places = torch.empty_like(batch.sequence.positions[0])
    places[batch.sequence.order[0]] = batch.sequence.positions[0]
    return places[: batch.image_tokens.shape[1]]


def test_the_pages_tokens_stand_in_front_of_the_windows_and_the_targets_stay(model):
    page = unique_page(*WIDE)
    alone, both = (batch_of(model, page, BOXES[WIDE], page=page_too) for page_too in (False, True))
    (whole,) = encode_views(find(model), make_transform(find(model), processor(), "resize"), [page])
    assert torch.equal(in_order(both, "tokens"), torch.cat([whole.tokens.float(), in_order(alone, "tokens")]))
    assert torch.equal(in_order(both, "places")[16:], in_order(alone, "places"))
    assert torch.equal(both.pixels, alone.pixels) and torch.equal(both.counts, alone.counts)
    assert both.sequence.positions[0][both.sequence.valid[0]].max() > both.sequence.positions[0, :16].max()  # the text


@pytest.mark.parametrize("size", [WIDE, TALL])
def test_a_page_lies_around_its_window(model, size):
    """The place of each token of the page, computed again from where its middle lies on the page, pixel by pixel."""
    page = unique_page(*size)
    places = in_order(batch_of(model, page, BOXES[size], page=True), "places")
    window = make_transform(find(model), processor(), "window").window_of(Sample(page, "ab", (BOXES[size],), id="p"))
    left, top, right, bottom = window.box
    side = max(window.size)
    for token in range(16):
        x, y = (token % 4 + 0.5) / 4 * size[0], (token // 4 + 0.5) / 4 * size[1]
        x, y = x - left + (side - (right - left)) // 2, y - top + (side - (bottom - top)) // 2
        expected = torch.tensor([y / side * 4 - 0.5, x / side * 4 - 0.5])
        torch.testing.assert_close(places[token], expected, rtol=1e-5, atol=1e-5)  # float32 on the other side


def test_nothing_of_a_masked_region_is_on_the_page_either(model):
    first = unique_page(*WIDE)
    other = first.copy()
    ImageDraw.Draw(other).rectangle((30, 100, 49, 111), fill=(250, 5, 120))  # all of the region, nothing beside it
    changed = np.asarray(first) != np.asarray(other)
    assert changed[100:112, 30:50].any() and not np.delete(changed, range(100, 112), axis=0).any()
    seen = [batch_of(model, page, BOXES[WIDE], page=True, masked=True) for page in (first, other)]
    assert torch.equal(seen[0].image_tokens, seen[1].image_tokens)
    assert not torch.equal(seen[0].pixels, seen[1].pixels)  # the targets are of the page as it is
    open_ = [batch_of(model, page, BOXES[WIDE], page=True) for page in (first, other)]
    assert not torch.equal(open_[0].image_tokens[:, :16], open_[1].image_tokens[:, :16])


def test_a_run_trains_and_maps_with_pages_and_is_another_run_than_without():
    small = [
        dataclasses.replace(
            sample, image=sample.image.resize((224, 224), Image.Resampling.NEAREST), boxes=((20.0, 60.0, 40.0, 74.0),),
            all_boxes=(),
        )
        for sample in samples(10)
    ]  # fmt: skip
    settings = dataclasses.replace(QUICK, image_mode="window", maps=1)
    alone = run(tiny_model(), settings, samples=small)
    both = run(tiny_model(), dataclasses.replace(settings, page=True), samples=small)
    assert both.settings["page"] and not alone.settings["page"]
    assert len(both.maps) == 1 and both.mse != alone.mse


def test_its_store_is_its_own(model, monkeypatch, tmp_path):
    monkeypatch.setenv("LLAVA_PATCH_CACHE", str(tmp_path))
    anatomy = find(model)
    encoder = Encoder(anatomy, make_transform(anatomy, processor(), "window"), Characters())
    lines = [Sample(unique_page(*WIDE), "ab", (BOXES[WIDE],), id="p")]
    counts = [
        freeze_samples(encoder, lines, RProbe(image_mode="window", page=page))
        .batch(torch.tensor([0]))
        .image_tokens.shape[1]
        for page in (False, True, False, True)
    ]
    assert counts == [16, 32, 16, 32]
