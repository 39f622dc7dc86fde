"""Batches: ragged images, their order, text boxes, and the moments of the targets."""

import numpy as np
import pytest
import torch
from PIL import Image

from llava_patch.core.errors import HostError
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.store import freeze, shard
from llava_patch.measurements.rprobe.store.freeze import Encoder, freeze_samples
from llava_patch.probe.sample import Sample
from llava_patch.probe.sequence import TokenGrid
from llava_patch.probe.view import View, make_transform
from tests.support.probes import HIDDEN, Characters, made_up, processor, samples, targets_of, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def freeze_list(model, data, **settings):
    anatomy = find(model)
    return freeze_samples(
        Encoder(anatomy, make_transform(anatomy, processor(), "resize"), Characters()), data, RProbe(**settings)
    )


@pytest.fixture
def ragged(monkeypatch):
    """Images with one token more each: context in front of the 4 x 4 cells, the last of which has none on image 2."""
    views = []

    def encode_views(anatomy, transform, images):
        generator = torch.Generator().manual_seed(len(views))
        for _ in images:
            number = len(views)
            extra = number + 1
            cells = torch.cat([torch.full((extra,), -1), torch.arange(16 if number != 2 else 15)])
            places = torch.cat([torch.full((extra, 2), 1.5), TokenGrid(4, 4, 14).positions()])[: len(cells)]
            tokens = torch.randn(len(cells), HIDDEN, generator=generator).to(torch.bfloat16)
            added = torch.randn(2, len(cells), HIDDEN, generator=generator).to(torch.bfloat16)
            views.append(View(TokenGrid(4, 4, 14), places, cells, tokens, added))
        return views[-len(images) :]

    monkeypatch.setattr(shard, "encode_views", encode_views)
    return views


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("shard", [1, 2, 32])
def test_ragged_images_keep_their_tokens_places_and_features(model, ragged, monkeypatch, store, shard):
    monkeypatch.setattr(freeze, "SHARD_IMAGES", shard)
    data = freeze_list(model, samples(3), store=store)
    order = [2, 0, 1]
    batch = data.batch(torch.tensor(order))
    assert batch.image_tokens.shape == (3, 18, HIDDEN)
    assert batch.injections.shape == (3, 2, 18, HIDDEN)
    for row, image in enumerate(order):
        view = ragged[image]
        count = len(view.tokens)
        assert torch.equal(batch.image_tokens[row, :count], view.tokens.float())
        assert torch.equal(batch.injections[row, :, :count], view.injections.float())
        assert not batch.image_tokens[row, count:].any() and not batch.injections[row, :, count:].any()
        # In the sequence: context, text, targets; each where its view says.
        valid = int(batch.sequence.valid[row].sum())
        slots = batch.sequence.order[row, :valid]
        is_image = slots < 18
        assert sorted(slots[is_image].tolist()) == list(range(count))
        assert torch.equal(batch.sequence.positions[row, :valid][is_image], view.positions[slots[is_image]])
        targets = slots[batch.sequence.target[row, :valid]]
        assert view.cells[targets].tolist() == data.cells_of(image).tolist() == [4, 5, 6]


def test_a_box_that_only_lies_under_missing_tokens_is_a_bad_sample(model, ragged):
    first, second, third = samples(3)
    last = Sample(third.image, "x", ((50.0, 50.0, 55.0, 55.0),), id="corner")
    with pytest.warns(UserWarning, match="leaves out 1 of 3 samples; the first: corner: no visual token"):
        data = freeze_list(model, [first, second, last], broken="skip")
    assert len(data) == 2


def test_inside_names_the_pixels_whose_centre_lies_in_a_text_box(model):
    """Boxes are painted white on a black page of the tower's own size: inside is what is white."""
    page = np.zeros((56, 56, 3), np.uint8)
    boxes = ((2.0, 3.0, 20.0, 12.0), (18.0, 9.0, 41.0, 17.0), (50.0, 50.0, 55.0, 56.0))
    for x0, y0, x1, y1 in boxes:
        page[int(y0) : int(y1), int(x0) : int(x1)] = 255
    picture = Image.fromarray(page)
    data = freeze_list(
        model,
        [
            Sample(picture, "a", boxes[:1], boxes, id="a"),
            Sample(picture, "b", boxes[1:2], (boxes[0], boxes[2], (80.0, 0.0, 90.0, 5.0)), id="b"),
            Sample(picture, "c", boxes[2:], id="c"),
        ],
    )
    batch = data.batch(torch.tensor([1, 0]))
    white = batch.pixels.unflatten(-1, (-1, 3))[..., 0] > 0
    inside = data.inside(torch.tensor([1, 0]))
    assert inside.dtype == torch.bool
    assert inside.any() and not inside.all()
    assert torch.equal(inside, white)
    assert int(data.inside(torch.tensor([2])).sum()) == 5 * 6  # its own box alone
    parts = freeze_list(model, [Sample(picture, "d", ((2.4, 3.0, 5.6, 5.0),), id="d")])
    assert int(parts.inside(torch.tensor([0])).sum()) == 4 * 2  # the centres of columns 2 to 5


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_moments_of_the_targets(monkeypatch, chunk):
    monkeypatch.setattr("llava_patch.measurements.rprobe.store.freeze.CHUNK", chunk)
    data = made_up(10, 3, "true")
    pixels = targets_of(data).double() * 5 + 1000  # a variance small beside the mean
    data.shards[0].tensors["pixels"] = pixels.float()
    pixels = pixels.float().double()
    assert data.target_mean.dtype == torch.float32
    assert torch.allclose(data.target_mean.double(), pixels.mean(0), rtol=1e-7)
    # Streamed and direct sums in float64 differ by rounding alone.
    assert data.target_variance == pytest.approx(float(pixels.var(0, correction=0).mean()), rel=1e-10)


def test_features_that_are_not_finite_are_refused(model):
    broken = tiny_model()
    torch.nn.init.constant_(broken.model.multi_modal_projector.linear_2.bias, float("inf"))
    with pytest.raises(HostError, match="not finite"):
        freeze_list(broken, samples(1))
