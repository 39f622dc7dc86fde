import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock
from PIL import Image
from typer.testing import CliRunner

from llava_patch.cli.main import app
from llava_patch.cli.rprobe.run import check_folder
from llava_patch.core.errors import CheckpointError, LlavaPatchError, SettingError
from llava_patch.core.paths import default_name
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.rprobe import fit
from llava_patch.measurements.rprobe.ablation import VARIANTS
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.patching.handle import get_handle
from llava_patch.settings import active
from llava_patch.settings.active import settings_of
from tests.support import fileset
from tests.support.paths import ROOT

QUICK = ("--steps", "4", "--train-pages", "6", "--heldout-pages", "4", "--batch-size", "4")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    fileset.write_hf(folder)
    return folder


def rprobe(*words, fails=None):
    done = CliRunner().invoke(app, ["rprobe", *map(str, words)])
    if fails is not None:
        assert isinstance(done.exception, fails), done.output
        return str(done.exception)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_one_probe_writes_result_and_figures_and_the_decoder_where_it_is_asked_for(checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    words = (checkpoint, *QUICK, "--masked", "--no-text", "--output", folder)
    out = rprobe(*words)
    assert "R-Probe: held-out MSE" in out and str(folder / "rprobe.json") in out
    files = ["map-1.png", "map-2.png", "rprobe.json", "rprobe.png"]
    assert sorted(p.name for p in folder.iterdir()) == files
    before = {name: (folder / name).read_bytes() for name in files}
    with monkeypatch.context() as patch:
        patch.setattr(fit, "train_probe", lambda *args: pytest.fail("it trained again"))
        assert "rprobe.json: measured before" in rprobe(*words)
        for more, needs in (
            (("--show", "page-heldout-0-1"), "--show page-heldout-0-1"),
            (("--examples", 3), "RProbe.examples = 3"),
            (("--keep-decoder",), "RProbe.keep_decoder = True"),
            (("--format", "pdf"), "a figure in pdf"),
        ):
            said = rprobe(*words, *more, fails=CheckpointError)
            assert f"{needs} needs its decoder, which was not kept" in said and "--overwrite" in said
    assert {name: (folder / name).read_bytes() for name in files} == before
    rprobe(*words, "--keep-decoder", "--overwrite")
    assert sorted(p.name for p in folder.iterdir()) == ["decoder.safetensors", *files]
    monkeypatch.setattr(fit, "train_probe", lambda *args: pytest.fail("it trained again"))
    rprobe(*words, "--keep-decoder", "--show", "page-heldout-0-1")
    written = json.loads((folder / "rprobe.json").read_text())
    settings = written["settings"]
    assert (settings["masked"], settings["text"], settings["steps"]) == (True, False, 4)
    assert written["facts"]["checkpoint"] == str(checkpoint) and len(written["documents"]) == 4


def test_results_of_another_checkpoint_are_not_replaced(checkpoint, tmp_path, monkeypatch):
    """Two checkpoints of one folder name share the default folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, tmp_path / "elsewhere" / checkpoint.name)
    rprobe(checkpoint, *QUICK)
    before = (tmp_path / "llava_patch_out" / "rprobe" / "model" / "rprobe.json").read_bytes()
    for more in ((), ("--ablation",)):
        message = rprobe(f"elsewhere/{checkpoint.name}", *QUICK, *more, fails=CheckpointError)
        assert str(checkpoint.resolve()) in message and "--output" in message
    message = rprobe(checkpoint, *QUICK, "--gin-param", "SkipLinks.layers = (1,)", fails=CheckpointError)
    assert "without a patch of gin, not of" in message and "SkipLinks(" in message
    assert (tmp_path / "llava_patch_out" / "rprobe" / "model" / "rprobe.json").read_bytes() == before
    rprobe(os.path.relpath(checkpoint), *QUICK)  # the same one by another path
    check_folder(tmp_path / "llava_patch_out" / "rprobe" / "model", str(checkpoint), {}, True)  # beside this one
    message = rprobe(checkpoint, *QUICK, "--gin-param", "RProbe.threshold = 0.5", fails=CheckpointError)
    assert "RProbe.threshold = 0.75 there, 0.5 here" in message and "--overwrite" in message
    rprobe(checkpoint, *QUICK, "--gin-param", "RProbe.threshold = 0.5", "--overwrite")
    assert (
        json.loads((tmp_path / "llava_patch_out" / "rprobe" / "model" / "rprobe.json").read_text())["threshold"] == 0.5
    )


def test_a_second_command_in_the_same_folder_is_refused(checkpoint, tmp_path):
    other = FileLock(tmp_path / "out" / ".lock")
    (tmp_path / "out").mkdir()
    with other:
        for more in ((), ("--ablation",)):
            message = rprobe(checkpoint, *QUICK, *more, "--output", tmp_path / "out", fails=CheckpointError)
            assert "another run works in" in message


def test_own_data_and_held_out_data(checkpoint, tmp_path):
    lines = []
    for i in range(8):
        Image.effect_noise((60, 50), 40 + 10 * i).convert("RGB").save(tmp_path / f"{i}.png")
        lines.append({"image": f"{i}.png", "text": f"line {i}", "box": [2, 3, 45, 22]})
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, [*lines[:6], {**lines[0], "image": "gone.png"}])))
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, lines[5:7])))
    out = rprobe(checkpoint, tmp_path / "all.jsonl", *QUICK, "--broken", "skip", "--output", tmp_path / "a")
    assert "1 thing could not be used" in out and "gone.png" in out
    rprobe(
        checkpoint, tmp_path / "all.jsonl", *QUICK, "--broken", "skip", "--output", tmp_path / "b",
        "--heldout", tmp_path / "held.jsonl",
    )  # fmt: skip
    kept = json.loads((tmp_path / "b" / "rprobe.json").read_text())["warnings"]
    assert any(note.startswith("1 of 2 held-out documents are trained on") for note in kept)
    assert any("1 things could not be used" in note and "gone.png" in note for note in kept)
    first, second = (json.loads((tmp_path / name / "rprobe.json").read_text())["facts"] for name in "ab")
    assert (first["train_samples"], second["train_samples"], second["heldout_samples"]) == (5, 6, 2)
    message = rprobe(checkpoint, tmp_path / "all.jsonl", *QUICK, "--output", tmp_path / "c", fails=LlavaPatchError)
    assert "all.jsonl:7" in message and not (tmp_path / "c").exists()


def test_ablation_writes_one_table_and_keeps_finished_runs(checkpoint, tmp_path, monkeypatch):
    words = (checkpoint, *QUICK, "--ablation", "--output", tmp_path)
    with monkeypatch.context() as patch:
        trained = []
        original = fit.train_probe

        def interrupt(*args, **kwargs):
            trained.append(1)
            if len(trained) == 3:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        patch.setattr(fit, "train_probe", interrupt)
        done = CliRunner().invoke(app, ["rprobe", *map(str, words)])
        assert done.exit_code == 130
        assert "interrupted: the same command goes on from here" in done.output
        assert not (tmp_path / "ablation.json").exists()
        rprobe(*words)
        assert len(trained) == 5  # the first two were kept
    summary = json.loads((tmp_path / "ablation.json").read_text())
    assert list(summary["runs"]) == list(VARIANTS)
    mse = {}
    for name, run in summary["runs"].items():
        written = json.loads((tmp_path / name / "rprobe.json").read_text())
        assert {k: written["settings"][k] for k in ("masked", "text")} == VARIANTS[name]
        assert run["mse"] == mse.setdefault(name, written["mse"])
        assert run["interval"][0] <= run["mse"] <= run["interval"][1]
    effects = {one["effect"]: one for one in summary["effects"]}
    text = effects["text, region masked"]
    assert text["mse_falls_by"] == pytest.approx(mse["masked_without_text"] - mse["masked_with_text"])
    region = effects["region, with text"]
    assert region["mse_falls_by"] == pytest.approx(mse["masked_with_text"] - mse["full_with_text"])
    assert region["low"] <= region["mse_falls_by"] <= region["high"]
    table = (tmp_path / "ablation.md").read_text()
    assert table.count("\n| ") == (2 + 4) + (2 + 4) and "4 held-out samples of 4 documents" in table
    assert f"{mse['full_with_text']:.4f}" in table


def test_the_command_line_wins_over_gin_and_gin_over_defaults(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_PATCH_GIN_PARAM", "RProbe.clip = 3.0")
    file = tmp_path / "probe.gin"
    file.write_text("RProbe.seed = 4\nRProbe.lr = 1e-3\nRProbe.steps = 9\n")
    before = active.configuration()
    with active.also([str(file)], ["RProbe.lr = 2e-3"]):
        assert settings_of(RProbe, steps=5) == RProbe(clip=3.0, seed=4, lr=2e-3, steps=5)
    assert active.configuration() == before
    active.reset()


def test_a_patch_asked_for_by_gin_is_measured(checkpoint, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(fit, "find", lambda model: seen.append(str(get_handle(model))) or find(model))
    rprobe(
        checkpoint, *QUICK, "--output", tmp_path, "--gin-param", "SkipLinks.layers = (1,)",
        "--gin-param", "RProbe.steps = 9",
    )  # fmt: skip
    assert "SkipLinks" in seen[0]
    facts = json.loads((tmp_path / "rprobe.json").read_text())["facts"]
    assert facts["configured_patch"]["fusion"].startswith("SkipLinks(")
    assert json.loads((tmp_path / "rprobe.json").read_text())["settings"]["steps"] == 4  # the option wins
    assert active.configuration() is None


@pytest.mark.parametrize(
    "words, error, message",
    [
        (("--ablation", "--masked"), SettingError, "leave these options out"),
        (("--heldout", "x.jsonl"), SettingError, "name the data to train on as well"),
        (("--trained", "most"), SettingError, "RProbe.trained = 'most'"),
        (("--device", "tpu"), SettingError, "--device tpu: expected cpu"),
        (("--dtype", "int8"), SettingError, "--dtype int8: expected float32"),
        (("--base", "elsewhere"), CheckpointError, "elsewhere"),
        (("--gin-param", "RProbe.step = 3"), SettingError, "did you mean steps"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(checkpoint, tmp_path, words, error, message):
    assert message in rprobe(checkpoint, *QUICK, "--output", tmp_path / "out", *words, fails=error)
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path):
    assert "it has no config.json" in rprobe(tmp_path, fails=CheckpointError)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "is not a LLaVA" in rprobe(tmp_path, fails=CheckpointError)


def test_name_of_the_results_folder(tmp_path):
    assert default_name("liuhaotian/llava-v1.5-7b") == "llava-v1.5-7b"
    (tmp_path / "run1" / "checkpoint-50").mkdir(parents=True)
    assert default_name(str(tmp_path / "run1" / "checkpoint-50")) == "run1__checkpoint-50"
    assert default_name(str(tmp_path / "run1") + "/") == "run1"


def test_two_processes_and_ctrl_c(checkpoint, tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "CUDA_VISIBLE_DEVICES": "", "LLAVA_PATCH_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    words = ["-m", "llava_patch.cli.main", "rprobe", str(checkpoint), *QUICK, "--output"]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words,
        str(tmp_path / "two"),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("R-Probe: held-out MSE") == 1  # one process speaks
    rprobe(checkpoint, *QUICK, "--output", tmp_path / "one")
    two, one = (json.loads((tmp_path / name / "rprobe.json").read_text()) for name in ("two", "one"))
    assert two["facts"]["processes"] == 2 and one["facts"]["processes"] == 1
    assert two["mse"] == pytest.approx(one["mse"], rel=1e-4)  # float32 sums in another order

    long = [sys.executable, *words, str(tmp_path / "long"), "--steps", "100000", "--gin-param", "RProbe.save_every = 5"]
    process = subprocess.Popen(
        long, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell starts what it puts into the background with Ctrl-C ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    state = tmp_path / "long" / "training.safetensors"
    for _ in range(600):
        if state.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from here" in err
    assert state.exists() and not (tmp_path / "long" / "rprobe.json").exists()
    again = rprobe(
        checkpoint, *QUICK, "--steps", "100000", "--minutes", "1e-6", "--output", tmp_path / "long",
    )  # fmt: skip
    assert "held-out MSE" in again
    written = json.loads((tmp_path / "long" / "rprobe.json").read_text())
    assert written["facts"]["cut"] and written["facts"]["steps_done"] >= 5


def test_settings_are_those_of_the_dataclass():
    given = {field.name: field.default for field in dataclasses.fields(RProbe)}
    assert settings_of(RProbe, **given) == RProbe()


def test_a_mistyped_subcommand_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, ["rprobe", "comapre", "a", "b"], env={"COLUMNS": "200"})
    assert found.exit_code == 2 and "did you mean 'compare'?" in found.output
    found = CliRunner().invoke(app, ["rprobe", "model", "train.jsonl", "test.jsonl"], env={"COLUMNS": "200"})
    assert found.exit_code == 2 and "(test.jsonl)" in found.output and "--heldout" in found.output
