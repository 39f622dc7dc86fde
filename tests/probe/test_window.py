"""Windows: where they lie, and that a sample of one is the sample that one would cut out by hand."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_patch.core.errors import InputError, SettingError
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.probe.sample import Sample
from llava_patch.probe.transform import Plane, Transform, WindowTransform
from llava_patch.probe.view import encode_views, make_transform
from llava_patch.probe.window import TEXT_HEIGHT, Window
from tests.support.probes import PATCH, SIDE, processor, tiny_model, unique_page
from tests.support.views import anyres_model

BOX = (30.0, 100.0, 50.0, 112.0)  # 12 high: 1.5 of the 4 tokens of 56 pixels each way need 12 of 32 pixels
AROUND = (24, 90, 56, 122)


def transform(text_height: float = TEXT_HEIGHT) -> WindowTransform:
    return WindowTransform(processor(), "window", SIDE, SIDE, PATCH, text_height=text_height)


def line(image: Image.Image, *boxes, **more) -> Sample:
    return Sample(image, "one", boxes or (BOX,), id="p:1", **more)


@st.composite
def regions(draw):
    """(size of a page, the boxes of a region on it)."""
    size = draw(st.tuples(st.integers(1, 400), st.integers(1, 400)))

    def box():
        ends = []
        for length in size:
            low = draw(st.floats(0, length - 0.5))
            ends.append((low, draw(st.floats(low + 0.25, length))))
        (x0, x1), (y0, y1) = ends
        return x0, y0, x1, y1

    return size, tuple(box() for _ in range(draw(st.integers(1, 3))))


@settings(max_examples=300, deadline=None)
@given(regions(), st.floats(0.3, 4.0))
def test_a_window_holds_its_region_at_the_height_that_is_asked_for(case, height):
    size, boxes = case
    made = transform(height)
    window = made.window_of(line(Image.new("RGB", (1, 1)), *boxes), size)
    left, top, right, bottom = window.box
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    side = max(window.size)
    spans = [
        math.ceil(max(b[i + 2] for b in boxes)) - math.floor(min(b[i] for b in boxes)) for i in (0, 1)
    ]  # of whole pixels
    fits = all(span <= length for span, length in zip(spans, window.size, strict=True))
    inside = all(left <= x0 and top <= y0 and x1 <= right and y1 <= bottom for x0, y0, x1, y1 in boxes)
    assert window.whole == fits == inside
    # A page that is smaller than the window is all of it, on that axis.
    assert all(length == min(side, whole) for length, whole in zip(window.size, size, strict=True))
    lowest = min(y1 - y0 for _, y0, _, y1 in boxes)
    scale = SIDE / side
    assert side == 1 or lowest * scale / PATCH >= height * (1 - 1e-9)
    assert side == max(size) or lowest * SIDE / (side + 1) / PATCH < height * (1 + 1e-9)  # and no smaller than needed
    moved = window.moved(boxes[0])
    assert moved is not None  # its beginning, at least
    if fits:
        seen = made.box(moved, window.size, "s")
        assert (seen[3] - seen[1]) / PATCH == pytest.approx((boxes[0][3] - boxes[0][1]) * scale / PATCH)
    else:
        assert math.floor(boxes[0][0]) - left >= 0 <= math.floor(boxes[0][1]) - top


def test_a_region_lies_in_the_middle_unless_the_page_ends():
    page = (200, 300)
    assert transform().window_of(line(unique_page()), page) == Window(AROUND, True)
    for box, expected in (
        ((0.0, 0.0, 20.0, 12.0), (0, 0, 32, 32)),
        ((179.5, 287.7, 200.0, 299.7), (168, 268, 200, 300)),
        ((30.0, 100.0, 90.0, 112.0), (30, 90, 62, 122)),  # 60 wide: the window begins where it begins
        ((190.0, 0.0, 191.0, 300.0), (0, 0, 200, 300)),  # as high as the page: the whole of it
    ):
        assert transform().window_of(line(unique_page(), box), page).box == expected
    # The lowest box counts, and the first begins the window where all do not fit.
    low, high = (34.0, 100.0, 46.0, 106.0), (34.0, 10.0, 46.0, 40.0)
    assert transform().window_of(line(unique_page(), low, high), page) == Window((32, 100, 48, 116), False)


def test_boxes_move_with_their_window_and_keep_their_texts():
    page = unique_page(200, 300)
    sample = line(
        page,
        all_boxes=(BOX, (0.0, 0.0, 9.0, 9.0), (50.0, 80.0, 70.0, 95.5)),
        all_texts=("one", "far", "cut"),
        document="d",
        where="x.csv:1",
    )
    seen = transform().focus(sample)
    assert seen.boxes == ((6.0, 10.0, 26.0, 22.0),)
    assert seen.all_boxes == (seen.boxes[0], (26.0, 0, 32, 5.5))
    assert seen.all_texts == ("one", "cut")
    assert seen.image.tobytes() == page.crop(AROUND).tobytes()
    assert (seen.id, seen.document, seen.where, seen.text) == ("p:1", "d", "x.csv:1", "one")
    assert transform().focus(dataclasses.replace(sample, all_texts=())).all_texts == ()


@pytest.mark.parametrize("mode", ["resize", "pad"])
def test_a_window_is_what_is_cut_by_hand(mode):
    """Of a square window both modes give the same pixels; of one that the page cuts, "pad" does."""
    narrow = mode == "pad"
    page = unique_page(20 if narrow else 200, 300)
    box = (2.0, 100.0, 18.0, 112.0) if narrow else BOX
    crop, by_hand = (0, 90, 20, 122) if narrow else AROUND, Transform(processor(), mode, SIDE, SIDE, PATCH)
    seen = transform().focus(line(page, box))
    assert torch.equal(transform().plane(seen.image), by_hand.plane(page.crop(crop)))
    moved = tuple(v - crop[i % 2] for i, v in enumerate(box))
    assert transform().box(seen.boxes[0], seen.image.size, "s") == by_hand.box(moved, page.crop(crop).size, "s")


def test_large_text_is_shown_as_pad_shows_it():
    page, box = unique_page(90, 200), (10.0, 20.0, 80.0, 120.0)
    seen, pad = transform().focus(line(page, box)), Transform(processor(), "pad", SIDE, SIDE, PATCH)
    assert seen.image.size == page.size and seen.boxes == (box,)
    assert torch.equal(transform().plane(seen.image), pad.plane(page))
    plane = Plane.of(transform(), page, 588)
    assert plane.stretch == 1 and plane.offset == pytest.approx(Plane.of(pad, page, 588).offset)


def test_no_window_loses_its_border_to_a_centre_crop():
    """A processor may resize to more than it crops."""
    wide = processor()
    wide.size = {"shortest_edge": 2 * SIDE}
    seen = transform().focus(line(unique_page(200, 300)))
    assert torch.equal(
        dataclasses.replace(transform(), processor=wide).plane(seen.image), transform().plane(seen.image)
    )


@pytest.mark.parametrize("host", ["hf", "llava"])
def test_models_that_cut_tiles_see_a_window_as_one_square(host, tmp_path):
    model, image_processor = anyres_model(host, tmp_path)
    anatomy, page = find(model), unique_page(200, 300)
    made, pad = (make_transform(anatomy, image_processor, mode) for mode in ("window", "pad"))
    seen = made.focus(line(page)).image
    (window,), (by_hand,) = encode_views(anatomy, made, [seen]), encode_views(anatomy, pad, [page.crop(AROUND)])
    assert torch.equal(window.tokens, by_hand.tokens) and torch.equal(window.cells, by_hand.cells)


def test_what_is_refused():
    with pytest.raises(SettingError, match=r"RProbe.text_height = 4.5: the vision tower's input is 4 tokens high"):
        make_transform(find(tiny_model()), processor(), "window", 4.5)
    assert make_transform(find(tiny_model()), processor(), "window", 4).text_height == 4
    for sample, words in (
        (line(unique_page(), (0, 0, 900, 10)), r"^p:1: box .* outside its image"),
        (Sample(unique_page(), "one", (), id="p:1"), "^p:1: the sample has no box"),
        (Sample("gone.png", "one", (BOX,), id="p:1"), "^p:1: image gone.png cannot be read: it is missing"),
    ):
        with pytest.raises(InputError, match=words):
            transform().window_of(sample)


def test_the_default_height_is_that_of_the_settings():
    assert RProbe().text_height == TEXT_HEIGHT
