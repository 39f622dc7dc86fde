"""The examples of the manual, each run as a user runs it; docs/examples/index.md shows what they print."""

import re
import runpy
import sys
import tempfile
import warnings

import numpy as np
import pytest
from PIL import Image

from tests.support import models
from tests.support.paths import ROOT

EXAMPLES = ROOT / "docs" / "examples"
SCRIPTS = "patch_and_train", "split_and_route", "probe_and_compare"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    models.needs_hf()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name, *arguments):
        path = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        capsys.readouterr()
        with warnings.catch_warnings():
            runpy.run_path(str(path), run_name="__main__")
        return re.sub(r"^\[.*\n", "", capsys.readouterr().out, flags=re.M)  # DeepSpeed's own line, once a process

    return run


def shown(name):
    """What index.md says that a script prints: the block behind its heading."""
    page = (EXAMPLES / "index.md").read_text(encoding="utf-8")
    return re.search(rf"{name}\.py\).*?```text\n(.*?)```", page, re.S).group(1)


def without_numbers(text):
    """Lines without their numbers, long sentences cut: those are other tests' business."""
    lines = re.sub(r"[ ]+", " ", re.sub(r"[+-]?\d[\d,.]*(e-?\d+)?", "#", text)).strip().splitlines()
    return [line[:40] for line in lines]


def test_patch_a_model_and_watch_what_trains(run):
    said = run("patch_and_train")
    assert without_numbers(said) == without_numbers(shown("patch_and_train"))
    routed, fused, tower, both = said.strip().split("\n\n")
    assert "with a gradient: {'side branch': 9}\n" in routed and "(5.72 %)" in routed
    assert "same logits: True; weights changed: {}" in routed
    assert "'vision tower'" not in fused and "with a gradient: {'language model': 75, 'projector': 4}" in fused
    assert "with a gradient: {'language model': 75, 'projector': 4, 'vision tower': 1" in tower
    assert "with a gradient: {'language model': 75, 'projector': 4, 'side branch': 9}" in both


def test_find_the_split_and_route(run):
    said = run("split_and_route")
    assert without_numbers(said) == without_numbers(shown("split_and_route"))
    assert "recommended split: 4\n" in said  # behind the one layer that reads
    assert float(re.search(r"prefill FLOPs: ([\d.]+)% saved", said).group(1)) > 10
    assert "after undo: same logits: True" in said


def test_a_checkpoint_and_data_of_ones_own(run, tmp_path):
    from tiny import tiny_llava

    noise = np.random.default_rng(0).integers(0, 255, (3, 60, 60, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    said = run("split_and_route", tiny_llava(str(tmp_path / "own"), reads_at=2), tmp_path / "1.png")
    assert "recommended split: 3\n" in said


def test_probe_two_checkpoints_and_compare(run):
    said = run("probe_and_compare")
    assert without_numbers(said) == without_numbers(shown("probe_and_compare"))
    value, low, high = map(float, re.search(r"minus A's: (\S+), .* \[(\S+), (\S+)\]", said).groups())
    assert 0 < low < value < high and "A's tokens hold more of the pixels than B's" in said


def test_the_page_shows_every_script_and_each_is_short():
    page = (EXAMPLES / "index.md").read_text(encoding="utf-8")
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SCRIPTS, "tiny"}
    for path in EXAMPLES.glob("*.py"):
        assert f"({path.name})" in page and len(path.read_text(encoding="utf-8").splitlines()) < 80
