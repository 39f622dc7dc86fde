"""The command, on a small patched checkpoint and its base."""

import json
import re
import shlex
import shutil

import pytest
from PIL import Image
from typer.testing import CliRunner

from llava_patch.cli.main import app
from llava_patch.core.errors import CheckpointError, InputError, SettingError
from llava_patch.tools.inspect import inspect_checkpoint
from llava_patch.tools.report import build
from llava_patch.tools.report.sections import sections

NAMES = [section.name for section in sections()]
MEASURED = {"saturation", "attention_maps", "flops", "gradients", "reach", "drift", "fusion_attention"}


def _run(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)], catch_exceptions=False)


def test_every_section_that_can_be_made_is_made(report):
    folder, screen, _ = report
    records = {record.name: record for record in build.read(folder)["sections"]}
    assert list(records) == NAMES
    made = {name for name, record in records.items() if record.state == "done"}
    assert made >= MEASURED
    for name in made:
        record = records[name]
        assert record.found.summary and record.found.figures and record.found.tables, name
        assert all((folder / file).is_file() for file in record.found.files)
        assert all(len(figure.alt) > 20 for figure in record.found.figures)
        assert record.found.files[0] == f"{name}.json" and json.loads((folder / f"{name}.json").read_text())
    for record in records.values():
        assert record.state == "done" or (record.state == "skipped" and record.reason), record
    assert f"1 of {len(NAMES)}" in screen and "wrote" in screen
    for name in MEASURED:  # each can be repeated alone, under the same settings
        words = shlex.split(records[name].command)
        assert words[0] == "llava-patch" and "--gin-file" in words and str(report[2][0]) in words


