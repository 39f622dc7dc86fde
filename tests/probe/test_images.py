import io

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from llava_patch.core.errors import InputError
from llava_patch.probe import sample as images
from llava_patch.probe.sample import (
    EncodedImage,
    Sample,
    image_size,
    open_rgb,
    size_and_orientation,
    to_rgb,
    upright_box,
)  # fmt: skip

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def opened(path):
    return np.asarray(Sample(path, "x", ((0, 0, 1, 1),), id="list:1").open_image())


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled_not_cut_off(tmp_path, suffix):
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / f"deep.{suffix}")
    found = opened(tmp_path / f"deep.{suffix}")
    assert np.array_equal(found, np.repeat(RAMP[..., None], 3, 2))


def test_grey_one_bit_and_palette_are_what_they_show(tmp_path):
    grey = Image.fromarray(RAMP)
    grey.save(tmp_path / "grey.png")
    grey.convert("1").save(tmp_path / "bit.png")
    colours = Image.merge("RGB", [grey, grey.rotate(90), grey.rotate(180)])
    palette = colours.quantize(256)
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(opened(tmp_path / "grey.png")[..., 1], RAMP)
    assert set(np.unique(opened(tmp_path / "bit.png"))) == {0, 255}
    assert np.array_equal(opened(tmp_path / "palette.png"), np.asarray(palette.convert("RGB")))


def test_what_is_transparent_shows_white_paper(tmp_path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = 200, 0, 0, 255
    pixels[0, 1] = 200, 0, 0, 128
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    found = opened(tmp_path / "rgba.png")
    assert found[0, 0].tolist() == [200, 0, 0]
    assert np.abs(found[0, 1].astype(int) - [227, 127, 127]).max() <= 1
    assert found[1].min() == 255  # transparent black
    Image.fromarray(pixels[..., [0, 3]].copy(), "LA").save(tmp_path / "la.png")
    assert opened(tmp_path / "la.png")[1].min() == 255
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png", transparency=0)
    assert opened(tmp_path / "p.png")[0].tolist() == [[255] * 3, [9] * 3]


def test_cmyk_and_the_first_page(tmp_path):
    Image.new("CMYK", (4, 3), (0, 0, 0, 255)).save(tmp_path / "cmyk.jpg")
    assert opened(tmp_path / "cmyk.jpg").max() < 10
    first, second = Image.new("RGB", (4, 3), (1, 2, 3)), Image.new("RGB", (9, 9), (7, 7, 7))
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[second])
    assert opened(tmp_path / "pages.tif")[0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_opened_as_viewers_show_them(tmp_path, orientation, suffix):
    """PIL's own turning is the reference; sizes and boxes of stored pixels follow."""
    values = np.zeros((24, 40, 3), np.uint8)
    values[4:8, 8:24] = 255
    stored, path = Image.fromarray(values), tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    found = opened(path)
    assert np.array_equal(found, expected)
    assert image_size(path, "x") == found.shape[1::-1] == ((40, 24) if orientation < 5 else (24, 40))
    assert size_and_orientation(path, "x")[1] == orientation
    x0, y0, x1, y1 = map(int, upright_box((8, 4, 24, 8), (40, 24), orientation))
    assert (x1 - x0) * (y1 - y0) == 64 and found[y0:y1, x0:x1].min() > 150


def test_damaged_exif_data_and_pictures_in_memory_are_taken_as_they_are(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "odd.jpg", exif=b"Exif\0\0nothing of the kind")
    assert image_size(tmp_path / "odd.jpg", "x") == (30, 20)
    assert opened(tmp_path / "odd.jpg").shape == (20, 30, 3)
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        assert image_size(image, "x") == (30, 20) and opened(image).shape == (20, 30, 3)


def test_grey_of_unknown_range_is_refused(tmp_path):
    for name, values in (("f", np.ones((2, 2), np.float32)), ("i", np.full((2, 2), 70_000, np.int32))):
        Image.fromarray(values).save(tmp_path / f"{name}.tif")
        with pytest.raises(InputError, match=rf"list:1: .*{name}.tif .*what value is white"):
            opened(tmp_path / f"{name}.tif")
    assert to_rgb(Image.fromarray(np.full((2, 2), 65535, np.int32))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("lenient", [False, True])
def test_a_file_cut_short_and_one_too_large_are_named(tmp_path, monkeypatch, lenient):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)  # as lmms-eval's import sets it
    whole = io.BytesIO()
    Image.effect_noise((60, 60), 90).save(whole, "JPEG")
    (tmp_path / "short.jpg").write_bytes(whole.getvalue()[:-400])
    assert image_size(tmp_path / "short.jpg", "x") == (60, 60)  # the header is sound
    with pytest.raises(InputError, match=r"list:1: image .*short.jpg cannot be read: .*truncated"):
        opened(tmp_path / "short.jpg")
    assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES
    (tmp_path / "sound.jpg").write_bytes(whole.getvalue())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"list:1: image .*sound.jpg .*scale it down"):
        opened(tmp_path / "sound.jpg")
    with pytest.raises(InputError, match=r"here: image .*none.jpg cannot be read: it is missing"):
        image_size(tmp_path / "none.jpg", "here")


def test_the_last_files_stay_decoded_until_they_change(tmp_path, monkeypatch):
    file = tmp_path / "page.png"
    Image.new("RGB", (5, 4), (1, 1, 1)).save(file)
    first = open_rgb(file, "x")
    first.putpixel((0, 0), (99, 99, 99))  # ours to change
    count = []
    monkeypatch.setattr(images, "to_rgb", lambda image: count.append(1) or to_rgb(image))
    assert open_rgb(file, "x").getpixel((0, 0)) == (1, 1, 1)
    assert not count
    Image.new("RGB", (6, 4), (2, 2, 2)).save(file)
    assert open_rgb(file, "x").size == (6, 4)
    assert count
    assert images._decoded.cache_info().maxsize <= 4


def test_an_image_inside_another_file(tmp_path):
    stream = io.BytesIO()
    Image.new("L", (7, 5), 3).save(stream, "PNG")
    source = EncodedImage("rows:3", stream.getvalue)
    assert image_size(source, "x") == (7, 5)
    assert open_rgb(source, "x").getpixel((0, 0)) == (3, 3, 3)
    with pytest.raises(InputError, match="here: image rows:4 cannot be read"):
        open_rgb(EncodedImage("rows:4", lambda: b"no image"), "here")
