import numpy as np
import pytest

from llava_patch.core.errors import SettingError
from llava_patch.data.pages import Pages, font_files, rotated_box, sentences


def test_the_text_is_plain_english():
    text = sentences()
    assert len(text) > 800
    assert len(set(text)) == len(text)
    assert all(4 <= len(s.split()) <= 30 and s[0].isupper() and s[-1] in ".!?:" for s in text)
    assert not any(mark in s for s in text for mark in ("::=", "*", "`", "_", "  "))


def test_every_font_has_its_letters():
    from PIL import ImageFont

    for files in font_files().values():
        for file in files:
            font = ImageFont.truetype(str(file), 24)
            shapes = {bytes(font.getmask(c)) for c in "aegkmswzAQRW0458"}
            assert len(shapes) == 16, f"{file} draws one box for several letters"


def test_same_seed_same_page_whatever_else_is_asked_for():
    a, b = Pages(50, 56, seed=3)[7], Pages(9, 56, seed=3)[7]
    assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
    assert (a.text, a.boxes, a.all_boxes, a.id) == (b.text, b.boxes, b.all_boxes, b.id)
    for other in (Pages(9, 56, seed=4)[7], Pages(9, 56, seed=3, split="heldout")[7], Pages(9, 56, seed=3)[6]):
        assert not np.array_equal(np.asarray(a.image), np.asarray(other.image))
        assert other.id != a.id


def test_splits_share_no_sentence():
    for seed in (0, 1):
        train, held = (set(Pages(1, 56, seed, split).sentences) for split in ("train", "heldout"))
        assert train.isdisjoint(held)
        assert len(train) + len(held) == len(sentences())


@pytest.mark.parametrize(("tower", "count"), [(56, 40), (336, 4)])
def test_boxes_hold_the_ink_and_only_it(tower, count):
    for page in Pages(count, tower, noise=False):
        image = np.asarray(page.image, dtype=np.int32)
        assert image.shape == (2 * tower, 2 * tower, 3)
        paper = image[0, 0]
        ink = np.abs(image - paper).sum(-1) > 60
        inside = np.zeros_like(ink)
        for x0, y0, x1, y1 in page.all_boxes:
            assert 0 <= x0 < x1 <= 2 * tower
            assert 0 <= y0 < y1 <= 2 * tower
            line = slice(int(y0), int(np.ceil(y1))), slice(int(x0), int(np.ceil(x1)))
            inside[line] = True
            assert ink[line].any(0).mean() > 0.4  # no column-wide blanks: the box fits its line
        grown = inside | np.roll(inside, 1, 0) | np.roll(inside, -1, 0) | np.roll(inside, 1, 1) | np.roll(inside, -1, 1)
        assert not (ink & ~grown).any()
        assert page.boxes[0] in page.all_boxes
        assert page.text.strip() == page.text != ""


def test_every_twentieth_page_is_light_on_dark():
    corners = [np.asarray(page.image)[:3, :3].mean() for page in Pages(40, 56, seed=2)]
    assert [i for i, value in enumerate(corners) if value < 128] == [19, 39]


def test_pages_vary():
    pages = list(Pages(60, 56))
    assert len({p.text for p in pages}) > 40
    assert len({len(p.all_boxes) for p in pages}) >= 3
    assert np.std([np.asarray(p.image)[0, 0] for p in pages]) > 5
    lefts = {b[0] < 224 for p in Pages(12, 224) for b in p.all_boxes}
    assert lefts == {True, False}  # two columns on larger pages


def test_pages_are_a_sequence():
    pages = Pages(5, 56)
    assert len(list(pages)) == len(pages) == 5
    assert [p.id for p in pages[1:3]] == [pages[1].id, pages[2].id]
    assert pages[-1].id == pages[4].id
    with pytest.raises(IndexError):
        pages[5]
    with pytest.raises(SettingError, match="split = 'test'"):
        Pages(1, 56, split="test")
    with pytest.raises(SettingError, match="tower_size = 14"):
        Pages(1, 14)


def test_rotated_box_follows_pils_rotation():
    from PIL import Image

    box = (20, 30, 70, 40)
    canvas = Image.new("L", (100, 100))
    canvas.paste(255, box)
    for angle in (8, -8):
        solid = canvas.rotate(angle, Image.Resampling.BICUBIC).point(lambda value: 255 * (value > 127))
        np.testing.assert_allclose(rotated_box(box, angle, 100), solid.getbbox(), atol=1)
