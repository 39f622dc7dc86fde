import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgba
from PIL import Image

from llava_patch.core.errors import InputError, SettingError
from llava_patch.data.pages import Pages
from llava_patch.measurements.rprobe import preview
from llava_patch.measurements.rprobe.preview import choose_shown, clip_like, counts, save_preview
from llava_patch.probe.sample import Sample


def sample(boxes, text="ab", name="s", size=(200, 400), document="d"):
    return Sample(Image.new("RGB", size, (250, 250, 250)), text, tuple(boxes), tuple(boxes), name, document)


def test_counts_are_of_what_is_there():
    # 200 x 400 onto 56 x 56: a box of 100 x 50 becomes 28 x 7, half a token of 14 high.
    data = [
        sample([(0, 0, 100, 50)], "four"),
        sample([(0, 0, 100, 200)], "seven x", document="e"),
        sample([(0, 0, 20, 20)], "a"),
    ]
    found = dict(counts(data, clip_like(56, 14, "resize")))
    assert found["documents"] == "2"
    assert found["text length, characters"] == "median 4, 1 to 7"
    assert found["region height, tokens"] == "median 0.50, 0.20 to 2.00"
    assert found["lower than a token"] == "2 of 3 (67%)"
    assert found["smaller than a token in both"] == "1 of 3 (33%)"
    assert "cut away by crop" not in found
    assert dict(counts(data, clip_like(56, 14, "crop")))["cut away by crop"] == "2 of 3 (67%)"


def test_choice_is_spread_or_named():
    data = [sample([(0, 0, 9, 9)], name=f"/a/{i}.csv:1") for i in range(10)]
    assert [data.index(s) for s in choose_shown(data, 3)] == [1, 5, 8]
    assert choose_shown(data, 99) == data
    assert [data.index(s) for s in choose_shown(data, 3, ["7", "/a/2.csv:1", "4.csv:1"])] == [7, 2, 4]
    for name in ("10", "9.csv:2", "csv:1"):
        with pytest.raises(InputError, match=f"no sample '{name}': there are 0 to 9, such as /a/0.csv:1"):
            choose_shown(data, 3, [name])


def shading(box, mode, monkeypatch, tmp_path):
    """Which cells were shaded, as the figure drew them."""
    drawn = []
    from matplotlib.axes import Axes

    original = Axes.imshow

    def imshow(self, picture, **options):
        if isinstance(picture, np.ndarray) and picture.ndim == 3 and picture.shape[-1] == 4:
            drawn.append(picture[..., 3] > 0)
        return original(self, picture, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Axes, "imshow", imshow)
        save_preview([sample([box])], clip_like(56, 14, mode), tmp_path / "x.png", "t")
    return drawn


def test_shaded_cells_are_the_target(tmp_path, monkeypatch):
    (cells,) = shading((60, 110, 140, 190), "resize", monkeypatch, tmp_path)  # 16.8..39.2, 15.4..26.6
    assert np.argwhere(cells).tolist() == [[1, 1], [1, 2]]
    (cells,) = shading((60, 110, 140, 190), "pad", monkeypatch, tmp_path)  # 22.4..33.6, 15.4..26.6
    assert np.argwhere(cells).tolist() == [[1, 1], [1, 2]]
    (cells,) = shading((0, 110, 40, 190), "pad", monkeypatch, tmp_path)  # 14..19.6
    assert np.argwhere(cells).tolist() == [[1, 1]]
    assert shading((60, 10, 140, 40), "crop", monkeypatch, tmp_path) == []  # cut away
    (cells,) = shading((50, 110, 80, 122), "window", monkeypatch, tmp_path)  # 32 of 200 x 400: 1.75..54.25, 17.5..38.5
    assert np.argwhere(cells).tolist() == [[row, column] for row in (1, 2) for column in range(4)]


@pytest.mark.parametrize("mode", ["resize", "crop", "pad", "window"])
def test_a_row_a_sample_as_png(tmp_path, mode):
    data = [*Pages(1, 56), sample([(5, 5, 90, 20), (5, 300, 90, 380)], "Rent $5, $6\n" + "long text " * 30)]
    path = save_preview(data, clip_like(56, 14, mode), tmp_path / "new" / "p.png", "title $x$")
    picture = matplotlib.image.imread(path)
    one = matplotlib.image.imread(save_preview(data[:1], clip_like(56, 14, mode), tmp_path / "q.png", "t"))
    assert picture.shape[1] == one.shape[1]
    assert 0.8 < (picture.shape[0] - one.shape[0]) / preview.DPI <= preview.HIGHEST + preview.CAPTION
    red = (picture[..., 0] > 0.75) & (picture[..., 1] < 0.3) & (picture[..., 2] < 0.3)
    assert red[: one.shape[0]].sum() > 200
    assert red[one.shape[0] :].sum() > 200


def test_long_names_and_texts_stay_over_their_pictures(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **k: drawn.append(self) or path.touch())
    name = "TextOCR_0.1_train.json:anns[00a1b2c3d4e5f607_112]"
    data = [
        sample([(5, 5, 90, 20)], "MERCHANDISE " * 9, f"folder/{name}", size=size)
        for size in ((300, 200), (100, 400), (400, 40))
    ]
    save_preview(data, clip_like(56, 14, "resize"), tmp_path / "p.png", "t")
    (figure,) = drawn
    figure.canvas.draw()
    titles = [axes._left_title for axes in figure.axes]
    boxes = [title.get_window_extent() for title in titles]
    assert len(boxes) == 9 and all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    for i, box in enumerate(boxes):
        assert i % 3 == 2 or box.x1 < boxes[i + 1].x0
    assert name in titles[0].get_text().replace("\n", "")


def test_what_cannot_be_shown(tmp_path):
    with pytest.raises(InputError, match="there is no sample to show"):
        save_preview([], clip_like(56, 14, "pad"), tmp_path / "p.png", "t")
    for size, patch in ((56, 15), (8, 14), (56, 0)):
        with pytest.raises(SettingError, match=f"--size {size} --patch {patch}"):
            clip_like(size, patch, "resize")
    with pytest.raises(SettingError, match="add --model"):
        clip_like(56, 14, "anyres")


def test_windows_are_counted_and_drawn(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    data = [sample([(50, 110, 80, 122)]), sample([(0, 110, 150, 122)], document="e"), sample([(0, 0, 200, 400)])]
    found = dict(counts(data, clip_like(56, 14, "window")))
    assert found["region height, tokens"] == "median 1.50, 1.50 to 4.00"
    assert found["lower than a token"] == "0 of 3 (0%)"
    assert found["only the beginning in its window"] == "1 of 3 (33%)"
    assert "only the beginning in its window" not in dict(counts(data, clip_like(56, 14, "pad")))
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **k: drawn.append(self) or path.touch())
    save_preview(data[:1], clip_like(56, 14, "window"), tmp_path / "p.png", "t")
    (figure,) = drawn
    original, plane, _ = figure.axes
    outlines = [c for c in original.collections if c.get_edgecolor()[0] == pytest.approx(to_rgba(preview.GREEN))]
    assert len(outlines) == 1
    corners = outlines[0].get_paths()[0].vertices
    assert corners.min(0).tolist() == [49, 100] and corners.max(0).tolist() == [81, 132]
    assert "window 56 x 56" in plane._left_title.get_text()
    with pytest.raises(SettingError, match=r"RProbe.text_height = 9: the vision tower's input is 4 tokens high"):
        clip_like(56, 14, "window", 9)
