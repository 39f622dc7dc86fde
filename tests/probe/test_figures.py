import json

import pytest
from PIL import Image

from llava_patch.errors import InputError
from llava_patch.probe.figures import save_figure
from llava_patch.probe.fit import run_rprobe
from llava_patch.probe.result import write_json
from llava_patch.probe.settings import RProbe

from .tiny import Characters, processor, tiny_model


@pytest.fixture(scope="module")
def result():
    settings = RProbe(steps=3, batch_size=2, train_pages=4, heldout_pages=3, examples=2, threshold=1e-6)
    return run_rprobe(tiny_model(), processor(), Characters(), settings, progress=False)


def test_figure_is_a_png_with_a_row_for_each_example(result, tmp_path):
    tall = Image.open(save_figure(result, tmp_path / "new" / "all.png"))
    short = Image.open(save_figure(result, tmp_path / "one.png", documents=[result.examples[1].id]))
    assert tall.format == "PNG"
    assert tall.size[0] == short.size[0]
    assert tall.size[1] > short.size[1]
    assert sorted(p.name for p in tmp_path.rglob("*.png")) == ["all.png", "one.png"]
    with pytest.raises(InputError, match="no example nobody"):
        save_figure(result, tmp_path / "x.png", documents=["nobody"])


def test_json_round_trip(result, tmp_path):
    read = json.loads(write_json(result, tmp_path / "r.json").read_text())
    assert read == result.to_json()
    assert "examples" not in read
