import dataclasses
import itertools
import json
import math
import os

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from llava_patch.cli.main import app
from llava_patch.core.errors import InputError, SettingError
from llava_patch.measurements.rprobe.correlate import (
    PROBES,
    Checkpoint,
    Score,
    correlate,
    footer,
    probe_figures,
    ranks,
    read_checkpoints,
    read_scores,
)
from llava_patch.measurements.rprobe.figures import draw_correlations
from tests.support.results import made_up_result

NAN = float("nan")


def checkpoints(probe, scores, higher=True, key="mse"):
    return [
        Checkpoint(f"c{i}", {} if p is None else {key: p}, {} if s is None else {("ocr", "acc"): Score(s, higher)})
        for i, (p, s) in enumerate(zip(probe, scores))
    ]


def lmms(mse=None, **tasks):
    """A results JSON of lmms-eval: task = (metric, value, higher_is_better)."""
    results = {
        task: {"alias": task, f"{metric},none": value, f"{metric}_stderr,none": 0.1, f"{metric}_stderr_clt,none": "N/A"}
        for task, (metric, value, _) in tasks.items()
    }
    if mse is not None:
        results["rprobe"] = {"alias": "rprobe", "rprobe_mse,none": mse, "rprobe_steps,none": NAN, "rprobe_run,none": []}
    better = {task: {metric: higher} for task, (metric, _, higher) in tasks.items()}
    return {"results": results, "higher_is_better": better, "model_name": "runs/step-1"}


@pytest.mark.parametrize("never", [NAN, None])
def test_steps_never_reached_are_no_figure_whether_nan_or_null(tmp_path, never):
    document = lmms(0.5, ocr=("acc", 1.0, True))
    document["results"]["rprobe"]["rprobe_steps,none"] = never
    for i in range(2):
        (tmp_path / f"{i}.json").write_text(json.dumps(document))
    found, _ = read_checkpoints([str(tmp_path / f"{i}.json") for i in range(2)])
    assert [one.probe for one in found] == [{"mse": 0.5}] * 2
    with pytest.raises(InputError, match=r"nothing to correlate: 0 of 2 .*step-1 \(1\) has no steps .*vacuous"):
        correlate(found, "steps")


def test_rank_correlation_by_hand():
    # Ranks of x: 1 2 3 4 5, of y: 2 1 4 3 5. Spearman: 1 - 6 * (1+1+1+1+0) / (5 * 24) = 0.8; Kendall: (8 - 2) / 10.
    x, y = np.array([1.0, 2, 3, 4, 50]), np.array([20.0, 10, 40, 30, 50])
    spearman, kendall, p = ranks(x, y)
    assert (spearman, kendall) == (pytest.approx(0.8), pytest.approx(0.6))
    base = np.arange(5)
    found = [1 - 6 * ((np.array(order) - base) ** 2).sum() / 120 for order in itertools.permutations(range(5))]
    extreme = [sum(v >= 0.8 - 1e-9 for v in found), sum(v <= 0.8 + 1e-9 for v in found)]
    assert p == pytest.approx(2 * min(extreme) / 120)


def test_a_better_probe_with_a_better_score_is_above_zero_whatever_the_directions():
    mse, accuracy = [0.5, 0.4, 0.3, 0.2, 0.1], [10.0, 20, 30, 40, 50]
    assert correlate(checkpoints(mse, accuracy))[0][0].spearman == pytest.approx(1.0)
    errors = [5.0, 4, 3, 2, 1]
    assert correlate(checkpoints(mse, errors, higher=False))[0][0].spearman == pytest.approx(1.0)
    psnr = [10.0, 11, 12, 13, 14]
    assert correlate(checkpoints(psnr, accuracy, key="psnr"), "psnr")[0][0].spearman == pytest.approx(1.0)
    assert correlate(checkpoints(psnr, errors, key="psnr"), "psnr")[0][0].kendall == pytest.approx(-1.0)
    unknown = correlate(checkpoints(mse, accuracy, higher=None), tasks=["ocr"])[0][0]
    assert unknown.spearman == pytest.approx(1.0) and "taken as if it were" in unknown.notes[0]


def test_p_value_is_the_share_of_all_orders():
    # Only the order itself and its reverse are as extreme: 2 of 4! and of 6!.
    for n in (4, 6):
        found = correlate(checkpoints(list(range(n, 0, -1)), list(range(n))))[0][0]
        assert found.p == pytest.approx(2 / math.factorial(n))
    many = correlate(checkpoints(list(range(20, 0, -1)), list(range(20))), seed=1)[0][0]
    assert many.p == pytest.approx(2 / 10000)  # drawn, not counted
    assert many == correlate(checkpoints(list(range(20, 0, -1)), list(range(20))), seed=1)[0][0]


