"""Results: read while a run trains, saved and read again, summed up, drawn, and compared."""

import dataclasses
import json
import math

import pytest
import torch

from llava_patch.core.errors import CheckpointError, SettingError
from llava_patch.measurements.gradients.figure import gradients_figure, runs_figure
from llava_patch.measurements.gradients.log import LOG, StepLog
from llava_patch.measurements.gradients.measurement import Gradients
from llava_patch.measurements.gradients.moments import Step
from llava_patch.measurements.gradients.result import GradientsResult, ordered, runs_dict, runs_table
from llava_patch.measurements.gradients.statistics import Window

SETTINGS = Gradients(window=4, transition_windows=2, smoothness=10.0)


def make(count=40, turns=20, rate=1e-4, settings=SETTINGS, log=None, skip=2.0):
    """A run whose skip gradient is twice as long as the main one until step `turns`, then half as long."""
    generator, window = torch.Generator().manual_seed(0), Window(settings.window)
    steps, windows = [], []
    for number in range(1, count + 1):
        m = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
        s = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
        s = s * (skip if number <= turns else skip / 4)
        step, moments = window.add(number, m, m + s, rate)
        steps.append(step)
        windows += [] if moments is None else [moments]
        if log is not None:
            log.add(step, moments)
    return GradientsResult(
        steps, windows, settings, facts={"learning_rate": rate, "block": 6, "fusion": "SkipLinks(stride=6)"}
    )


def test_json_there_and_back(tmp_path):
    result = make()
    place, figure = result.save(tmp_path)
    assert (place.name, figure.name) == ("gradients.json", "gradients.png")
    written = json.loads(place.read_text())
    assert GradientsResult.from_dict(written) == result and GradientsResult.read(tmp_path) == result
    # With two low steps of four the running median is 1.25.
    assert written["transition_step"] == result.transition == 23
    assert len(written["windows"]) == 10 and written["windows"][0]["condition"] in (True, False)
    first = written["windows"][0]
    assert first["delta"] == pytest.approx(first["correlation"] * first["delta_bound"])
    assert {"|correlation| of both paths' noise", "largest delta at this c, 2 / sqrt(c)"} < {
        row[0] for row in result.table()[1]
    }
    assert written["median_delta"] == result.median_delta


def test_a_run_is_read_while_it_trains(tmp_path):
    log = StepLog(tmp_path, SETTINGS, {"learning_rate": 1e-4, "block": 6, "fusion": "SkipLinks(stride=6)"})
    assert GradientsResult.read(tmp_path).steps == []
    result = make(log=log)
    assert GradientsResult.read(tmp_path) == result
    whole = (tmp_path / LOG).read_text()
    (tmp_path / LOG).write_text(whole[:-20])  # the last line is being written
    assert len(GradientsResult.read(tmp_path).windows) == 9 and len(GradientsResult.read(tmp_path).steps) == 40


def test_a_run_that_is_resumed_takes_back_what_came_after_its_checkpoint(tmp_path):
    facts = {"block": 6}
    result = make(log=StepLog(tmp_path, SETTINGS, facts))
    log = StepLog.resume(tmp_path, SETTINGS, 10)
    read = GradientsResult.read(tmp_path)
    assert read.steps == result.steps[:10] and read.windows == result.windows[:2] and log.facts == facts
    log.add(result.steps[10])
    assert len(GradientsResult.read(tmp_path).steps) == 11
    with pytest.raises(CheckpointError, match=r"Gradients\.every = 1, not 2"):
        StepLog.resume(tmp_path, dataclasses.replace(SETTINGS, every=2), 10)
    read_otherwise = dataclasses.replace(SETTINGS, smoothness=3.0, transition_windows=9)
    StepLog.resume(tmp_path, read_otherwise, 11)
    assert GradientsResult.read(tmp_path).settings == read_otherwise
    StepLog(tmp_path, SETTINGS, facts)
    assert GradientsResult.read(tmp_path).steps == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "empty log"),
        ('{"kind": "step", "step": 1}\n', "line 1: not an entry"),
        ('{"kind": "run", "settings": {}, "facts": {}}\nnonsense\n', "line 2: not an entry"),
        ('{"kind": "run", "settings": {}, "facts": {}}\n{"kind": "step", "step": 1}\n', "damaged"),
        ('{"kind": "run", "settings": {"other": 1}, "facts": {}}\n', "damaged"),
    ],
)
def test_damaged_logs(tmp_path, text, message):
    (tmp_path / LOG).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        GradientsResult.read(tmp_path)


