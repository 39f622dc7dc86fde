import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from llava_patch.hosts.anatomy import find
from llava_patch.measurements.rprobe import error_map
from llava_patch.measurements.rprobe.error_map import error_maps, pieces
from llava_patch.measurements.rprobe.fit import run_rprobe
from llava_patch.measurements.rprobe.output import write_run
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.store.freeze import Encoder, freeze_samples
from llava_patch.probe.sample import Sample
from llava_patch.probe.sequence import patchify
from llava_patch.probe.transform import Plane, picture
from llava_patch.probe.view import encode_views, make_transform
from tests.support import zoo
from tests.support.probes import SIDE, Characters, processor, samples, tiny_model, unique_page
from tests.support.views import anyres_model, noise

FIRST, SECOND, THIRD = (0.0, 0.0, 30.0, 10.0), (0.0, 20.0, 20.0, 27.0), (30.0, 44.0, 56.0, 50.0)


class Grey(torch.nn.Module):
    """Answers with one value a target, which says whether text went before: 1 for the unknown token, else 2."""

    def __init__(self, unknown):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.unknown = unknown

    def forward(self, image_tokens, text_tokens, sequence, injections=None):
        silent = (text_tokens[:, 0] == self.unknown).all(-1)
        values = torch.where(silent, 1.0, 2.0).repeat_interleave(sequence.target.sum(1))
        return values[:, None].expand(-1, 588).clone()


@pytest.fixture
def page():
    image = unique_page()
    boxes = (FIRST, SECOND, THIRD)
    return [
        Sample(image, "one", (FIRST,), boxes, "p:1", "p", all_texts=("one", "two", "")),
        Sample(Image.new("RGB", (SIDE, SIDE)), "other page of the document", (FIRST,), (FIRST,), "p:2", "p"),
    ]


def measured(page, mode="resize", **settings):
    anatomy = find(tiny_model())
    transform = make_transform(anatomy, processor(), mode)
    settings = RProbe(maps=1, store=False, **settings)
    data = freeze_samples(Encoder(anatomy, transform, Characters()), page, settings)
    documents = [{"mse": 1.0, "tokens": 3} for _ in page]
    probe = Grey(anatomy.embed_tokens.weight[0].detach())
    maps, notes = error_maps(probe, Encoder(anatomy, transform, Characters()), data, documents, settings)
    assert notes == []
    return maps, transform


def test_every_cell_is_rebuilt_once_and_measured_against_its_own_pixels(page):
    (found,), transform = measured(page)
    assert found.id == "p"
    # Cells are 14 pixels: the boxes touch (row 0, columns 0-2), (row 1, columns 0-1), (row 3, columns 2-3).
    text = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]], dtype=bool)
    assert (found.text == text).all()
    spoken = text.copy()
    spoken[3] = False  # the third box has no transcript
    assert (found.spoken == spoken).all()
    plane = Plane.of(transform, page[0].image, 588)
    patches = patchify(plane.pixels[None], plane.grid)[0]
    answer = torch.from_numpy(np.where(spoken, 2.0, 1.0)).reshape(-1, 1)
    expected = (answer - patches).square().mean(-1).reshape(4, 4).numpy()
    assert found.error == pytest.approx(expected, rel=1e-5)
    assert found.inside_mse == pytest.approx(expected[text].mean(), rel=1e-5)
    assert found.outside_mse == pytest.approx(expected[~text].mean(), rel=1e-5)
    assert (found.original == picture(patches[None], plane.grid, transform)).all()
    painted = answer.float().expand(16, 588)[None]
    assert (found.rebuilt == picture(painted, plane.grid, transform)).all()


def test_masked_and_silent_settings_hold_for_the_map_too(page):
    (found,), _ = measured(page, masked=True, text=False)
    assert not found.spoken.any()
    assert not np.isnan(found.error).any()


