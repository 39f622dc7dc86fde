"""Steps of the scripts: none is done that has not left what it was to leave; the closing table reads what they left."""

import json
import math
import sys

import fusion_table.run
import pytest
from fusion_table import arms, train
from quickstart import run as quickstart
from quickstart import steps, table
from quickstart.steps import Lacking, Steps, found, json_with, lacking, lmms_results, losses, metric


def test_a_step_runs_once_until_something_before_it_runs_again(tmp_path):
    done = []

    def run(inputs, names=("a", "b")):
        runner = Steps(tmp_path, inputs)
        for name in names:
            path = tmp_path / name
            runner.run(name, name, lambda name=name, path=path: (done.append(name), path.write_text(name)), [path])

    run(1)
    run(1)
    assert done == ["a", "b"]
    (tmp_path / "b").unlink()
    run(1)
    assert done == ["a", "b", "b"]
    (tmp_path / "b").write_text("")  # a marker does not make up for an empty file
    run(1)
    assert done == ["a", "b", "b", "b"]
    run(2)
    assert done == ["a", "b", "b", "b", "a", "b"]


def test_a_step_that_leaves_nothing_fails_and_is_not_done(tmp_path):
    runner, path = Steps(tmp_path, 0), tmp_path / "result.json"
    with pytest.raises(SystemExit) as ended:
        runner.run("eval", "6/8 lmms-eval", lambda: runner.command("eval", ["true", "--tasks", "pope"]), [path])
    log = tmp_path / "logs" / "eval.log"
    assert str(ended.value) == (
        f"step eval (6/8 lmms-eval) ended without an error, but {path} is not there; look into {log}, which this "
        "command wrote: true --tasks pope"
    )
    assert not (tmp_path / "eval.done").exists()
    with pytest.raises(SystemExit, match="is empty"):
        runner.run("touch", "touch", path.touch, [path])
    with pytest.raises(SystemExit, match=r"step folder .* is empty; this command was to leave it: mkdir "):
        folder = tmp_path / "made"
        runner.run("folder", "folder", lambda: runner.shown(["mkdir", str(folder)]), [folder])


def test_a_step_whose_files_lack_something_fails_and_is_not_done(tmp_path):
    runner, path = Steps(tmp_path, 0), tmp_path / "result.json"
    with pytest.raises(SystemExit, match=r"step a \(a\) ended without an error, but .*result.json has no wanted"):
        runner.run("a", "a", lambda: path.write_text("{}"), [path], lambda: json_with(path, "wanted"))
    assert not (tmp_path / "a.done").exists()
    done = []
    for _ in range(2):
        again = Steps(tmp_path, 0)
        again.run(
            "a", "a", lambda: (done.append(1), path.write_text('{"wanted": 1}')), [path],
            lambda: json_with(path, "wanted"),
        )  # fmt: skip
    assert done == [1]
    path.write_text("{}")
    with pytest.raises(SystemExit, match=r"cannot start: .* holds no x"):
        Steps(tmp_path, 0).run("a", "a", lambda: found(tmp_path, "x"), [path], lambda: json_with(path, "wanted"))
    assert not (tmp_path / "a.done").exists()


def test_a_failing_command_shows_its_end(tmp_path):
    with pytest.raises(SystemExit, match=r"bad failed \(exit 3\): bash -c (.|\n)*the reason"):
        Steps(tmp_path, 0).command("bad", ["bash", "-c", "echo the reason; exit 3"])
    with pytest.raises(SystemExit, match=r"failed \(exit 1\), see above: false"):
        Steps(tmp_path, 0).shown(["false"])


def test_a_folder_that_cannot_be_written_to_is_said_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="file/out/logs: nothing can be written there: Not a directory; name another"):
        Steps(tmp_path / "file" / "out", 0)