def test_a_folder_without_results(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither gradients\.jsonl nor gradients\.json"):
        GradientsResult.read(tmp_path)
    (tmp_path / "gradients.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"gradients\.json: not a gradients result"):
        GradientsResult.read(tmp_path)


def test_numbers_that_are_not_finite_survive(tmp_path):
    log = StepLog(tmp_path, SETTINGS, {})
    log.add(Step(1, math.inf, math.nan, math.inf, math.nan))
    log.add(Step(2, 1.0, 0.0, 1.0, 0.0))
    first, second = GradientsResult.read(tmp_path).steps
    assert not first.finite and second.finite and math.isnan(second.cosine)


def test_summaries():
    text = make().summary()
    assert "Over 10 windows of 4" in text and "The detaching condition holds in" in text
    assert text.endswith("From step 23 on the skip gradient is the shorter one (t_trans).")
    text = make(turns=99, settings=dataclasses.replace(SETTINGS, smoothness=None)).summary()
    assert text.endswith("(no t_trans).") and "The detaching condition holds where L * gamma is at least" in text
    assert "says little" not in text and f", delta {make(turns=99).median_delta:.3g}, |correlation| of both" in text
    tiny = make(turns=99, skip=0.02)
    bound = 2 / math.sqrt(tiny.typical("c"))
    assert bound > 20 and f"says little with so small a c: it may reach 2 / sqrt(c) = {bound:.3g}." in tiny.summary()
    assert (
        f"|correlation| of both paths' noise {tiny.typical('correlation'):.3g}; delta ({tiny.median_delta:.3g})"
        in tiny.summary()
    )
    assert "No window of 4 is complete" in make(count=3).summary()
    takes = SETTINGS.window * SETTINGS.transition_windows
    short, enough = (make(count=takes - n, turns=99).summary() for n in (1, 0))
    assert short.endswith(f"t_trans cannot be told from {takes - 1} steps: it takes {takes}.")
    assert enough.endswith("(no t_trans).")
    assert "weights in the projector are still zero" in make(skip=0.0).summary()
    assert GradientsResult([], [], SETTINGS, facts={"block": 6}).summary().startswith("No step with finite gradients")
    head, rows = make().table()
    assert {len(row) for row in rows} == {len(head)} and all(isinstance(c, str) for row in rows for c in row)


def test_figures_of_whatever_there_is(tmp_path):
    empty = GradientsResult([], [], SETTINGS)
    silent, whole = make(count=9, skip=0.0), make(count=9)
    broken = GradientsResult([Step(1, math.nan, math.nan, math.nan, math.nan)], [], SETTINGS, facts={"trains": False})
    for number, result in enumerate((empty, silent, broken)):
        path = gradients_figure(result, tmp_path / f"{number}.png")
        assert path.read_bytes()[:4] == b"\x89PNG"
    assert runs_figure({"a": whole, "b": silent, "c": empty}, tmp_path / "runs.pdf").read_bytes()[:4] == b"%PDF"


def test_the_table_over_learning_rates():
    runs = {"slow": make(rate=5e-6, turns=99), "fast": make(rate=8e-5, turns=8), "unknown": make(rate=None)}
    runs["short"] = make(rate=1e-6, count=4)
    head, rows = runs_table(runs)
    assert head[:5] == ["run", "lr", "t_trans", "median cos", "median delta"]
    assert [row[:3] for row in rows] == [
        ["fast", "8e-05", "11"], ["slow", "5e-06", "/"], ["short", "1e-06", "-"], ["unknown", "-", "23"],
    ]  # fmt: skip
    assert rows[0][3] == f"{runs['fast'].median_cosine:.4f}" and rows[0][4] == f"{runs['fast'].median_delta:.4f}"
    assert list(ordered(runs)) == ["fast", "slow", "short", "unknown"]
    values = runs_dict(runs)
    assert values[1]["transition_step"] is None and values[0]["learning_rate"] == 8e-5
    json.dumps(values, allow_nan=False)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"block": -1}, "Gradients.block = -1"),
        ({"full": "all"}, "expected one of run, attached"),
        ({"window": 1}, "Gradients.window = 1: expected an integer >= 2"),
        ({"every": 0}, "Gradients.every"),
        ({"start": 0}, "Gradients.start"),
        ({"steps": 0}, "Gradients.steps"),
        ({"transition_windows": 0}, "Gradients.transition_windows"),
        ({"stop": 0}, "Gradients.stop = 0: expected an integer >= 1"),
        ({"stop": True}, "Gradients.stop"),
        ({"stop": 9, "start": 10}, "Gradients.stop = 9 ends the run before step 10, which Gradients.start = 10 asks"),
        ({"stop": 1299, "steps": 1300}, "stop = 1299 .* step 1300, which .*start = 1 and Gradients.steps = 1300 asks"),
        ({"smoothness": 0.0}, "Gradients.smoothness = 0.0: expected a number above 0"),
        ({"step_size": True}, "Gradients.step_size"),
        ({"smoothness": math.nan}, "Gradients.smoothness"),
    ],
)
def test_settings_are_checked(values, message):
    with pytest.raises(SettingError, match=message):
        Gradients(**values)


def test_which_steps_are_measured():
    chosen = Gradients(start=3, every=2, steps=6)
    assert [step for step in range(1, 20) if chosen.measures(step)] == [3, 5, 7]
    assert all(map(Gradients().measures, range(1, 9)))


def test_gin_binds_the_settings():
    from llava_patch.settings import gin_config as config

    found = config.read([], ["Gradients.block = 6", "Gradients.steps = 1300"])
    assert found.measurements["Gradients"] == Gradients(block=6, steps=1300)
    with pytest.raises(SettingError, match="did you mean window"):
        config.read([], ["Gradients.windows = 6"])