def test_padding_is_left_out_and_boxes_go_where_the_page_goes():
    wide = Sample(unique_page(112, 56), "one", ((2.0, 2.0, 20.0, 20.0),), ((2.0, 2.0, 20.0, 20.0),), "w", "w")
    (found,), _ = measured([wide], "pad")
    assert np.isnan(found.error[[0, 3]]).all() and not np.isnan(found.error[1:3]).any()
    assert found.boxes[0] == pytest.approx((1, 15, 10, 24))
    assert found.stretch == pytest.approx(1.0)
    (cut,), _ = measured([Sample(wide.image, "one", ((50.0, 2.0, 60.0, 20.0),), wide.boxes, "w", "w")], "crop")
    assert len(cut.boxes) == 1  # the other one is cropped away
    assert not np.isnan(cut.error).any()
    (squeezed,), _ = measured([wide])
    assert squeezed.stretch == pytest.approx(0.5)


@pytest.mark.parametrize("mode", ["resize", "pad", "crop"])
@pytest.mark.parametrize("size", [(56, 56), (113, 57), (90, 400)])
def test_a_cells_own_box_touches_that_cell_alone(mode, size):
    transform = make_transform(find(tiny_model()), processor(), mode)
    plane = Plane.of(transform, unique_page(*size), 588)
    for cell in range(plane.grid.tokens):
        box = plane.original(cell)
        if box is None:
            assert mode == "pad"
            continue
        assert plane.cells([plane.box(box, "c")]).nonzero().flatten().tolist() == [cell]


def test_pieces_name_each_region_once(page):
    transform = make_transform(find(tiny_model()), processor(), "resize")
    known, rest = pieces(page[:1], Plane.of(transform, page[0].image, 588), torch.ones(16).bool())
    assert [(s.text, s.boxes) for s in known] == [("one", (FIRST,)), ("two", (SECOND,))]
    assert rest[0].boxes == (THIRD,)
    assert sum(len(s.boxes) for s in rest[1:]) == 16 - 3 - 2 - 2
    assert max(len(s.boxes) for s in rest) <= 3
    seen = torch.ones(16).bool()
    seen[[4, 5, 14, 15]] = False  # all of the second and third box
    known, rest = pieces(page[:1], Plane.of(transform, page[0].image, 588), seen)
    assert [s.boxes for s in known] == [(FIRST,)]
    assert THIRD not in rest[0].boxes and sum(len(s.boxes) for s in rest) == 16 - 3 - 4


def test_no_maps_when_none_are_asked_for(page):
    assert error_maps(None, None, None, [], RProbe(maps=0)) == ([], [])


SHORT = RProbe(steps=1, batch_size=4, maps=2, examples=0, resamples=10, heldout_share=0.5, store=False, threshold=1e-6)


