"""What an lmms-eval command asks for, read from its arguments, and whether that came out; without lmms-eval."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llava_patch.core.paths import eval_tasks_dir
from llava_patch.integrations.lmms_eval import asked, command
from llava_patch.integrations.lmms_eval.asked import evaluations
from llava_patch.integrations.lmms_eval.command import Command
from tests.support.paths import ROOT


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
        ["--tasks", " rprobe"],
        ["--tasks", "pope, rprobe"],
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
    file.write_text("tasks: [rprobe]\n")  # lmms-eval fails on the list, and swallows that
    assert involved(*words)
    file.write_text("tasks: [")
    assert not involved(*words) and involved(*words, "--tasks", "rprobe")


def test_tasks_made_from_ours_are_ours(tmp_path: Path) -> None:
    ours = eval_tasks_dir() / "rprobe" / "rprobe.yaml"
    (tmp_path / "a.yaml").write_text(f"include: {ours}\ntask: mine\ntag: [mytag, other]\ngroup: mygroup\n")
    (tmp_path / "f.yaml").write_text("group: of_tag\ntask: [mytag]\n")
    (tmp_path / "g.yaml").write_text("group: inline\ntask: [{group: x, task: [pope, {task: rprobe}]}]\n")
    (tmp_path / "h.yaml").write_text("group: stock\ntask: [pope]\n")
    (tmp_path / "b.yaml").write_text("group: inner\ntask: [mine, pope]\n")
    (tmp_path / "c.yaml").write_text("group: outer\ntask:\n  - {group: inner}\n")
    (tmp_path / "d.yaml").write_text("task: theirs\nclass: !function x.Y\noutput_type: generate_until\n")
    (tmp_path / "e.yaml").write_text("include: e.yaml\ntask: circle\n")
    for task in ("mine", "inner", "outer", "mytag", "other", "mygroup", "of_tag", "inline", str(tmp_path / "g.yaml")):
        assert involved("--tasks", task, "--include_path", str(tmp_path)), task
    for task in ("theirs", "circle", "stock", str(tmp_path / "h.yaml")):
        assert not involved("--tasks", task, "--include_path", str(tmp_path)), task
    assert not involved("--tasks", "mine")


def test_tasks_of_plugins_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = tmp_path / "a_plugin" / "tasks"
    tasks.mkdir(parents=True)
    (tmp_path / "a_plugin" / "__init__.py").touch()
    (tasks / "a.yaml").write_text(f"include: {eval_tasks_dir() / 'rprobe' / 'rprobe.yaml'}\ntask: mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LMMS_EVAL_PLUGINS", "not_there,a_plugin")
    assert involved("--tasks", "mine") and not involved("--tasks", "pope")


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


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Command]:
    def started(*words: str) -> Command:
        monkeypatch.setattr(command, "_current", Command("lmms-eval ...", words))
        assert command._current is not None
        return command._current

    return started


def ran(outcome: Any, complete: bool = True, **arguments: Any) -> None:
    known = SimpleNamespace(**arguments)
    command.current().began(known)
    command.current().ended(known, outcome, complete)


def test_only_a_whole_table_is_a_success(start: Callable[..., Command]) -> None:
    run = start("--tasks", "rprobe,pope")
    no_table = "no table of results came out for rprobe,pope; the reason stands above"
    assert run.why_failed() == no_table
    ran(GOOD, complete=False)
    assert run.why_failed() == no_table
    command.current().printed(results())
    assert run.why_failed() == no_table
    command.current().printed(GOOD)
    assert run.why_failed() is None
    for row in ({"alias": "pope"}, {"alias": "pope", " ": " ", "f1_stderr,none": 0.1}):
        ran(results(rprobe={"rprobe_mse,none": 0.5}, pope=row))
        assert run.why_failed() == "the table has no result for pope"
    ran(results())
    assert run.why_failed() == "the table has no result for any task"
    ran(None)  # a rank that is given no results
    assert run.why_failed() is None
    ran(ValueError("two\n lines"))
    assert run.why_failed() == "ValueError: two lines"
    ran(GOOD)  # tried again
    assert run.why_failed() is None


def test_every_evaluation_of_a_command_counts_for_itself(tmp_path: Path, start: Callable[..., Command]) -> None:
    tasks = ("rprobe", "drift", "saturation")
    file = tmp_path / "runs.yaml"
    file.write_text(json.dumps([{"tasks": task, "output_path": str(tmp_path / task)} for task in tasks]))

    def all_but(*left_out: str) -> Command:
        run = start("--config", str(file))
        for task in tasks:
            if task not in left_out:
                arguments = SimpleNamespace(tasks=task, output_path=str(tmp_path / task), model="llava")
                command.current().began(arguments)
                table = results(**{task: {"x,none": 1}})
                (tmp_path / task).mkdir(exist_ok=True)
                (tmp_path / task / f"{len(list((tmp_path / task).iterdir()))}_results.json").write_text(
                    json.dumps(table)
                )
                command.current().ended(arguments, table, complete=True)
        return run

    assert all_but().why_failed() is None
    assert all_but("drift").why_failed() == "no table of results came out for drift; the reason stands above"
    assert "for rprobe;" in str(all_but("rprobe", "drift").why_failed())
    run = all_but("drift")
    ran(ValueError("x"), tasks="drift", output_path=str(tmp_path / "drift"))
    assert run.why_failed() == "ValueError: x"


def test_evaluations_that_look_alike_are_told_apart(tmp_path: Path, start: Callable[..., Command]) -> None:
    (tmp_path / "runs.yaml").write_text("- {tasks: rprobe, limit: 1}\n- {tasks: rprobe, limit: 2}\n")
    run = start("--config", str(tmp_path / "runs.yaml"))
    ran(results(rprobe={"x,none": 1}), tasks="rprobe")
    assert "no table" in str(run.why_failed())
    ran(results(rprobe={"x,none": 1}), tasks="rprobe")
    assert run.why_failed() is None


def test_the_results_file_is_looked_into(tmp_path: Path, start: Callable[..., Command]) -> None:
    run = start("--tasks", "rprobe,pope", "--output_path", str(tmp_path / "out"))
    (tmp_path / "1_results.json").write_text(json.dumps(GOOD))  # beside the output, not in it
    ran(GOOD)
    missing = f"no results file with rprobe, pope was written below {tmp_path / 'out'}"
    assert run.why_failed() == missing
    folder = tmp_path / "out" / "model"
    folder.mkdir(parents=True)
    for content in ("", "[]", json.dumps({"results": {"rprobe": {}}})):
        (folder / "1_results.json").write_text(content)
        assert run.why_failed() == missing
    (folder / "1_results.json").write_text(json.dumps(GOOD))
    assert run.why_failed() is None
    os.utime(folder / "1_results.json", (1, 1))  # a file server with another clock
    assert run.why_failed() is None
    ran(GOOD)  # an earlier run's
    assert run.why_failed() == missing
    (folder / "2_results.json").write_text(json.dumps(GOOD))
    assert run.why_failed() is None


def test_files_are_looked_for_below_the_output_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[Path] = []
    for name in ("glob", "rglob"):
        original = getattr(Path, name)
        monkeypatch.setattr(
            Path, name, lambda self, *args, original=original: searched.append(self) or original(self, *args)
        )
    assert command._missing(GOOD, tmp_path / "not" / "there", frozenset()) is not None
    assert searched and set(searched) == {tmp_path / "not" / "there"}


def folder_of_oddities(root: Path) -> str:
    """Tasks that lmms-eval accepts, or that break whoever reads them."""
    (root / "groups.yaml").write_text("task: [pope]\ngroup: [g1, g2]\n")
    (root / "tagged.yaml").write_text("task: mine\ngroup: [g1, g2]\ntag: {a: 1}\ninclude: 5\n")
    (root / "date.yaml").write_text("task: mine\ndate: 2024-02-30\n")
    (root / "python.yaml").write_text("task: mine\nvalue: !!python/tuple [1, 2]\n")
    return str(root)


def test_no_task_file_is_too_odd(tmp_path: Path) -> None:
    odd = folder_of_oddities(tmp_path)
    for tasks, expected in (("rprobe", True), ("pope,g1", False)):
        run = Command("lmms-eval ...", ["--tasks", tasks, "--include_path", odd])
        assert run.involves_us() is expected and run.doubt is None


def test_a_fault_of_ours_ends_no_evaluation_and_hides_no_failure(
    start: Callable[..., Command], monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(*args: Any) -> bool:
        raise TypeError("unhashable")

    monkeypatch.setattr(asked, "_names_us", faulty)
    run = start("--tasks", "pope")
    assert not command.current().involves_us() and "TypeError: unhashable" in str(run.failure())
    ran(GOOD)
    assert run.failure() is None
    monkeypatch.setattr(asked, "evaluations", faulty)
    run = start("--tasks", "pope")
    ran(GOOD)
    assert "cannot be told (TypeError: unhashable)" in str(run.failure())


@pytest.mark.parametrize(
    "given, status, raised",
    [
        (None, None, SystemExit),
        (None, 0, SystemExit),
        ({"tasks": "rprobe"}, None, command.EvaluationFailure),
        ({"tasks": "pope"}, None, None),
    ],
)
def test_the_command_ends_with_its_failure_and_other_programs_are_told(
    given: dict[str, Any] | None, status: int | None, raised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/my/script.py"])
    run = None if given else Command("lmms-eval ...", ["--tasks", "rprobe"])
    monkeypatch.setattr(command, "_current", run)
    with pytest.raises(raised, match="no table of results came out for rprobe") if raised else nullcontext():
        with command.called(SimpleNamespace(**given) if given else None):
            assert command._current is not None
            if status is not None:
                sys.exit(status)
    assert command._current is run and (run is None or run.told)


def test_what_lmms_eval_ends_with_itself_is_left(start: Callable[..., Command]) -> None:
    run = start("--tasks", "rprobe")
    for end in (SystemExit(2), KeyboardInterrupt()):
        with pytest.raises(type(end)) as caught, command.called():
            raise end
        assert caught.value is end and not run.told
    ran(results(rprobe={"x,none": 1}))
    with pytest.raises(SystemExit) as ended, command.called():
        sys.exit(0)
    assert ended.value.code == 0


AT_EXIT = """
import atexit, sys, tempfile
atexit.register(print, "an earlier handler")
kept, file = tempfile.TemporaryDirectory(dir="."), open("file", "w")
file.write("buffered")
from llava_patch.integrations.lmms_eval import command
sys.argv = ["lmms-eval", "--tasks", sys.argv[1]]
command.watch()
sys.last_type = ValueError  # as after PyErr_Print in an extension
"""


@pytest.mark.parametrize("task, status", [("rprobe", 1), ("pope", 0)])
def test_the_net_at_exit_lets_all_else_end_first(task: str, status: int, tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, task], cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths.rstrip(os.pathsep)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == status and ("this evaluation failed: no table" in done.stderr) is bool(status)
    assert done.stdout == "an earlier handler\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "buffered"