def test_data_that_cannot_be_read_are_refused_before_anything_is_written(checkpoint, tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        _run(checkpoint, tmp_path / "gone.json", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_of_the_hub(files, checkpoint, few, tmp_path, monkeypatch):
    from huggingface_hub import constants

    for name, folder in (("me/patched", checkpoint), ("me/stock", files.hf)):
        kept = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (kept / "refs").mkdir(parents=True)
        (kept / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folder, kept / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    out = tmp_path / "out"
    only = ("--only", "flops", "--only", "fusion_attention", "--gin-file", few, "--output", out)
    done = _run("me/patched", "--base", "me/stock", *only)
    assert done.exit_code == 0 and [r.state for r in build.read(out)["sections"]] == ["done", "done"], done.output
    assert build.read(out)["checkpoint"] == "me/patched"
    assert inspect_checkpoint("me/patched", "me/stock").match.compared > 20
    with pytest.raises(CheckpointError, match="me/gone: no such folder; as a hub name"):
        _run("me/gone")


@pytest.mark.parametrize("name", sorted(MEASURED))
def test_the_command_that_a_section_names_works(report, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = next(record for record in build.read(report[0])["sections"] if record.name == name)
    words = shlex.split(record.command)[1:]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert list(tmp_path.rglob(f"{name}.json"))
    assert "".join(record.found.summary.split()) in "".join(done.output.split())  # the same numbers


def test_the_page_refers_to_nothing_outside(report):
    text = (report[0] / "report.html").read_text()
    links = re.findall(r'(?:src|href|action|url)\s*[=(]\s*["\']?([^"\'\s>)]+)', text)
    assert len(links) > 10 and all(link.startswith(("#", "data:")) for link in links)
    assert "<script" not in text and "@import" not in text
    assert "patched &lt;b&gt;&amp;" in text and "patched <b>&" not in text


def test_the_same_command_again_measures_nothing(report, monkeypatch):
    from llava_patch.data import loaded

    monkeypatch.setattr(loaded, "load_subject", None)
    folder, _, arguments = report
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    done = _run(*arguments)
    assert done.exit_code == 0 and done.output.count(": kept") >= len(MEASURED)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.png")} == before


def test_the_page_is_written_again_from_its_folder(report, tmp_path):
    import shutil

    copied = tmp_path / "copied"
    shutil.copytree(report[0], copied)
    (copied / "report.html").unlink()
    done = _run("--from", copied)
    assert done.exit_code == 0
    assert (copied / "report.html").read_text() == (report[0] / "report.html").read_text()


def test_a_failing_section_is_exit_code_1(files, few, tmp_path):
    data = tmp_path / "data.json"
    Image.new("RGB", (64, 64)).save(tmp_path / "there.png")  # the first image is looked at before a model is loaded
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    images = ("there.png", "lost.png")
    data.write_text(json.dumps([{"id": image, "image": image, "conversations": turns} for image in images]))
    out = tmp_path / "out"
    done = _run(files.hf, data, "--output", out, "--only", "saturation", "--only", "flops", "--gin-file", few)
    assert done.exit_code == 1 and "failed: saturation" in done.output
    text = (out / "report.html").read_text()
    assert "lost.png cannot be read" in text and "FLOP" in text


def test_a_stock_checkpoint_and_what_it_skips(files, few, tmp_path):
    done = _run(files.hf, "--output", tmp_path, "--skip", "saturation", "--skip", "attention_maps", "--gin-file", few)
    assert done.exit_code == 0, done.output
    reasons = {r.name: r.reason for r in build.read(tmp_path)["sections"] if r.state == "skipped"}
    assert "no skip taps" in reasons["gradients"] and "--base" in reasons["drift"]
    assert "--rprobe" in reasons["rprobe"] and "--run" in reasons["training"]
    commands = {r.name: r.command for r in build.read(tmp_path)["sections"]}
    assert {name for name in reasons if commands[name]} == {"rprobe"}  # the others' could not work either
    assert all(command for name, command in commands.items() if name not in reasons)
    assert (tmp_path / "report.html").read_text().count("<summary>Run it alone</summary>") == 1


def test_an_adapter_is_compared_with_the_base_that_it_names(files, few, tmp_path):
    from transformers import LlavaForConditionalGeneration

    from llava_patch import Routing, SkipLinks, patch

    model = LlavaForConditionalGeneration.from_pretrained(files.hf)
    fusion = SkipLinks(stride=2, train_tower="all")
    patch(model, fusion=fusion, routing=Routing(split=2, freeze="none")).save(tmp_path / "adapter")
    only = ("--only", "drift", "--only", "attention_maps")
    done = _run(tmp_path / "adapter", "--output", tmp_path / "out", *only, "--gin-file", few)
    assert done.exit_code == 0, done.output
    maps, drift = build.read(tmp_path / "out")["sections"]
    assert drift.state == "done" and str(files.hf) in drift.command
    assert len(maps.found.tables[0].rows) == 2  # a trained tower stands beside the base's


def test_gradients_of_the_run(report, files, tmp_path):
    run = tmp_path / "run"
    (run / "gradients").mkdir(parents=True)
    (run / "gradients" / "gradients.json").write_text((report[0] / "gradients.json").read_text())
    _run(files.hf, "--output", tmp_path / "out", "--only", "training_gradients", "--run", run)
    (record,) = build.read(tmp_path / "out")["sections"]
    assert record.state == "done" and record.found.figures[0].file == "training_gradients.png"
    (run / "gradients" / "gradients.json").write_text("{")
    done = _run(files.hf, "--output", tmp_path / "out", "--only", "training_gradients", "--run", run)
    assert done.exit_code == 1


def test_training_curves(files, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    history = [{"step": i, "loss": 4.0 - i / 10, "learning_rate": 1e-3, "grad_norm": 1.0} for i in range(1, 21)]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    _run(files.hf, "--output", tmp_path / "out", "--only", "training", "--run", run)
    (record,) = build.read(tmp_path / "out")["sections"]
    assert record.found.summary == "Training loss went from 3.900 to 2.050 over 20 optimizer steps."
    (run / "trainer_state.json").write_text(json.dumps({"log_history": []}))
    _run(files.hf, "--output", tmp_path / "out", "--only", "training", "--run", run)
    (record,) = build.read(tmp_path / "out")["sections"]
    assert record.state == "skipped" and "no logged loss" in record.reason


def test_r_probe_results(files, tmp_path):
    import shutil

    probe = tmp_path / "probe"
    few = ["RProbe.steps = 3", "RProbe.train_pages = 2", "RProbe.heldout_pages = 2", "RProbe.batch_size = 1"]
    params = [word for line in few for word in ("--gin-param", line)]
    done = CliRunner().invoke(app, ["rprobe", str(files.hf), "--output", str(probe), *params], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    _run(files.hf, "--output", tmp_path / "out", "--only", "rprobe", "--rprobe", probe)
    (record,) = build.read(tmp_path / "out")["sections"]
    assert record.state == "done" and record.found.summary.startswith("R-Probe") and record.found.figures
    shutil.rmtree(probe)  # the report does not need it any more
    assert _run("--from", tmp_path / "out").exit_code == 0
    with pytest.raises(CheckpointError, match="--rprobe"):
        _run(files.hf, "--output", tmp_path / "out", "--rprobe", probe)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ([], SettingError, "name a checkpoint"),
        (["CKPT", "--from", "x"], SettingError, "leave CKPT out"),
        (["--from", "/nowhere"], CheckpointError, "no report.json"),
        (["/nowhere"], CheckpointError, "no such folder"),
        (["CKPT", "--only", "everything"], SettingError, "--only everything"),
        (["CKPT", "--run", "/nowhere"], CheckpointError, "--run /nowhere"),
        (["CKPT", "--gin-param", "Report.samples = 0"], SettingError, "Report.samples = 0"),
    ],
)
def test_what_is_refused_before_anything_is_written(files, tmp_path, arguments, error, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [str(files.hf) if word == "CKPT" else word for word in arguments]
    if not given:
        given = ["--device", "cpu"]
    with pytest.raises(error, match=message):
        _run(*given)
    assert not list(tmp_path.iterdir())


def test_every_section_says_what_it_is():
    for section in sections():
        assert section.title and len(section.about) > 40