def test_few_ties_missing_and_unending_are_said():
    found, notes = correlate(checkpoints([0.1, 0.2, 0.3], [3.0, 2.0, 1.0]))
    assert any(note.startswith("n = 3: fewer than 5 checkpoints prove nothing") for note in notes)
    found, notes = correlate(checkpoints([0.1, 0.1, 0.3, 0.4, None], [3.0, 2.0, 2.0, 0.5, 1.0]))
    assert found[0].n == 4 and "c4 has no held-out MSE" in notes[0]
    assert "ties among probe figures and scores take their mean rank" in found[0].notes
    found, _ = correlate(checkpoints([0.1, 0.2, 0.3], [1.0, 1.0, 1.0]))
    assert (found[0].spearman, found[0].p) == (None, None) and "all scores are equal: no rank" in found[0].notes
    few = checkpoints([0.1, 0.2, 0.3], [1.0, NAN, None])
    few = [dataclasses.replace(c, scores={**c.scores, ("all", "acc"): Score(i, True)}) for i, c in enumerate(few)]
    found, _ = correlate(few, tasks=["ocr", "all"])
    assert [one.n for one in found] == [1, 3] and found[0].spearman is None
    assert {"c1 has no ocr/acc", "c2 has no ocr/acc", "fewer than two checkpoints have it"} == set(found[0].notes)
    assert footer(found)[0] == "ocr/acc: c1 has no ocr/acc"
    with pytest.raises(InputError, match=r"nothing to correlate: 1 of 3 checkpoints .*c1 has no ocr/acc"):
        correlate(few, tasks=["ocr"])
    found, notes = correlate(checkpoints([10.0, 20.0, math.inf], [3.0, 2.0, 1.0], key="steps"), "steps")
    assert found[0].spearman == pytest.approx(1.0)
    assert any("c2 never reached it" in note for note in notes)
    draw_correlations(found, PROBES["steps"][0])  # an infinite place must not break it


def test_default_takes_what_all_have_and_says_what_it_leaves_out():
    a = {("ocr", "acc"): Score(1.0, True), ("x", "m"): Score(1.0, None), ("y", "m"): Score(1.0, True)}
    b = {("ocr", "acc"): Score(2.0, True), ("x", "m"): Score(2.0, None), ("rprobe", "rprobe_mse"): Score(0.1, False)}
    both = [Checkpoint("a", {"mse": 0.2}, a), Checkpoint("b", {"mse": 0.1}, b)]
    found, notes = correlate(both)
    assert [(one.task, one.metric) for one in found] == [("ocr", "acc")]
    assert any("do not say whether more is better: x/m" in note for note in notes)
    assert any("not every checkpoint has them: y/m" in note for note in notes)
    assert [one.task for one in correlate(both, tasks=["x", "ocr/acc"])[0]] == ["x", "ocr"]
    with pytest.raises(SettingError, match="--tasks nothing: no checkpoint has it; tasks: ocr, rprobe, x, y"):
        correlate(both, tasks=["nothing"])
    with pytest.raises(SettingError, match="--tasks ocr/f1: no checkpoint has it; metrics of ocr: acc"):
        correlate(both, tasks=["ocr/f1"])
    with pytest.raises(SettingError, match="--probe colour"):
        correlate(both, "colour")
    with pytest.raises(InputError, match="at least two"):
        correlate(both[:1])
    with pytest.raises(InputError, match="share no benchmark score"):
        correlate([both[0], Checkpoint("c", {"mse": 1.0}, {})])
    turned = Checkpoint("c", {"mse": 1.0}, {("ocr", "acc"): Score(1.0, False)})
    with pytest.raises(InputError, match="disagree"):
        correlate([both[0], turned], tasks=["ocr"])


def test_lmms_results_are_read():
    document = lmms(0.2, ocrbench=("ocr_acc", 0.5, True), latency=("seconds", 3, False))
    document["results"]["ocrbench"]["ocr_acc,strict"] = 0.25
    found = read_scores(document, "r.json")
    assert found["ocrbench", "ocr_acc"] == Score(0.5, True)
    assert found["ocrbench", "ocr_acc,strict"] == Score(0.25, True)
    assert found["latency", "seconds"] == Score(3.0, False)
    assert set(found) == {
        ("ocrbench", "ocr_acc"), ("ocrbench", "ocr_acc,strict"), ("latency", "seconds"), ("rprobe", "rprobe_mse"),
        ("rprobe", "rprobe_steps"),
    }  # fmt: skip
    with pytest.raises(InputError, match=r"r\.json: not lmms-eval's results"):
        read_scores({"mse": 1}, "r.json")


