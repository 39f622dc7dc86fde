import warnings
from typing import TypedDict

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw

from llava_patch.core.errors import HostError, InputError
from llava_patch.hosts.compat import known_options
from llava_patch.probe.transform import Transform, black_out, check_box
from tests.support.probes import SIDE, processor

PAPER = (122, 116, 104)  # the colour of padding, so that only the rectangle stands out
SIZES = [(112, 112), (300, 200), (131, 257), (40, 90)]


def rectangle(size, box) -> Image.Image:
    image = Image.new("RGB", size, PAPER)
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=(255, 0, 0))
    return image


def red(pixels: torch.Tensor, transform: Transform) -> np.ndarray:
    """How much of the rectangle's red is in each pixel of [3, height, width], 0..1."""
    mean, std = transform.statistics()
    paper = PAPER[0] / 255
    return (((pixels[0] * std[0] + mean[0]) - paper) / (1 - paper)).numpy()


@pytest.mark.parametrize("name", ["CLIPImageProcessor", "CLIPImageProcessorFast"])
@pytest.mark.parametrize("size", [(200, 1), (200, 3), (1, 200), (3, 200), (3, 3), (1, 1)])
def test_images_of_one_or_three_rows_are_no_channels(name, size):
    """Black on the left, red on the right: what is read must show both, and no other colour."""
    image = Image.new("RGB", size, (255, 0, 0))
    image.paste((0, 0, 0), (0, 0, size[0] // 2, size[1]))
    if name.endswith("Fast"):
        pytest.importorskip("torchvision")
    plain = getattr(transformers, name)(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_normalize=False
    )
    pixels = Transform(plain, "resize", SIDE, SIDE).pixel_values([image])[0]
    assert pixels[0, :, -1].min() > 0.99 and pixels[1:].max() == 0
    if size[0] > 1:
        assert pixels[0, :, 0].max() < 0.01


@pytest.mark.parametrize("mode", ["resize", "crop", "pad"])
@pytest.mark.parametrize("size", SIZES)
def test_a_box_lands_on_the_same_content(mode, size):
    width, height = size
    # In the middle, so that the centre crop keeps it.
    box = (round(0.4 * width), round(0.42 * height), round(0.7 * width), round(0.6 * height))
    transform = Transform(processor(), mode, SIDE, SIDE)
    pixels = transform.pixel_values([rectangle(size, box)])
    assert pixels.shape == (1, 3, SIDE, SIDE)
    assert pixels.dtype == torch.float32
    seen = red(pixels[0], transform)
    x0, y0, x1, y1 = transform.box(box, size, "s")
    # Half of the colour's rise lies at the box's edge, and the weight of the colour is the box's area.
    rows, columns = np.nonzero(seen > 0.5)
    assert abs(columns.min() - x0) <= 1
    assert abs(columns.max() + 1 - x1) <= 1
    assert abs(rows.min() - y0) <= 1
    assert abs(rows.max() + 1 - y1) <= 1
    centre_x = (seen * (np.arange(SIDE) + 0.5)).sum() / seen.sum()
    centre_y = (seen * (np.arange(SIDE)[:, None] + 0.5)).sum() / seen.sum()
    assert abs(centre_x - (x0 + x1) / 2) < 0.35
    assert abs(centre_y - (y0 + y1) / 2) < 0.35


def test_modes_differ_where_they_should():
    """On a tall image: stretched, cropped and padded boxes are three different boxes."""
    boxes = {m: Transform(processor(), m, SIDE, SIDE).box((10, 100, 90, 120), (100, 200), "s") for m in MODES}
    assert boxes["resize"] == pytest.approx((5.6, 28, 50.4, 33.6))
    assert boxes["crop"] == pytest.approx((5.6, 28, 50.4, 39.2))  # 56 x 112, rows 28..84 kept
    assert boxes["pad"] == pytest.approx((16.8, 28, 39.2, 33.6))


MODES = ("resize", "crop", "pad")


def test_pad_is_llavas_own():
    mm_utils = pytest.importorskip("llava.mm_utils")
    from types import SimpleNamespace

    image = rectangle((90, 61), (20, 5, 50, 33))
    theirs = mm_utils.process_images([image], processor(), SimpleNamespace(image_aspect_ratio="pad"))
    assert torch.equal(Transform(processor(), "pad", SIDE, SIDE).pixel_values([image]), theirs)


def test_box_smaller_than_a_pixel_is_kept():
    x0, y0, x1, y1 = Transform(processor(), "resize", SIDE, SIDE).box((500, 500, 501, 501), (1000, 1000), "s")
    assert 0 < x1 - x0 < 1
    assert 0 < y1 - y0 < 1


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((10, 10, 10, 20), "empty box"),
        ((10, 20, 30, 10), "empty box"),
        ((float("nan"), 0, 5, 5), "empty box"),
        ((-20, 0, 20, 20), "outside its image of 100 x 50 pixels by half of it or more: .*copy of another size"),
        ((80, 40, 110, 65), "outside its image"),  # two thirds across, but less than half of it
        ((0, 0, float("inf"), 20), "outside its image"),
        ((0, 0, 10**400, 20), "expected four finite numbers"),
        ((200, 10, 220, 20), "outside its image"),
        ((100.2, 10, 100.9, 20), "outside its image"),
    ],
)
def test_bad_boxes_name_the_sample(box, message):
    with pytest.raises(InputError, match=f"labels.csv:7: .*{message}"):
        Transform(processor(), "resize", SIDE, SIDE).box(box, (100, 50), "labels.csv:7")