def shown(model, image_processor, data, tokenizer=None, **settings):
    """The maps of a run in which nothing is left out and nothing goes wrong; the cells of a page that have a token."""
    settings = dataclasses.replace(SHORT, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(leaves out|error map)")
        result = run_rprobe(model, image_processor, tokenizer or Characters(), settings, data, progress=False)
    anatomy = find(model)
    (view,) = encode_views(anatomy, make_transform(anatomy, image_processor, settings.image_mode), [data[0].image])
    seen = torch.zeros(view.grid.tokens, dtype=torch.bool)
    seen[view.cells[view.cells >= 0]] = True
    assert len(result.maps) == 2
    return result.maps, seen.reshape(view.grid.rows, view.grid.columns).numpy()


@pytest.mark.parametrize("broken", ["stop", "skip"])
@pytest.mark.parametrize("host", ["hf", "llava"])
def test_cells_whose_token_anyres_cuts_off_stay_grey(tmp_path, host, broken):
    model, image_processor = anyres_model(host, tmp_path)
    boxes = ((60.0, 18.0, 70.0, 22.0),)
    data = [Sample(noise(130, 40, i), "AB", boxes, boxes, f"s{i}") for i in range(4)]
    maps, seen = shown(model, image_processor, data, image_mode="anyres", broken=broken)
    plane = Plane.of(make_transform(find(model), image_processor, "anyres"), data[0].image, 588)
    dropped = [cell for cell in (~seen).flatten().nonzero()[0] if plane.original(cell) is not None]
    assert dropped  # cells with pixels of the page but no token
    for found in maps:
        assert np.array_equal(np.isnan(found.error), ~seen)


@pytest.mark.parametrize("broken", ["stop", "skip"])
def test_a_first_patch_that_the_host_drops_stays_grey(broken):
    model = zoo.hf_model("siglip", strategy="default")
    cell, first = (20.0, 20.0, 22.0, 22.0), (1.0, 1.0, 5.0, 5.0)  # nothing can be rebuilt under the second
    data = [Sample(noise(56, 56, i), "AB", (cell,), (cell, first), f"s{i}", "", ("AB", "first")) for i in range(4)]
    maps, seen = shown(model, processor(), data, broken=broken)
    assert not seen[0, 0] and seen.sum() == 15
    for found in maps:
        assert np.array_equal(np.isnan(found.error), ~seen)
        assert found.text[0, 0] and found.inside_mse == pytest.approx(found.error[1, 1])
        assert found.spoken.sum() == 1


def test_a_page_on_which_nothing_is_left_but_dropped_cells():
    model = zoo.hf_model("siglip", strategy="default")
    boxes = ((0.0, 14.0, 56.0, 56.0), (14.0, 0.0, 56.0, 14.0))
    maps, seen = shown(model, processor(), [Sample(noise(56, 56, i), "AB", boxes, boxes, f"s{i}") for i in range(4)])
    for found in maps:
        assert np.array_equal(np.isnan(found.error), ~seen)
        assert found.outside_mse is None


def test_a_listed_text_without_tokens_stays_grey():
    class Deaf(Characters):
        def __call__(self, text, **kwargs):
            return {"input_ids": []} if text == "two" else super().__call__(text, **kwargs)

    boxes = (FIRST, SECOND)
    data = [Sample(noise(56, 56, i), "one", (FIRST,), boxes, f"s{i}", "", ("one", "two")) for i in range(4)]
    (found, _), _ = shown(tiny_model(), processor(), data, Deaf())
    assert np.isnan(found.error[1, :2]).all() and np.isnan(found.error).sum() == 2
    assert found.inside_mse == pytest.approx(found.error[0, :3].mean())


def test_a_map_that_fails_costs_a_note_and_not_the_result(tmp_path, monkeypatch):
    def go(**settings):
        settings = dataclasses.replace(SHORT, **settings)
        return run_rprobe(tiny_model(), processor(), Characters(), settings, samples(8), progress=False)

    whole, real, calls = go(), error_map._map, []

    def fail_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return real(*args)

    monkeypatch.setattr(error_map, "_map", fail_once)
    with pytest.warns(UserWarning, match="there is no error map of data.jsonl:.: RuntimeError: out of memory"):
        result = go()
    assert len(result.maps) == 1  # the other page has its own
    write_run(result, tmp_path)
    written, expected = json.loads((tmp_path / "rprobe.json").read_text()), whole.to_dict()
    for values in (written, expected):
        del values["facts"]["encode_seconds"], values["facts"]["train_seconds"]
    assert [note for note in written.pop("warnings") if "no error map" in note]
    expected.pop("warnings")
    assert written == json.loads(json.dumps(expected))
    monkeypatch.setattr(error_map, "_map", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        go()


def test_the_map_of_a_window_is_that_of_its_picture():
    """All regions that lie in the first sample's window, each shown in this one window."""
    page = unique_page(200, 300)
    boxes = ((30.0, 100.0, 50.0, 112.0), (26.0, 115.0, 54.0, 121.0), (150.0, 0.0, 190.0, 20.0))
    texts, crop = ("one", "two", "far"), (24, 90, 56, 122)
    lines = [Sample(page, text, (box,), boxes, text, "p", texts) for text, box in zip(texts, boxes, strict=True)]
    moved = tuple(tuple(v - crop[i % 2] for i, v in enumerate(box)) for box in boxes[:2])
    own = [Sample(page.crop(crop), text, (box,), moved, text, "p", texts[:2]) for text, box in zip(texts, moved)]
    for settings in ({}, {"masked": True}):
        (found,), _ = measured(lines, "window", image_mode="window", **settings)
        (expected,), _ = measured(own, "pad", **settings)
        for name in ("original", "rebuilt", "error", "text", "spoken"):
            assert np.array_equal(getattr(found, name), getattr(expected, name)), name
        assert (found.boxes, found.stretch, found.cell) == (expected.boxes, expected.stretch, expected.cell)
        assert found.spoken.any() and not found.spoken.all()