def test_steps_that_say_nothing_are_missing_and_steps_never_reached_come_last():
    result = made_up_result()
    assert probe_figures(result)["steps"] == 3 and probe_figures(result)["steps_half_fvu"] == math.inf
    assert "steps" not in probe_figures(dataclasses.replace(result, threshold_is_vacuous=True))


def test_a_vacuous_threshold_leaves_nothing_to_correlate_and_nothing_is_written(tmp_path):
    words = []
    for i in range(2):
        dataclasses.replace(made_up_result(), threshold_is_vacuous=True).save(tmp_path / f"{i}", formats=())
        (tmp_path / f"{i}" / "x_results.json").write_text(json.dumps(lmms(None, ocr=("acc", 0.1 * i, True))))
        words.append(str(tmp_path / f"{i}"))
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["rprobe", "correlate", *words, "--probe", "steps", "--output", str(out)])
    assert done.exit_code == 1 and not out.exists()
    assert "is left out: its threshold 0.75 is vacuous (a constant patch, MSE 1.000, is under it)" in str(
        done.exception
    )


def test_sources_pairs_folders_and_results_with_the_probe_inside(tmp_path):
    made_up_result().save(tmp_path / "p=1", formats=())
    (tmp_path / "p=1" / "20260101_results.json").write_text(json.dumps(lmms(None, a=("m", 1.0, True))))
    (tmp_path / "p=1" / "20260202_results.json").write_text(json.dumps(lmms(None, a=("m", 2.0, True))))
    (tmp_path / "inside.json").write_text(json.dumps(lmms(0.7, a=("m", 3.0, True))))
    pair = f"{tmp_path / 'p=1' / 'rprobe.json'}={tmp_path / 'p=1' / '20260101_results.json'}"
    found, notes = read_checkpoints([pair, str(tmp_path / "p=1"), str(tmp_path / "inside.json")])
    assert [c.name for c in found] == ["step-1 (1)", "step-1 (2)", "step-1 (3)"]
    assert [c.scores["a", "m"].value for c in found] == [1.0, 2.0, 3.0]
    assert [c.probe["mse"] for c in found] == pytest.approx([0.4, 0.4, 0.7])
    assert "steps" not in found[2].probe  # nan in lmms-eval's results
    assert len(notes) == 1 and "20260202_results.json, is taken" in notes[0]
    for source, message in (
        (str(tmp_path / "nowhere"), "expected RPROBE=RESULTS"),
        (str(tmp_path / "p=1" / "20260101_results.json"), "holds no rprobe task"),
        (str(tmp_path / "p=1" / "rprobe.json"), "not lmms-eval's results JSON"),
    ):
        with pytest.raises(InputError, match=message):
            read_checkpoints([source])
    made_up_result().save(tmp_path / "q" / "rprobe_masked", formats=())
    made_up_result().save(tmp_path / "q" / "rprobe_other", formats=())
    (tmp_path / "q" / "results.json").write_text(json.dumps(lmms(0.7)))
    with pytest.raises(InputError, match="holds several results"):
        read_checkpoints([str(tmp_path / "q")])
    with pytest.raises(SettingError, match="expected 1 distinct names"):
        read_checkpoints([str(tmp_path / "inside.json")], ["a", "b"])


def test_command_writes_table_json_and_figure(tmp_path):
    files = []
    for i in range(5):
        file = tmp_path / f"{i}_results.json"
        file.write_text(json.dumps(lmms(0.5 - 0.1 * i, ocrbench=("acc", 0.1 * i, True), pope=("f1", 0.3, True))))
        files.append(str(file))
    words = [
        "rprobe",
        "correlate",
        *files,
        "--names",
        "a,b,c,d,e",
        "--output",
        str(tmp_path / "out"),
        "--format",
        "png",
    ]
    done = CliRunner().invoke(app, words, env={**os.environ, "COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "correlate.json").read_text())
    assert found["correlations"][0]["spearman"] == pytest.approx(1.0)
    assert found["correlations"][0]["points"][4] == ["e", pytest.approx(0.1), pytest.approx(0.4)]
    assert found["correlations"][1]["spearman"] is None
    table = (tmp_path / "out" / "correlate.md").read_text()
    assert "| ocrbench | acc | 5 | +1.000 | +1.000 | 0.0167 |" in table
    assert "- above 0: a better probe (lower held-out MSE" in table and "- pope/f1: all scores are equal" in table
    picture = Image.open(tmp_path / "out" / "correlate.png").convert("RGB")
    assert len(picture.resize((200, 120)).getcolors(1 << 20)) > 10
    assert "Spearman" in done.output