def test_files_are_looked_into(tmp_path):
    with pytest.raises(Lacking, match=r"holds no \*\.json$"):
        found(tmp_path, "*.json")
    (tmp_path / "a.json").touch()
    with pytest.raises(Lacking, match=r"holds no \*\.json that is not empty"):
        found(tmp_path, "*.json")
    for content in ("", "{", "[1]"):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(Lacking, match=r"a\.json (cannot be read|has no key)"):
            json_with(tmp_path / "a.json", "key")
    with pytest.raises(Lacking, match="cannot be read"):
        json_with(tmp_path / "none.json")


def trainer_state(folder, *values):
    folder.mkdir(parents=True, exist_ok=True)
    history = [{"step": i + 1, "loss": value} for i, value in enumerate(values)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [*history, {"train_loss": 1.0}]}))


def test_a_training_has_a_finite_loss_for_every_step(tmp_path):
    trainer_state(tmp_path, 2.0, 1.0)
    assert losses(tmp_path) == losses(tmp_path, 2) == [2.0, 1.0]
    with pytest.raises(Lacking, match="the losses of 2 steps, not of 3"):
        losses(tmp_path, 3)
    trainer_state(tmp_path)
    with pytest.raises(Lacking, match="the losses of 0 steps"):
        losses(tmp_path)
    trainer_state(tmp_path, 1.0, math.nan)
    with pytest.raises(Lacking, match="not finite: nan"):
        losses(tmp_path)


@pytest.fixture
def evaluation(tmp_path):
    """What lmms-eval leaves of the quickstart's tasks."""
    folder = tmp_path / "eval_stock" / "model"
    results = {task: {"alias": task} for task in quickstart.TASKS.split(",")}
    for _, task, name, _ in table.METRICS:
        results[task] |= {f"{name},none": 0.5, f"{name}_stderr,none": "N/A"}
    for task in results:
        (folder / task).mkdir(parents=True)
        (folder / f"2026_samples_{task}.jsonl").write_text("{}\n")
    for task in ("rprobe", "saturation"):
        (folder / task / f"{task}.json").write_text("{}")
        (folder / task / f"{task}.png").write_text("picture")
    (folder / "2026_results.json").write_text(json.dumps({"results": results}))
    quickstart.evaluated(folder.parent)
    return folder


@pytest.mark.parametrize("task", quickstart.TASKS.split(","))
def test_an_evaluation_without_one_of_its_tasks_is_not_done(task, evaluation):
    path = evaluation / "2026_results.json"
    results = json.loads(path.read_text())["results"]
    for row in ({"alias": task, "x_stderr,none": 1.0}, None):
        path.write_text(json.dumps({"results": {**results, task: row}}))
        with pytest.raises(Lacking, match=f"has no result of {task}"):
            quickstart.evaluated(evaluation.parent)
    path.write_text(json.dumps({"results": {**results, task: {"another,none": 1.0}}}))
    with pytest.raises(Lacking, match=f"have no .* of {task}; they have"):
        quickstart.evaluated(evaluation.parent)


@pytest.mark.parametrize(
    "gone", ["2026_results.json", "2026_samples_mme.jsonl", "rprobe/rprobe.json", "saturation/saturation.png"]
)
def test_an_evaluation_without_one_of_its_files_is_not_done(gone, evaluation):
    (evaluation / gone).write_text("")
    assert str(evaluation.parent) in str(lacking([evaluation.parent], lambda: quickstart.evaluated(evaluation.parent)))
    (evaluation / gone).unlink()
    assert str(evaluation.parent) in str(lacking([evaluation.parent], lambda: quickstart.evaluated(evaluation.parent)))


