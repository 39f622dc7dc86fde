"""`llava-patch sweep` from end to end, with a script that stands in for training."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from llava_patch.cli.main import app, main
from llava_patch.core.errors import BusyError, SettingError
from llava_patch.tools.sweep.command import sweep
from llava_patch.tools.sweep.record import EVALUATION_FILE, FILE
from tests.support import run_folders


def _results(output):
    return json.loads((output / "results.json").read_text())


def test_means_spreads_tables_and_plot(sweep_file, command, calls, tmp_path):
    arguments = ["sweep", str(sweep_file), "--output", str(tmp_path / "out"), "--", *command]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    assert len(calls()) == 4
    points = _results(tmp_path / "out")["points"]
    # seeds 1 and 3 give split + 1 and split + 3; the first ten steps do not count
    assert [p["summary"]["final loss"] for p in points] == [
        {"mean": 5.0, "std": pytest.approx(2**0.5), "n": 2},
        {"mean": 7.0, "std": pytest.approx(2**0.5), "n": 2},
    ]
    assert [r["loss"] for r in points[0]["runs"]] == [
        {"mean": 4.0, "steps": 50, "last_step": 60},
        {"mean": 6.0, "steps": 50, "last_step": 60},
    ]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| 3 | final loss | 5.0000 ± 1.4142 | 2 of 2 |" in table
    assert "| seed 1 | seed 3 |" in table and "| 5 | final loss | 6.0000 | 8.0000 |" in table
    assert "5.0000 ± 1.4142" in done.output and "fewer than 50" not in done.output
    assert (tmp_path / "out" / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_one_seed_has_no_spread_and_short_runs_are_named(sweep_file, command, calls, tmp_path):
    arguments = ["sweep", str(sweep_file), "--output", str(tmp_path / "o"), "--seeds", "42", "--", *command]
    done = CliRunner().invoke(app, [*arguments, "--steps", "20"], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    run = _results(tmp_path / "o")["points"][0]
    assert run["summary"]["final loss"] == {"mean": pytest.approx((10 * 100 + 10 * 45) / 20), "std": None, "n": 1}
    assert run["runs"][0]["loss"]["steps"] == 20
    assert "fewer than 50 steps: the mean is over 20" in done.output


def test_a_baseline_has_its_own_rows_and_gives_a_bubble_chart(command, calls, tmp_path):
    file = tmp_path / "sweep.gin"
    file.write_text(
        'Sweep.gin_files = ("dpvr_lf_small.gin",)\nSweep.baseline = {"Routing.split": 4}\nSweep.seeds = (1,)\n'
        'Sweep.grid = [{"Routing.split": (2,), "Routing.side_layers": (1, 2)}, '
        '{"Routing.split": (6,), "Routing.side_layers": (1,)}]\n'
    )
    assert sweep(str(file), tmp_path / "o", command)
    points = _results(tmp_path / "o")["points"]
    assert [(p["baseline"], p["summary"]["final loss"]["mean"]) for p in points] == [
        (True, 5.0), (False, 3.0), (False, 3.0), (False, 7.0),
    ]  # fmt: skip
    table = (tmp_path / "o" / "table.md").read_text()
    assert "| Routing.split | Routing.side_layers | measured |" in table and "| 4 | - | final loss | 5.0000 |" in table
    assert "| 2 | 2 | final loss | 3.0000 |" in table
    assert all((tmp_path / "o" / name).read_bytes()[:4] == b"\x89PNG" for name in ("sweep.png", "bubbles.png"))


def test_a_failed_run_is_told_and_the_others_go_on(sweep_file, command, calls, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_FAIL", "3")
    assert sweep(str(sweep_file), tmp_path / "o", command) is False
    error = capsys.readouterr().err
    assert "the reason why" in error and "exit code 3" in error
    failed, well = _results(tmp_path / "o")["points"]
    assert failed["summary"] == {} and "the reason why" in failed["runs"][0]["error"]
    assert well["summary"]["final loss"]["n"] == 2
    assert "Failed, and left out of the means: Routing.split = 3, seed 1" in (tmp_path / "o" / "table.md").read_text()
    # the same again runs the failed ones alone
    monkeypatch.delenv("FAKE_FAIL")
    before = len(calls())
    assert sweep(str(sweep_file), tmp_path / "o", command) is True
    assert len(calls()) - before == 2
    assert all(p["summary"]["final loss"]["n"] == 2 for p in _results(tmp_path / "o")["points"])


def test_exit_code_of_a_failed_sweep(sweep_file, command, calls, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "3")
    arguments = ["sweep", str(sweep_file), "--output", str(tmp_path / "o"), "--seeds", "1", "--", *command]
    assert CliRunner().invoke(app, arguments).exit_code == 1


def test_finished_runs_are_kept_and_the_folder_may_move(sweep_file, command, calls, tmp_path):
    assert sweep(str(sweep_file), tmp_path / "o", command, seeds=[1])
    (tmp_path / "o").rename(tmp_path / "moved")
    assert sweep(str(sweep_file), tmp_path / "moved", command, seeds=[1, 2])
    assert len(calls()) == 4  # two new seeds, nothing again


def test_a_run_whose_files_are_gone_is_not_finished(sweep_file, command, calls, tmp_path):
    evaluate = " ".join([*command, "--evaluated", "{checkpoint}"])
    assert sweep(str(sweep_file), tmp_path / "o", command, seeds=[1], evaluate=evaluate)
    assert len(calls()) == 4
    run = tmp_path / "o" / "Routing.split-3" / "seed1"
    (results,) = run.glob("evaluation/**/*results.json")
    results.unlink()
    assert sweep(str(sweep_file), tmp_path / "o", command, seeds=[1], evaluate=evaluate)
    assert len(calls()) == 5 and "--evaluated" in calls()[-1]
    (run / "trainer_state.json").unlink()
    assert sweep(str(sweep_file), tmp_path / "o", command, seeds=[1], evaluate=evaluate)
    assert len(calls()) == 7 and "--evaluated" in calls()[-1]  # of what was trained anew


def test_records_of_other_settings_or_commands_are_refused(sweep_file, command, calls, tmp_path):
    assert sweep(str(sweep_file), tmp_path / "o", command, seeds=[1])
    text = sweep_file.read_text()
    with pytest.raises(SettingError, match=r"another command: nothing there, --steps 9 now"):
        sweep(str(sweep_file), tmp_path / "o", [*command, "--steps", "9"], seeds=[1])
    sweep_file.write_text(text + 'Sweep.gin_params = ("Routing.side_layers = 2",)\n')
    with pytest.raises(SettingError, match=r"settings: .*side_layers = 1 there, Routing.side_layers = 2 now"):
        sweep(str(sweep_file), tmp_path / "o", command, seeds=[1])
    assert len(calls()) == 2
    record = tmp_path / "o" / "Routing.split-3" / "seed1" / FILE
    record.unlink()
    sweep_file.write_text(text)
    with pytest.raises(SettingError, match=r"holds started but no llava_patch_sweep.json"):
        sweep(str(sweep_file), tmp_path / "o", command, seeds=[1])
    record.write_text("{")
    with pytest.raises(SettingError, match=r"not valid JSON .*--overwrite"):
        sweep(str(sweep_file), tmp_path / "o", command, seeds=[1])


def test_runs_of_other_settings_give_way_to_overwrite_alone(sweep_file, command, calls, tmp_path, capsys):
    assert sweep(str(sweep_file), tmp_path / "o", command, seeds=[1])
    run = tmp_path / "o" / "Routing.split-3" / "seed1"
    (run / "checkpoint-5").mkdir()  # what the other training must not go on from
    (run / "model.bin").touch()
    sweep_file.write_text(sweep_file.read_text() + 'Sweep.gin_params = ("Routing.side_layers = 2",)\n')
    with pytest.raises(SettingError, match="--overwrite"):
        sweep(str(sweep_file), tmp_path / "o", command, seeds=[1])
    assert len(calls()) == 2 and (run / "model.bin").exists()
    assert sweep(str(sweep_file), tmp_path / "o", command, seeds=[1], overwrite=True)
    assert len(calls()) == 4 and not (run / "model.bin").exists() and not (run / "checkpoint-5").exists()
    assert "--overwrite: to be done again" in capsys.readouterr().out
    assert sweep(str(sweep_file), tmp_path / "o", command, seeds=[1]) and len(calls()) == 4


def test_results_of_other_points_are_refused(sweep_file, command, calls, tmp_path):
    assert sweep(str(sweep_file), tmp_path / "o", command, seeds=[1])
    sweep_file.write_text(sweep_file.read_text().replace("(3, 5)", "(3, 4)"))
    with pytest.raises(SettingError, match=r"holds the results of Routing.split = 5, .* --overwrite"):
        sweep(str(sweep_file), tmp_path / "o", command, seeds=[1])
    assert len(calls()) == 2
    assert sweep(str(sweep_file), tmp_path / "o", command, seeds=[1], overwrite=True) and len(calls()) == 3


def test_settings_are_compared_by_meaning(sweep_file, command, calls, tmp_path):
    text = sweep_file.read_text() + 'Sweep.gin_params = ("SkipLinks.layers = LAYERS", "Flags.weight_decay = DECAY")\n'
    sweep_file.write_text(text.replace("LAYERS", "(1, 2)").replace("DECAY", "0"))
    assert sweep(str(sweep_file), tmp_path / "o", command, seeds=[1])
    sweep_file.write_text(text.replace("LAYERS", "[1, 2]").replace("DECAY", "0.0"))
    assert sweep(str(sweep_file), tmp_path / "o", command, seeds=[1]) and len(calls()) == 2
    sweep_file.write_text(text.replace("LAYERS", "[1, 3]").replace("DECAY", "0.0"))
    with pytest.raises(SettingError, match=r"SkipLinks.layers = \(1, 2\) there, SkipLinks.layers = \(1, 3\) now"):
        sweep(str(sweep_file), tmp_path / "o", command, seeds=[1])


@pytest.mark.parametrize("text", ["", "[]", "null", '{"format": 1', '{"format": 1}', '{"format": 2}', "\x00"])
def test_damaged_records_are_named_and_done_again_with_overwrite(text, sweep_file, command, calls, tmp_path):
    evaluate = " ".join([*command, "--evaluated", "{checkpoint}"])
    assert sweep(str(sweep_file), tmp_path / "o", command, seeds=[1], evaluate=evaluate)
    for name in (FILE, EVALUATION_FILE):
        record = tmp_path / "o" / "Routing.split-3" / "seed1" / name
        whole, before = record.read_text(), len(calls())
        record.write_text(text)
        with pytest.raises(SettingError, match=rf"{name}: .*--overwrite"):
            sweep(str(sweep_file), tmp_path / "o", command, seeds=[1], evaluate=evaluate)
        assert len(calls()) == before
        assert sweep(str(sweep_file), tmp_path / "o", command, seeds=[1], evaluate=evaluate, overwrite=True)
        assert len(calls()) == before + (2 if name == FILE else 1)
        assert json.loads(record.read_text()).keys() == json.loads(whole).keys()


@pytest.mark.parametrize("field", ["loss", "state", "command", "settings", "point"])
@pytest.mark.parametrize("value", [None, [], "x", {"mean": 1}])
def test_fields_of_a_record_that_are_of_another_kind(field, value, sweep_file, command, calls, tmp_path):
    assert sweep(str(sweep_file), tmp_path / "o", command, seeds=[1])
    record = tmp_path / "o" / "Routing.split-3" / "seed1" / FILE
    record.write_text(json.dumps({**json.loads(record.read_text()), field: value}))
    if field == "state":  # begun, as far as it says
        assert sweep(str(sweep_file), tmp_path / "o", command, seeds=[1]) and len(calls()) == 3
        return
    with pytest.raises(SettingError, match=f"{FILE}: .*--overwrite"):
        sweep(str(sweep_file), tmp_path / "o", command, seeds=[1])


def test_a_second_sweep_in_the_folder_is_refused(sweep_file, command, calls, tmp_path):
    # in another process: a lock's own process may enter again
    code = f"import pathlib, sys, time; from llava_patch.core.locks import folder_lock as lock\n" \
           f"with lock(pathlib.Path({str(tmp_path / 'o')!r})): print(1, flush=True); sys.stdin.read()"  # fmt: skip
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    try:
        with pytest.raises(BusyError, match="another run works in"):
            sweep(str(sweep_file), tmp_path / "o", command, seeds=[1])
    finally:
        other.communicate()
    assert not calls() and sweep(str(sweep_file), tmp_path / "o", command, seeds=[1])


def test_half_a_checkpoint_is_passed_over(sweep_file, command, calls, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_FAIL", "3")
    sweep(str(sweep_file), tmp_path / "o", command, seeds=[1])
    run = tmp_path / "o" / "Routing.split-3" / "seed1"
    run_folders.checkpoint(run / "checkpoint-4")
    run_folders.cut(run_folders.checkpoint(run / "checkpoint-6") / "optimizer.pt")
    monkeypatch.delenv("FAKE_FAIL")
    assert sweep(str(sweep_file), tmp_path / "o", command, seeds=[1])
    assert sorted(path.name for path in run.glob("*checkpoint-*")) == ["checkpoint-4", "unfinished-checkpoint-6"]
    said = " ".join(capsys.readouterr().err.split())
    assert "checkpoint-6/optimizer.pt: cannot be read as a whole file" in said and "goes on from" in said


def test_scores_that_are_infinite_or_no_number_stay_as_they_are(sweep_file, command, calls, tmp_path, monkeypatch):
    sweep_file.write_text(
        sweep_file.read_text() + 'Sweep.scores = {"both": ("pope/up", "pope/down"), "one": ("pope/up", "pope/none")}\n'
    )
    monkeypatch.setenv(
        "FAKE_SCORES", '{"up,none": Infinity, "down,none": -Infinity, "none,none": NaN, "x,none": 1e308}'
    )
    evaluate = " ".join([*command, "--evaluated", "{checkpoint}"])
    for _ in range(2):  # the second time from the records
        assert sweep(str(sweep_file), tmp_path / "o", command, seeds=[1, 3], evaluate=evaluate)
        point = _results(tmp_path / "o")["points"][0]
        assert point["runs"][0]["metrics"] == {
            "pope/up": "inf", "pope/down": "-inf", "pope/none": "nan", "pope/x": 1e308, "both": "nan", "one": "nan",
        }  # fmt: skip
        assert point["summary"]["pope/up"] == {"mean": None, "std": None, "n": 2}
    assert len(calls()) == 8


def test_evaluation_metrics_join_the_tables(sweep_file, command, calls, tmp_path):
    evaluate = " ".join([*command, "--evaluated", "{checkpoint}"])
    assert sweep(str(sweep_file), tmp_path / "o", command, evaluate=evaluate)
    summary = _results(tmp_path / "o")["points"][0]["summary"]
    assert summary["pope/pope_accuracy"]["mean"] == pytest.approx(0.95)
    assert list(summary) == ["final loss", "pope/pope_accuracy", "pope/pope_f1"]
    assert len(calls()) == 8
    assert sweep(str(sweep_file), tmp_path / "o", command, evaluate=evaluate)
    assert len(calls()) == 8
    with pytest.raises(SettingError, match=r"remove the file, or give --overwrite, to evaluate again"):
        sweep(str(sweep_file), tmp_path / "o", command, evaluate=evaluate + " --seed 1")
    with pytest.raises(SettingError, match=r"write \{checkpoint\}"):
        sweep(str(sweep_file), tmp_path / "o", command, evaluate="lmms-eval")


def test_scores_are_means_of_metrics(sweep_file, command, calls, tmp_path, capsys):
    sweep_file.write_text(
        sweep_file.read_text()
        + 'Sweep.scores = {"average": ("pope/pope_accuracy", "pope/pope_f1"), "OCR": ("ocr/a",)}\n'
    )
    evaluate = " ".join([*command, "--evaluated", "{checkpoint}"])
    assert sweep(str(sweep_file), tmp_path / "o", command, evaluate=evaluate, seeds=[1])
    for point in _results(tmp_path / "o")["points"]:
        metrics = point["runs"][0]["metrics"]
        assert list(metrics) == ["pope/pope_accuracy", "pope/pope_f1", "average"]
        assert metrics["average"] == (metrics["pope/pope_accuracy"] + metrics["pope/pope_f1"]) / 2
        assert point["summary"]["average"]["mean"] == metrics["average"] != metrics["pope/pope_accuracy"]
    told = capsys.readouterr().out
    assert "Sweep.scores: OCR is not there, for want of ocr/a." in told and "average is not there" not in told


def test_a_dry_run_writes_nothing(sweep_file, command, calls, tmp_path):
    arguments = ["sweep", str(sweep_file), "--output", str(tmp_path / "o"), "--dry-run", "--", *command]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
    assert done.exit_code == 0 and done.output.count("to do") == 4
    assert "--gin_param 'Routing.split = 5' --seed 3 --output_dir" in done.output
    assert not calls() and not (tmp_path / "o").exists()


def test_a_bad_point_stops_everything(sweep_file, command, calls, tmp_path, monkeypatch, capsys):
    sweep_file.write_text(sweep_file.read_text().replace("(3, 5)", "(3, -5)"))
    arguments = ["sweep", str(sweep_file), "--output", str(tmp_path / "o"), "--", *command]
    monkeypatch.setattr(sys, "argv", ["llava-patch", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.startswith("llava-patch: point Routing.split = -5 of the sweep")
    assert not calls() and not (tmp_path / "o").exists()


@pytest.mark.parametrize("seeds", ["a", "1,1", "-1"])
def test_bad_seeds(seeds, sweep_file, command, tmp_path):
    arguments = ["sweep", str(sweep_file), "--output", str(tmp_path / "o"), f"--seeds={seeds}", "--", *command]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, SettingError) and "expected distinct integers" in str(error)


def _start(sweep_file, command, tmp_path):
    arguments = [
        "-m",
        "llava_patch.cli.main",
        "sweep",
        str(sweep_file),
        "--output",
        str(tmp_path / "o"),
        "--",
        *command,
    ]
    process = subprocess.Popen(
        [sys.executable, *arguments], env={**os.environ, "FAKE_SLEEP": "60"}, stdout=subprocess.PIPE, text=True
    )
    started = tmp_path / "o" / "Routing.split-3" / "seed1" / "started"
    deadline = time.monotonic() + 60
    while not started.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.timeout(120)
def test_an_interrupted_sweep_leaves_nothing_running_and_resumes(sweep_file, command, calls, tmp_path):
    process = _start(sweep_file, command, tmp_path)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command again goes on" in output
    assert sweep(str(sweep_file), tmp_path / "o", command)  # the folder is free: the training ended too
    assert len(calls()) == 5


@pytest.mark.timeout(120)
def test_no_second_training_beside_one_that_outlived_its_sweep(sweep_file, command, calls, tmp_path):
    process = _start(sweep_file, command, tmp_path)
    process.kill()
    process.wait()
    child = int(subprocess.check_output(["pgrep", "-f", str(tmp_path / "o" / "Routing.split-3" / "seed1")]).split()[0])
    try:
        with pytest.raises(BusyError, match="seed1: a command that an earlier sweep started still runs there"):
            sweep(str(sweep_file), tmp_path / "o", command, seeds=[1])
        assert len(calls()) == 1 and not (tmp_path / "o" / "results.json").exists()
    finally:
        os.kill(child, signal.SIGKILL)