def test_what_sticks_out_of_the_image_is_cut_off():
    for box, kept in (
        ((-0.5, 0, 100.5, 51), (0, 0, 100, 50)),
        ((-5, 0, 20, 20), (0, 0, 20, 20)),
        ((10, 10, 20, 52), (10, 10, 20, 50)),
        ((99.5, 0, 100.9, 20), (99.5, 0, 100, 20)),  # mostly outside, by no more than rounding
        ((-10, -5, 110, 60), (0, 0, 100, 50)),  # of 120 x 65
    ):
        assert check_box(box, (100, 50), "s") == kept


def test_box_that_the_crop_cuts_away():
    with pytest.raises(InputError, match=r"page 3: .*centre crop cuts away.*resize"):
        Transform(processor(), "crop", SIDE, SIDE).box((0, 0, 90, 20), (100, 300), "page 3")


def test_another_models_processor_is_noticed():
    with pytest.raises(HostError, match=r"56, 56.*28, 28"):
        Transform(processor(), "crop", 28, 28).pixel_values([Image.new("RGB", (60, 60))])


def test_black_out_covers_every_pixel_that_the_box_touches():
    image = Image.new("RGB", (20, 20), (9, 9, 9))
    masked = np.asarray(black_out(image, [(3.2, 4.0, 7.0, 9.5)]))[..., 0]
    black = np.argwhere(masked == 0)
    assert black.min(0).tolist() == [4, 3]
    assert black.max(0).tolist() == [9, 6]
    assert (masked == 0).sum() == 6 * 4
    assert np.asarray(image).min() == 9


@pytest.mark.parametrize("mode", MODES)
def test_siglips_processor_is_asked_only_for_what_it_knows(mode):
    """It has no centre crop; a name that it does not know would be dropped with a warning."""
    from transformers import SiglipImageProcessor

    siglip = SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    transform = Transform(siglip, mode, SIDE, SIDE)
    image = rectangle((100, 61), (20, 11, 60, 41))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = transform.pixel_values([image])
    assert pixels.shape == (1, 3, SIDE, SIDE)
    seen = red(pixels[0], transform)
    rows, columns = np.nonzero(seen > 0.5)
    x0, y0, x1, y1 = transform.box((20, 11, 60, 41), image.size, "s")
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert max(abs(a - b) for a, b in zip(found, (x0, y0, x1, y1), strict=True)) <= 1


def test_options_of_slow_and_fast_processors():
    from types import SimpleNamespace

    assert {"size", "do_center_crop"} <= known_options(processor())

    class Options(TypedDict, total=False):
        size: int

    class More(Options, total=False):
        do_resize: bool

    assert known_options(SimpleNamespace(valid_kwargs=More)) == {"size", "do_resize"}