def test_the_first_step_that_leaves_nothing_ends_the_quickstart(tmp_path, monkeypatch):
    monkeypatch.setattr(Steps, "shown", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["quickstart", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"^step base .* ended without an error, but .*base\.json is not there"):
        quickstart.main()
    monkeypatch.setattr(sys, "argv", ["quickstart", str(tmp_path / "out"), "--rows", "0"])
    with pytest.raises(SystemExit) as ended:
        quickstart.main()
    assert ended.value.code == 2


def test_a_report_is_whole(tmp_path):
    page = tmp_path / "report.html"
    page.write_text("<html></html>\n")
    states = [{"name": "drift", "state": "done"}, {"name": "reach", "state": "skipped"}]
    (tmp_path / "report.json").write_text(json.dumps({"sections": states}))
    quickstart.reported(page)
    states[0]["state"] = "failed"
    (tmp_path / "report.json").write_text(json.dumps({"sections": states}))
    with pytest.raises(Lacking, match=r"report\.html is not whole: drift failed"):
        quickstart.reported(page)
    states[0]["state"] = "done"
    (tmp_path / "report.json").write_text(json.dumps({"sections": states}))
    page.write_text("<html>")
    with pytest.raises(Lacking, match="not whole"):
        quickstart.reported(page)


def test_metrics_are_read_whatever_their_filter(tmp_path):
    results = {"results": {"pope": {"pope_accuracy,none": 0.5, "alias": "pope"}}}
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "2026_results.json").write_text(json.dumps(results))
    read = lmms_results(tmp_path)
    assert metric(read, "pope", "pope_accuracy") == 0.5
    with pytest.raises(Lacking, match="no other of pope"):
        metric(read, "pope", "other")
    with pytest.raises(Lacking, match=r"results\.json"):
        lmms_results(tmp_path / "m" / "none")


def test_an_arm_of_the_fusion_table_is_done_when_it_has_left_weights_losses_and_counts(tmp_path, monkeypatch):
    place, log = tmp_path / "plain", tmp_path / "plain" / "logs"
    leaves, recipe = {}, train.Recipe(steps=(2, 2))
    monkeypatch.setattr(train, "command", lambda *_: ["train"])
    monkeypatch.setattr(Steps, "command", lambda self, name, *_, **__: leaves.get(name, lambda: None)())

    def arm():
        return fusion_table.run.run_arm(arms.PLAIN, recipe, tmp_path, tmp_path / "base", [])

    def stage(number, weights, *values):
        folder = train.stage_folder(place, number)
        trainer_state(folder, *values)
        (folder / weights).write_text("weights")
        (folder / "config.json").write_text("{}")
        (log / f"stage{number}.log").write_text("Number of trainable parameters = 1,000\n")

    with pytest.raises(SystemExit, match=r"step stage1 .*mm_projector\.bin is not there"):
        arm()
    leaves["stage1"] = lambda: stage(1, "mm_projector.bin", 2.0, 1.0)
    leaves["stage2"] = lambda: stage(2, "optimizer.bin", 2.0, 1.0)  # a state alone is no checkpoint
    with pytest.raises(SystemExit, match=r"step stage2 .*model\.safetensors is not there"):
        arm()
    leaves["stage2"] = lambda: stage(2, "model.safetensors", 2.0)
    with pytest.raises(SystemExit, match=r"step stage2 .*the losses of 1 steps, not of 2"):
        arm()
    leaves["stage2"] = lambda: stage(2, "model.safetensors", 2.0, 1.0)
    leaves["measure"] = lambda: (place / "measured.json").write_text('{"exact_match": 1.0}')
    with pytest.raises(SystemExit, match=r"step measure .*measured\.json has no final_loss, losses"):
        arm()
    whole = dict.fromkeys(fusion_table.run.NUMBERS, 1.0)
    leaves["measure"] = lambda: (place / "measured.json").write_text(json.dumps(whole))
    assert arm() == whole
    leaves.clear()
    assert arm() == whole  # all of it done before
    (log / "stage1.log").write_text("")
    with pytest.raises(SystemExit, match=r"Number of trainable parameters|is not there"):
        arm()
    with pytest.raises(ValueError, match="names no arm"):
        arms.choose(",")


def test_a_damaged_record_of_the_base_is_no_record(tmp_path):
    from quickstart import base

    for content in ("{", "{}"):
        (tmp_path / base.RECORD).write_text(content)
        assert base.finished(tmp_path, base.BaseSettings()) is None
    assert steps.lacking([tmp_path / base.RECORD]) is None
