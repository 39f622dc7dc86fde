"""The console command."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from llava_patch.cli import app
from llava_patch.errors import SettingError

runner = CliRunner()


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


def test_help_does_not_wait_for_torch():
    code = "import sys, llava_patch.cli; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    said = runner.invoke(app, ["--help"]).output
    assert "Measure a checkpoint" in said and "Start with doctor" in said
