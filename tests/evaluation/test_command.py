"""What an lmms-eval command asks for, read from its arguments, and whether that came out; without lmms-eval."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from llava_patch.evaluation import command
from llava_patch.evaluation.command import Command, evaluations
from llava_patch.resources import eval_tasks_dir


def involved(*words: str) -> bool:
    return Command("lmms-eval ...", words).involves_us()


@pytest.fixture
def stock(tmp_path: Path) -> str:
    (tmp_path / "stock").mkdir()
    (tmp_path / "stock" / "config.json").write_text(json.dumps({"model_type": "llava"}))
    return f"pretrained={tmp_path / 'stock'},device_map=cpu"


@pytest.mark.parametrize(
    "words",
    [
        ["--tasks", "rprobe"],
        ["--tasks=pope,saturation"],
        ["--task", "drift"],  # argparse takes abbreviations
        ["eval", "--model", "llava", "--tasks", "rprobe_ablation"],
        ["--tasks", "rprobe*"],
        ["--tasks", str(eval_tasks_dir() / "drift" / "drift.yaml")],
        ["--tasks", str(eval_tasks_dir() / "drift")],
        ["--tasks", "pope", "--gin_param", "Routing.split = 2"],
        ["--tasks", "pope", "--gin_file=dpvr_lf_7b.gin"],
    ],
    ids=" ".join,
)
def test_our_tasks_and_flags_involve_us(words: list[str]) -> None:
    assert involved(*words)


@pytest.mark.parametrize(
    "words",
    [
        ["--tasks", "pope,mme", "--model", "llava"],
        ["--tasks", "rprobe_of_another"],
        ["--tasks", "list", "--model", "rprobe"],
        ["--tasks", "rprobe", "--help"],
        ["--tasks", "rprobe", "--power-analysis"],
        ["tasks", "list"],
        ["eval"],
        [],
    ],
    ids=" ".join,
)
def test_stock_evaluations_and_other_jobs_do_not(words: list[str]) -> None:
    assert not involved(*words)


def test_the_environment_involves_us_in_evaluations_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_PATCH_GIN_PARAM", " ; ")
    assert not involved("--tasks", "pope")
    monkeypatch.setenv("LLAVA_PATCH_GIN_PARAM", "Routing.split = 2")
    assert involved("--tasks", "pope") and involved("--model", "llava")
    assert not involved("--tasks", "list") and not involved("tasks", "list")


def test_patched_checkpoints_involve_us(tmp_path: Path, stock: str) -> None:
    full, adapter = tmp_path / "full", tmp_path / "adapter"
    full.mkdir()
    adapter.mkdir()
    (full / "config.json").write_text(json.dumps({"model_type": "llava", "llava_patch": {"format": 1}}))
    (adapter / "llava_patch.json").write_text("{}")
    assert not involved("--tasks", "pope", "--model_args", stock)
    for arguments in (f"pretrained={full}", f"device_map=cpu,pretrained={adapter}", f"{stock},model_base={full}"):
        assert involved("--tasks", "pope", "--model_args", arguments)
    (full / "config.json").write_text("{")  # whoever loads it says so
    assert not involved("--tasks", "pope", "--model_args", f"pretrained={full},dtype=")


def test_a_patched_checkpoint_of_the_hub_does_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps({"llava_patch": {}}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert involved("--tasks", "pope", "--model_args", "pretrained=some/model")
    assert not involved("--tasks", "pope", "--model_args", "pretrained=other/model,conv=v1")


def test_yaml_configurations_are_read(tmp_path: Path, stock: str) -> None:
    file = tmp_path / "runs.yaml"
    words = ["--config", str(file)]
    file.write_text(f"- model: llava\n  tasks: pope\n- model: llava\n  tasks: mme\n  model_args: '{stock}'\n")
    assert [one["tasks"] for one in evaluations(words)] == ["pope", "mme"] and not involved(*words)
    assert [one["tasks"] for one in evaluations([*words, "--tasks", "x"])] == ["x", "x"]
    file.write_text("- tasks: pope\n- tasks: rprobe\n")
    assert involved(*words)
    file.write_text("tasks: pope\nenv: {LLAVA_PATCH_GIN_PARAM: 'Routing.split = 2'}\n")
    assert involved(*words)
    (tmp_path / "patched").mkdir()
    (tmp_path / "patched" / "llava_patch.json").write_text("{}")
    file.write_text(f"tasks: pope\nmodel_args: {{pretrained: {tmp_path / 'patched'}, trust: true}}\n")
    assert involved(*words)
    file.write_text("tasks: [")
    assert not involved(*words) and involved(*words, "--tasks", "rprobe")


def test_tasks_made_from_ours_are_ours(tmp_path: Path) -> None:
    ours = eval_tasks_dir() / "rprobe" / "rprobe.yaml"
    (tmp_path / "a.yaml").write_text(f"include: {ours}\ntask: mine\n")
    (tmp_path / "b.yaml").write_text("group: inner\ntask: [mine, pope]\n")
    (tmp_path / "c.yaml").write_text("group: outer\ntask:\n  - {group: inner}\n")
    (tmp_path / "d.yaml").write_text("task: theirs\nclass: !function x.Y\noutput_type: generate_until\n")
    (tmp_path / "e.yaml").write_text("include: e.yaml\ntask: circle\n")
    for task, expected in {"mine": True, "inner": True, "outer": True, "theirs": False, "circle": False}.items():
        assert involved("--tasks", task, "--include_path", str(tmp_path)) is expected
    assert not involved("--tasks", "mine")


@pytest.mark.parametrize(
    "argv, interpreter, expected",
    [
        (["/env/bin/lmms-eval"], ["python", "/env/bin/lmms-eval"], "lmms-eval"),
        (["-m"], ["python", "-u", "-m", "lmms_eval"], "python -m lmms_eval"),
        (["-m"], ["python", "-mlmms_eval"], "python -m lmms_eval"),
        (["/env/lmms_eval/__main__.py"], ["python", "-m", "lmms_eval"], "python -m lmms_eval"),
        (["/my/script.py"], ["python", "/my/script.py", "-m", "lmms_eval"], None),
        (["-m"], ["python", "-m", "pytest"], None),
        (["/env/bin/lmms-eval"], ["python", "-c", "from multiprocessing...", "--multiprocessing-fork"], None),
    ],
)
def test_the_command_is_known_however_it_was_started(
    argv: list[str], interpreter: list[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [*argv, "--tasks", "a b"])
    monkeypatch.setattr(sys, "orig_argv", [*interpreter, "--tasks", "a b"])
    monkeypatch.setattr(command, "_current", None)
    monkeypatch.setattr(command.atexit, "register", lambda function: None)
    command.watch()
    found = command._current
    assert (found and found.line) == (expected and f"{expected} --tasks 'a b'")


def results(**tasks: dict[str, Any]) -> dict[str, Any]:
    return {"results": tasks, "configs": {name: {} for name in tasks}}


GOOD = results(rprobe={"alias": "rprobe", "rprobe_mse,none": 0.5}, pope={"alias": "pope", "f1,none": None})


def test_only_a_whole_table_is_a_success(tmp_path: Path) -> None:
    run = Command("lmms-eval ...", ["--tasks", "rprobe,pope"])
    assert run.why_failed() == "no table of results came out for rprobe,pope; the reason stands above"
    run.results = [GOOD]
    assert run.why_failed() is None
    for row in ({"alias": "pope"}, {"alias": "pope", " ": " ", "f1_stderr,none": 0.1}):
        run.results = [results(rprobe={"rprobe_mse,none": 0.5}, pope=row)]
        assert run.why_failed() == "the table has no result for pope"
    run.results = [results()]
    assert run.why_failed() == "the table has no result for any task"
    run.results = [None]  # a rank that is given no results
    assert run.why_failed() is None
    run.error = ValueError("two\n lines")
    assert run.why_failed() == "ValueError: two lines"


def test_every_evaluation_of_a_command_counts(tmp_path: Path) -> None:
    (tmp_path / "runs.yaml").write_text("- tasks: rprobe\n- tasks: drift\n")
    run = Command("lmms-eval ...", ["--config", str(tmp_path / "runs.yaml")])
    run.results = [GOOD]
    assert "no table of results came out for drift" in str(run.why_failed())
    run.results = [GOOD, GOOD]
    assert run.why_failed() is None


def test_the_results_file_is_looked_into(tmp_path: Path) -> None:
    run = Command("lmms-eval ...", ["--tasks", "rprobe,pope", "--output_path", str(tmp_path / "out")])
    run.results = [GOOD]
    missing = f"no results file with rprobe, pope was written below {tmp_path / 'out'}"
    assert run.why_failed() == missing
    folder = tmp_path / "out" / "model"
    folder.mkdir(parents=True)
    for content in ("", "[]", json.dumps({"results": {"rprobe": {}}})):
        (folder / "1_results.json").write_text(content)
        assert run.why_failed() == missing
    (folder / "1_results.json").write_text(json.dumps(GOOD))
    assert run.why_failed() is None
    run.started += 100  # an earlier run's
    assert run.why_failed() == missing
