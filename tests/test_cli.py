"""The console command."""

import json

import pytest
from typer.testing import CliRunner

from llava_patch.cli import app

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


@pytest.mark.parametrize("arguments", [["gin-files"], ["gin-files", "dpvr_lf_7b.gin"]])
def test_gin_files(arguments):
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0 and "DPVR-LF" in done.output
