import dataclasses

import numpy as np
import pytest
from PIL import Image

from llava_patch.core.errors import InputError, SettingError
from llava_patch.measurements.rprobe import figures
from llava_patch.measurements.rprobe.figures import half_variance, save_figure, save_map
from llava_patch.measurements.rprobe.fit import run_rprobe
from llava_patch.measurements.rprobe.output import write_run
from llava_patch.measurements.rprobe.settings import RProbe
from tests.support.probes import Characters, processor, tiny_model


@pytest.fixture(scope="module")
def result():
    settings = RProbe(steps=3, batch_size=2, train_pages=4, heldout_pages=3, examples=2, maps=1, threshold=1e-6)
    return run_rprobe(tiny_model(), processor(), Characters(), settings, progress=False)


def is_drawn(path) -> bool:
    """More than a handful of colours on more than a sliver of the page."""
    picture = Image.open(path).convert("RGB")
    picture = picture.resize((picture.width // 4, picture.height // 4), Image.Resampling.NEAREST)
    pixels = np.asarray(picture)
    return len(picture.getcolors(1 << 24)) > 20 and (pixels < 250).any(-1).mean() > 0.02


def test_figure_is_a_png_with_a_row_for_each_example(result, tmp_path):
    tall = save_figure(result, tmp_path / "new" / "all.png")
    short = save_figure(result, tmp_path / "one.png", documents=[result.examples[1].id])
    assert Image.open(tall).format == "PNG"
    assert Image.open(tall).size[0] == Image.open(short).size[0]
    assert Image.open(tall).size[1] > Image.open(short).size[1]
    assert is_drawn(tall) and is_drawn(short)
    assert sorted(p.name for p in tmp_path.rglob("*.png")) == ["all.png", "one.png"]
    with pytest.raises(InputError, match="no example nobody"):
        save_figure(result, tmp_path / "x.png", documents=["nobody"])


def test_all_figures_in_both_formats_and_alike_each_time(result, tmp_path):
    names = ["map-1.pdf", "map-1.png", "rprobe.json", "rprobe.pdf", "rprobe.png"]
    write_run(dataclasses.replace(result, maps=result.maps * 2), tmp_path / "b", ("png",))
    write_run(result, tmp_path / "b", ("pdf",))
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["map-1.pdf", "rprobe.json", "rprobe.pdf"]
    write_run(dataclasses.replace(result, maps=result.maps * 2), tmp_path / "a", ("png", "pdf"))
    assert (tmp_path / "a" / "map-2.pdf").is_file()
    for folder in "ab":
        write_run(result, tmp_path / folder, ("png", "pdf"))
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == names
    assert is_drawn(tmp_path / "a" / "map-1.png")
    for name in names:
        first, second = ((tmp_path / folder / name).read_bytes() for folder in "ab")
        assert first == second
        assert first.startswith({"pdf": b"%PDF", "png": b"\x89PNG", "son": b"{"}[name[-3:]])
    with pytest.raises(SettingError, match=r"x.jpg: expected a name that ends in .png or .pdf"):
        save_figure(result, tmp_path / "x.jpg")
    assert not (tmp_path / "x.jpg").exists()


def test_a_run_without_examples_still_has_its_curve(result, tmp_path):
    save_figure(dataclasses.replace(result, examples=[], maps=[]), tmp_path / "rprobe.png")
    assert Image.open(tmp_path / "rprobe.png").size[1] < 600


def test_chosen_documents_are_shown_and_unknown_ones_refused_before_training():
    settings = RProbe(steps=1, batch_size=2, train_pages=2, heldout_pages=3, maps=0)
    arguments = (tiny_model(), processor(), Characters(), settings)
    found = run_rprobe(*arguments, progress=False, show=["page-heldout-0-2", "page-heldout-0-0"])
    assert [example.id for example in found.examples] == ["page-heldout-0-2", "page-heldout-0-0"]
    with pytest.raises(InputError, match="no held-out sample x to show; there are page-heldout-0-0, page-heldout-0-1"):
        run_rprobe(*arguments, progress=False, show=["x"])


def test_tall_pages_small_regions_and_any_text_are_drawn(result, tmp_path):
    example = result.examples[0]
    small = np.zeros_like(example.target)
    small[:14, :14] = True
    odd = dataclasses.replace(
        example,
        target=small,
        stretch=4.0,
        id="a long name of a file, of a scan, of an archive.jsonl:12",
        text="$x_{ $ frac" * 9,
    )
    assert is_drawn(save_figure(dataclasses.replace(result, examples=[odd]), tmp_path / "odd.png"))
    page = dataclasses.replace(result.maps[0], stretch=6.0, outside_mse=None, id="$" * 70)
    assert is_drawn(save_map(page, tmp_path / "map.png"))


def test_half_of_the_training_variance_is_recovered_from_the_facts(result):
    assert half_variance(result) == pytest.approx(0.5 * result.running[-1] / result.facts["train_fvu"])
    assert half_variance(dataclasses.replace(result, facts={})) is None


def test_what_the_tower_did_not_see_is_black(result):
    def first_column(masked):
        changed = dataclasses.replace(result, settings={**result.settings, "masked": masked})
        figure = figures._examples(changed, changed.examples[:1])
        figure.canvas.draw()
        (box,) = figure.axes[0].patches
        return box.get_fill(), figure.texts[0].get_text()

    assert first_column(False) == (False, "tower's input, region outlined")
    assert first_column(True) == (True, "tower's input, region blacked out")
