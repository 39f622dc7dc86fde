"""Jobs that are killed: what a SIGKILL leaves, made by hand, and a loop of saves that is killed in truth."""

import random
import shutil

import pytest

from tests.reliability import kills
from tests.reliability.kills import JOBS, difference, moment, one_kill, outputs, usual_run


def _fixture(job, root):
    fixture = root / "fixture"
    fixture.mkdir()
    code, said = kills.in_fork(lambda: job.prepare(fixture), fixture, root / "fixture.log")
    assert code == 0, said
    return fixture


def _again(job, fixture, place):
    return kills.in_fork(lambda: job.run(fixture, place), place, place.with_suffix(".log"))


@pytest.fixture(scope="module", autouse=True)
def imported():
    kills.import_everything()


def _whole(name, root):
    job = JOBS[name]
    fixture = _fixture(job, root)
    usual = usual_run(job, fixture, root / "usual")
    return job, fixture, usual


def _cut_copy(root, name, *cuts):
    """The place of the uninterrupted run as a kill may leave it: files cut to half, or (ending in !) taken away."""
    place = root / name
    shutil.copytree(root / "usual", place)
    for cut in cuts:
        path = place / kills.OUT / cut.rstrip("!")
        if cut.endswith("!"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return place


def test_training_goes_on_from_whatever_a_kill_left(tmp_path):
    job, fixture, usual = _whole("train", tmp_path)
    states = {
        "in a checkpoint": ("checkpoint-4/trainer_state.json!", "model.safetensors!", "trainer_state.json!"),
        "in a state": ("checkpoint-4/trainer_state.json", "checkpoint-3/optimizer.pt"),
        "at the end": ("model.safetensors", "config.json", "trainer_state.json"),
    }
    for number, (name, cuts) in enumerate(states.items()):
        place = _cut_copy(tmp_path, f"state{number}", *cuts)
        code, said = _again(job, fixture, place)
        assert code == 0, (name, said[-2000:])
        assert not difference(usual.left, outputs(place / kills.OUT)), name
        aside = {path.name for path in (place / kills.OUT).glob("unfinished-*")}
        assert aside == {f"unfinished-{cut.split('/')[0]}" for cut in cuts if "/" in cut}, name


def test_a_sweep_goes_on_from_whatever_a_kill_left(tmp_path):
    job, fixture, usual = _whole("sweep", tmp_path)
    run = "Routing.split-3/seed1"
    states = {
        "in a checkpoint": (f"{run}/checkpoint-6/trainer_state.json", f"{run}/trainer_state.json!",
                            f"{run}/llava_patch_sweep_evaluation.json!", "results.json!"),
        "in the evaluation": (f"{run}/llava_patch_sweep_evaluation.json!", f"{run}/evaluation/model!"),
        "at the end": ("results.json", "table.md!"),
    }  # fmt: skip
    for number, (name, cuts) in enumerate(states.items()):
        place = _cut_copy(tmp_path, f"state{number}", *cuts)
        code, said = _again(job, fixture, place)
        assert code == 0, (name, said[-2000:])
        assert not difference(usual.left, outputs(place / kills.OUT)), name
    refused = _cut_copy(tmp_path, "record", f"{run}/llava_patch_sweep.json")
    code, said = _again(job, fixture, refused)
    assert code == 2 and "llava_patch_sweep.json: not valid JSON" in said and "--overwrite" in said


def test_a_loop_of_saves_that_is_killed(tmp_path):
    job, fixture, usual = _whole("save", tmp_path)
    chance = random.Random(3)
    for number in range(2):
        after = moment(usual, 1, 2, chance)
        kind, note = one_kill(job, fixture, tmp_path / f"kill{number}", usual, after, whole=False)
        assert kind != "wrong", note


def test_moments_are_spread_over_the_run_and_its_writes():
    usual = kills.Usual(10.0, [9.0, 9.5])
    found = [moment(usual, number, 20, random.Random(number)) for number in range(20)]
    assert all(abs(after - 9.25) < 0.3 for after in found[1::2])
    assert all(number / 2 <= after <= (number + 1) / 2 for number, after in enumerate(found) if number % 2 == 0)


def test_unequal_results_are_told(tmp_path):
    for name, values in {"a": '{"x": 1, "seconds": 2}', "b": '{"x": 1, "seconds": 3}', "c": '{"x": 2}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "r.json").write_text(values)
    a, b, c = (outputs(tmp_path / name) for name in "abc")
    assert not difference(a, b) and "r.json/x: 1 and 2" in difference(a, c)
    (tmp_path / "c" / "further.txt").touch()
    assert "further.txt" in difference(a, outputs(tmp_path / "c"))
