import json
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from llava_patch.cli.main import app
from llava_patch.core.errors import CheckpointError, SettingError
from llava_patch.tools.evidence import report, run, study
from llava_patch.tools.evidence.findings import UNDECIDED, Missing
from llava_patch.tools.evidence.study import SIZES, Study
from tests.tools.evidence import toy

CPU = SIZES["cpu"]


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setattr(study, "STUDIES", ("toy",))
    runs = {f"toy/{one.name}": one for one in toy.RUNS}
    monkeypatch.setattr(study, "read", lambda name: Study(name, toy.TITLE, toy.ABOUT, runs, sys.modules[toy.__name__]))


def done(folder, quick=True, minutes=None, said=None):
    every = run.tasks(run.chosen([]), CPU, quick, "cpu")
    failed = run.do(every, folder, CPU, "cpu", 2, minutes, (said if said is not None else []).append)
    return every, failed


def test_runs_are_done_once_and_what_is_damaged_or_lacks_its_weights_is_done_again(tmp_path):
    every, failed = done(tmp_path)
    assert failed == {} and len(every) == 6
    records = {place: run.kept(tmp_path, task) for place, task in every.items()}
    assert all(
        record["seed"] == seed and record["weights"] == (name == "toy/base") for (name, seed), record in records.items()
    )
    said = []
    done(tmp_path, said=said)
    assert said == []
    study.run_path(tmp_path, "toy/arm", 1).write_text("{")
    study.weights_path(tmp_path, "toy/base", 2).unlink()
    done(tmp_path, said=said)
    assert sorted(line.partition(": ")[2].rpartition(",")[0] for line in said) == [
        "toy/arm, seed 1",
        "toy/base, seed 2",
    ]
    again = {place: run.kept(tmp_path, task)["result"] for place, task in every.items()}
    assert again == {place: record["result"] for place, record in records.items()}  # the same command, the same numbers


def test_a_key_changes_with_what_decides_a_result_and_with_the_keys_below_it(monkeypatch):
    before = run.tasks(run.chosen([]), CPU, True, "cpu")
    monkeypatch.setattr(run, "versions", lambda: {"torch": "another"})
    other = run.tasks(run.chosen([]), CPU, True, "cpu")
    assert all(before[place].key != other[place].key for place in before)
    monkeypatch.undo()
    base = toy.RUNS[0]
    text = type(base).sources
    monkeypatch.setattr(type(base), "sources", lambda self: text(self) + ("new" if self.name == "base" else ""))
    runs = {f"toy/{one.name}": one for one in toy.RUNS}
    monkeypatch.setattr(study, "STUDIES", ("toy",))
    monkeypatch.setattr(study, "read", lambda name: Study(name, "", "", runs, sys.modules[toy.__name__]))
    changed = run.tasks(run.chosen([]), CPU, True, "cpu")
    assert all(before[place].key != changed[place].key for place in before)


def test_what_fails_is_named_with_its_log_and_what_needs_it_is_not_tried(tmp_path):
    said = []
    every, failed = done(tmp_path, quick=False, said=said)
    assert sorted(failed) == [f"toy/fails, seed {seed}" for seed in range(3)]
    assert "more than all of them" in failed["toy/fails, seed 0"]
    assert "more than all of them" in (tmp_path / "runs" / "toy" / "fails-seed0.log").read_text()
    values = run.collect(every, tmp_path, CPU, "a machine")
    assert list(values["runs"]) == ["toy/base", "toy/arm"]
    assert report.sections(values)[0].lacking == "not whole: toy/fails, toy/after"


def test_after_its_minutes_nothing_is_begun(tmp_path):
    every, failed = done(tmp_path, minutes=0)
    assert failed == {} and not any(run.kept(tmp_path, task) for task in every.values())


def test_names_that_no_study_has_are_refused():
    with pytest.raises(SettingError, match="--only toys: expected one of toy"):
        run.chosen(["toys"])


def test_the_command_writes_results_and_pages_which_can_be_written_again(tmp_path):
    result = CliRunner().invoke(app, ["evidence", "--quick", "--output", str(tmp_path / "out"), "--jobs", "2"])
    assert result.exit_code == 0, result.output
    assert "1 holds, 0 does not hold, 0 undecided" in result.output
    page, text = ((tmp_path / "out" / name).read_text() for name in (report.PAGE, report.TEXT))
    assert "The base reads more than the arm" in page and "http" not in page.replace("http-equiv", "")
    assert "![A toy](figures/toy_arms.png)" in text and (tmp_path / "out" / "figures" / "toy_arms.png").is_file()
    kept = tmp_path / "out" / run.KEPT
    result = CliRunner().invoke(app, ["evidence", "--from", str(kept), "--output", str(tmp_path / "again")])
    assert result.exit_code == 0 and (tmp_path / "again" / report.TEXT).read_text() == text
    listed = CliRunner().invoke(app, ["evidence", "--list", "--output", str(tmp_path / "out")])
    assert "6 of 12 runs to do" in listed.output and "there" in listed.output
    assert report.first_screen(report.sections(json.loads(kept.read_text()))).count("base > arm | holds") == 1


def test_a_file_of_another_format_is_refused(tmp_path):
    path = tmp_path / "evidence.json"
    path.write_text('{"format": 0, "runs": {}}')
    with pytest.raises(CheckpointError, match="not this version's evidence"):
        run.read(path)


def test_a_run_that_is_not_there_is_missing():
    with pytest.raises(Missing):
        Study("toy", "", "", {}, sys.modules[toy.__name__]).findings({"toy/base": [{}]})
    assert replace(CPU, seeds=1).seeds == 1


def test_a_study_that_was_broken_off_is_judged_on_the_seeds_that_all_its_runs_have(tmp_path):
    every, _ = done(tmp_path)
    study.run_path(tmp_path, "toy/arm", 1).unlink()
    values = run.collect(every, tmp_path, CPU, "a machine")
    (section,) = report.sections(values)
    (finding,) = section.findings
    assert len(finding.effect) == 2 and finding.verdict == UNDECIDED and "toy/arm" in section.lacking
    whole = report.results_of(section.study, values)
    assert whole["toy/base"] == [values["runs"]["toy/base"]["results"][seed] for seed in (0, 2)]
