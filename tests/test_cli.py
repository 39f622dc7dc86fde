"""The console command."""

import json

import pytest
from typer.testing import CliRunner

from llava_patch.cli import app
from llava_patch.errors import CheckpointError, SettingError

runner = CliRunner()


def test_doctor_names_versions_and_the_hook():
    done = runner.invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    for text in ("transformers", "4.57", "start-up hook", "nothing"):
        assert text in done.output


def test_doctor_fails_on_a_broken_configuration(monkeypatch):
    monkeypatch.setenv("LLAVA_PATCH_GIN_FILE", "missing.gin")
    done = runner.invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert done.exit_code == 1
    assert "missing.gin" in done.output


def test_inspect(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"llava_patch": {"format": 1, "routing": {"split": 18}}}))
    assert "'split': 18" in runner.invoke(app, ["inspect", str(tmp_path)]).output
    (tmp_path / "config.json").write_text("{}")
    assert "stock checkpoint" in runner.invoke(app, ["inspect", str(tmp_path)]).output


def test_doctor_shows_what_the_environment_configures(monkeypatch):
    monkeypatch.setenv("LLAVA_PATCH_GIN_PARAM", "Routing.split = 7; Flags.lora_r = 16; Saturation.max_samples = 8")
    monkeypatch.setenv("LLAVA_PATCH_GIN_PARAMS", "Routing.split = 9")
    done = runner.invoke(app, ["doctor"], env={"COLUMNS": "250"})
    for text in ("split=7", "--lora_r 16", "max_samples=8", "LLAVA_PATCH_GIN_PARAMS", "unknown; known are"):
        assert text in done.output


def test_inspect_names_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        runner.invoke(app, ["inspect", str(tmp_path / "none")], catch_exceptions=False)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        runner.invoke(app, ["inspect", str(tmp_path)], catch_exceptions=False)


@pytest.mark.parametrize(
    "arguments",
    [["--device", "gpu"], ["--attention", "foo"], ["--split", "50"], ["--dtype", "int8"], ["--shape", "70b"]],
)
def test_bench_checks_its_options_before_it_builds_a_model(arguments):
    with pytest.raises(SettingError, match=f"{arguments[0]} {arguments[1]}"):
        runner.invoke(app, ["bench", *arguments], catch_exceptions=False)
    assert runner.invoke(app, ["bench", "--text", "0"]).exit_code == 2


@pytest.mark.parametrize("arguments", [["gin-files"], ["gin-files", "dpvr_lf_7b.gin"]])
def test_gin_files(arguments):
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0 and "DPVR-LF" in done.output
