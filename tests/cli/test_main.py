"""The console command."""

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import llava_patch
from llava_patch.cli.main import app
from llava_patch.core.errors import LlavaPatchError, SettingError

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


def test_the_command_starts_without_loading_models_code():
    code = (
        "import llava_patch.cli.main, sys; "
        "print([n for n in ('torch', 'transformers', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"  # seconds, before --help or an error about an option is shown


def test_help_shows_where_to_start_and_what_measures():
    said = runner.invoke(app, ["--help"]).output
    assert "Measure a checkpoint" in said and "Start with doctor" in said


def test_every_job_is_a_subcommand():
    shown = runner.invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    for name in (
        "doctor", "inspect", "report", "saturation", "gradients", "attention-maps", "drift", "fusion-attention",
        "reach", "flops", "rprobe", "correlate", "bench", "demo", "evidence", "sweep", "merge", "convert", "gin-files",
    ):  # fmt: skip
        assert f" {name} " in shown
    done = runner.invoke(app, ["correlate", "a.json"])
    assert isinstance(done.exception, LlavaPatchError)  # the same command as `rprobe correlate`
    assert str(done.exception) == str(runner.invoke(app, ["rprobe", "correlate", "a.json"]).exception)


@pytest.mark.parametrize("command", ["convert", "merge"])
def test_the_folder_to_write_has_the_word_that_it_has_everywhere(command, tmp_path):
    done = runner.invoke(app, [command, "model", "old", "--output", str(tmp_path / "new"), "--to", "hf"])
    assert str(done.exception) == "old: the folder to write is named with --output old"
    gone = runner.invoke(app, [command, "./model", "--to", "hf", "--base", "./base"])
    assert "./model: no such folder" in str(gone.exception)
    whole = runner.invoke(app, [command, str(tmp_path), "--to", "hf", "--base", str(tmp_path)])
    assert "is no adapter of llava_patch" in str(whole.exception) and "leave out --base" in str(whole.exception)


def test_ctrl_c_anywhere_ends_with_130_and_one_line(monkeypatch, capsys):
    from llava_patch.cli.main import main

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_patch.tools.inspect.inspect_checkpoint", interrupted)
    monkeypatch.setattr(sys, "argv", ["llava-patch", "inspect", "x"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130 and capsys.readouterr().err.splitlines()[-1] == "interrupted"


def test_a_terminal_in_ascii_and_a_pipe_that_is_closed(tmp_path):
    code = [sys.executable, "-m", "llava_patch.cli.main"]
    ascii_only = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    words = ["inspect", str(tmp_path / "größe")]
    done = subprocess.run([*code, *words], capture_output=True, text=True, env=ascii_only)
    assert done.returncode == 2 and "gr\\" in done.stderr and "unexpected" not in done.stderr
    with subprocess.Popen([*code, "gin-files"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    "words", [["--version"], ["-h"], ["bench", "-h"], ["saturation", "-h"], ["rprobe", "run", "-h"]]
)
def test_the_habits_of_a_command_line(words):
    done = subprocess.run([sys.executable, "-m", "llava_patch", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.strip() == f"llava_patch {llava_patch.__version__}"
        if words == ["--version"]
        else "Usage" in done.stdout
    )


@pytest.mark.parametrize("dash", ["-", "_"])
def test_gin_bindings_are_given_with_either_dash(dash, tmp_path):
    words = ["flops", "--shape", "7b", f"--gin{dash}file", str(tmp_path / "no.gin")]
    done = subprocess.run([sys.executable, "-m", "llava_patch", *words], capture_output=True, text=True)
    assert done.returncode == 2 and "no.gin" in done.stderr, done.stderr
