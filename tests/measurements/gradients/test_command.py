"""`llava-patch gradients`, on files as a user has them."""

import json

import pytest
from typer.testing import CliRunner

from llava_patch import SkipLinks, patch
from llava_patch.cli.main import app
from llava_patch.core.errors import CheckpointError, InputError, LlavaPatchError, SettingError
from llava_patch.measurements.gradients.log import StepLog
from llava_patch.measurements.gradients.measurement import Gradients
from llava_patch.measurements.gradients.result import GradientsResult
from tests.support import fileset
from tests.support.fusions import randomise

from .test_result import make

QUICK = ("--steps", "4", "--batch-size", "2", "--window", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock") / "model"
    fileset.write_hf(folder)
    return folder


@pytest.fixture(scope="module")
def fused(stock, tmp_path_factory):
    from llava_patch.data.loaded import load_subject

    folder = tmp_path_factory.mktemp("fused") / "model"
    subject = load_subject(str(stock), device="cpu")
    handle = patch(subject.model, fusion=SkipLinks(stride=1, detach=0))
    randomise(handle)
    handle.save(folder, form="full")
    for file in stock.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def gradients(*words, fails=None):
    done = CliRunner().invoke(app, ["gradients", *map(str, words)], env={"COLUMNS": "200"})
    if fails is not None:
        assert isinstance(done.exception, fails), (done.output, done.exception)
        return str(done.exception)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_a_patched_checkpoint(fused, tmp_path):
    out = gradients(fused, *QUICK, "--output", tmp_path / "out", "--step-size", "1e-5", "--smoothness", "10")
    assert "delta" in out and "windows where the detaching condition" in out and "wrote" in out
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name != ".lock") == [
        "gradients.json", "gradients.jsonl", "gradients.png",
    ]  # fmt: skip
    result = GradientsResult.read(tmp_path / "out")
    assert len(result.steps) == 4 and len(result.windows) == 2 and all(s.skip > 0 for s in result.steps)
    assert result.facts["checkpoint"] == str(fused) and result.facts["dtype"] == "float32"
    again = gradients(fused, *QUICK, "--output", tmp_path / "out", "--step-size", "1e-5", "--smoothness", "10")
    lines = [[line.rpartition("it/s]")[2].strip() for line in text.splitlines()] for text in (out, again)]
    first, second = ([line for line in one if line and "Loading weights" not in line] for one in lines)
    assert second == first[-len(second) :] and "it/s]" not in again  # without the bar: nothing was left to do
    assert len(second) < len(first)
    other = (*QUICK, "--output", tmp_path / "out", "--question", "Why?")
    message = gradients(fused, *other, fails=CheckpointError)
    assert "--question = '' there, 'Why?' here" in message and "--overwrite" in message
    gradients(fused, *other, "--overwrite")  # other settings: in their place
    values = json.loads((tmp_path / "out" / "gradients.json").read_text())
    assert values["facts"]["question"] == "Why?"
    bound = ("--gin-param", "Routing.split = 2")
    message = gradients(fused, *QUICK, *bound, "--output", tmp_path / "out", fails=CheckpointError)
    assert "with Routing(split=2, " in message and "of gin: give another folder with --output" in message
    assert "nowhere/at/all: no such folder" in gradients("nowhere/at/all", *QUICK, fails=CheckpointError)


def test_a_stock_checkpoint_needs_a_fusion(stock, tmp_path):
    message = gradients(stock, *QUICK, "--output", tmp_path / "out", fails=SettingError)
    assert "no skip taps" in message and "SkipLinks.stride = 2" in message and "--gin-param" in message
    assert not (tmp_path / "out").exists()
    bound = ("--gin-param", "SkipLinks.stride = 1", "--gin-param", "SkipLinks.detach = 0")
    out = gradients(stock, *QUICK, *bound, "--output", tmp_path / "out")
    assert "still zero, as a fresh patch has them" in " ".join(out.split())


def test_options_are_checked_before_anything_is_loaded(stock, tmp_path):
    assert "--steps 1" in gradients(stock, "--steps", "1", fails=SettingError)
    assert "--batch-size 0" in gradients(stock, "--batch-size", "0", fails=SettingError)
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in gradients(stock, "--output", file, fails=CheckpointError)


def test_data_with_answers(fused, tmp_path):
    from PIL import Image

    Image.new("RGB", (60, 60), "white").save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A page"}]
    answer = {"from": "gpt", "value": "Nothing"}
    (tmp_path / "data.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}] * 5))
    out = gradients(fused, tmp_path / "data.json", *QUICK, "--output", tmp_path / "out")
    assert "5 examples make 2 batches of 2" in out
    (tmp_path / "data.json").write_text(json.dumps([{"image": "a.png", "conversations": [turns[0], answer]}] * 5))
    before = (tmp_path / "out" / "gradients.jsonl").read_text()
    gradients(fused, tmp_path / "data.json", *QUICK, "--output", tmp_path / "out")
    assert (tmp_path / "out" / "gradients.jsonl").read_text() != before  # measured again: other answers
    out = gradients(fused, tmp_path / "data.json", *QUICK[:4], "--output", tmp_path / "whole")
    assert "1 window of 2" in out  # the default's 50 are cut to what there is
    message = gradients(fused, tmp_path / "data.json", *QUICK[:2], "--batch-size", "4", fails=InputError)
    assert "too few for two batches of 4" in message
    assert "answer is not known" in gradients(fused, tmp_path / "a.png", *QUICK, fails=LlavaPatchError)


def test_a_run_is_drawn_again_and_runs_are_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rate, turns in (("low", 5e-6, 99), ("high", 8e-5, 8)):
        facts = {"learning_rate": rate, "block": 6}
        make(rate=rate, turns=turns, log=StepLog(tmp_path / name, Gradients(window=4, transition_windows=2), facts))
    out = gradients("show", tmp_path / "low", "--output", tmp_path / "drawn")
    assert "no t_trans" in " ".join(out.split()) and (tmp_path / "drawn" / "gradients.png").exists()
    out = gradients("show", tmp_path / "high", "--smoothness", "1e9", "--step-size", "1", "--transition-windows", "9")
    assert (
        "windows where the detaching condition" in out and "10 of 10" in out and "no t_trans" in " ".join(out.split())
    )
    gradients("show", tmp_path / "high")
    assert (tmp_path / "llava_patch_out" / "gradients-show" / "high" / "gradients.json").exists()
    text = gradients("table", tmp_path / "low", tmp_path / "high")
    assert [line.split()[0] for line in text.splitlines() if "e" in line] == ["run", "high", "low"]
    markdown = gradients(
        "table", tmp_path / "low", tmp_path / "high", "--as", "markdown", "--figure", tmp_path / "f.png"
    )
    assert markdown.splitlines()[2].startswith("| high | 8e-05 | 11 |") and (tmp_path / "f.png").exists()
    values = json.loads(gradients("table", tmp_path / "low", "--as", "json"))
    assert values[0]["transition_step"] is None and values[0]["facts"]["block"] == 6
    assert "--as html" in gradients("table", tmp_path / "low", "--as", "html", fails=SettingError)
    assert "printed with --as json" in gradients("table", tmp_path / "low", "--format", "json", fails=SettingError)
    assert "named twice" in gradients("table", tmp_path / "low", tmp_path / "low", fails=InputError)
    gradients("table", tmp_path / "other", fails=LlavaPatchError)


def test_the_help_says_which_precision_a_gpu_gets():
    def said(command):
        return CliRunner().invoke(app, [command, "run", "--help"], env={"COLUMNS": "300"}).output

    assert ", bfloat16 on cuda" in said("gradients")
    assert ", float16 on cuda" in said("saturation")
