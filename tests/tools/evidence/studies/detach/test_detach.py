"""What the detach study says of results that are made up, and that its runs do what they say."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_patch.core.plotting import write_figure
from llava_patch.tools.evidence import statistics
from llava_patch.tools.evidence.findings import Found
from llava_patch.tools.evidence.small import reader
from llava_patch.tools.evidence.studies.detach import arms, findings, runs, starts, steps
from llava_patch.tools.evidence.studies.detach.cells import RULES, Cells, by_seed
from llava_patch.tools.evidence.study import Context, Size

TOY = 0.02  # of all steps


def made_up(seed, truth=1.0, same=0.1):
    """Cells of twelve starts whose gain is `truth` times the prediction, up to some noise; half of them gain."""
    rng = np.random.default_rng(seed)
    results = {}
    for start in starts.STARTS:
        windows = []
        for after in steps.AFTER:
            tower = {"c": float(np.exp(rng.normal())), "cosine": rng.uniform(-1, 1), "snr_main": rng.uniform(0.1, 1)}
            tower |= {"snr_full": rng.uniform(0.1, 1), "curvature": 2.0}
            cells = []
            for gamma in steps.GAMMAS:
                predicted = gamma * rng.normal()
                gain = truth * predicted + 0.01 * gamma * rng.normal()
                own = {"predicted": predicted, "predicted_own": predicted, "predicted_same": 0.0}
                cells.append({"gamma": gamma, "gain": gain, "gain_error": 0.02 * gamma, "same": same * gain, **own})
            cosine = rng.normal(0.6 if start.projector == "trained" else 0.0, 0.05)
            block = {"c": 1.0, "delta": 0.1, "cosine": cosine}
            windows.append({"after": after, "tower": tower, "block": block, "cells": cells})
        results[f"detach/one/{start.name}"] = {"seed": seed, "start": vars(start), "windows": windows}
    return results


def together(*seeds):
    return Found("detach", {name: [one[name] for one in seeds] for name in seeds[0]})


def verdicts(found):
    return [one.verdict for one in findings.findings(found)]


def test_a_condition_that_is_right_holds_and_what_has_nothing_to_do_with_it_does_not():
    claims = verdicts(together(*map(made_up, range(3))))
    assert [claims[place] for place in (0, 1, 5, 6, 7)] == ["holds"] * 5
    assert "holds" not in claims[2:5]


def test_a_condition_that_is_wrong_does_not_hold():
    claims = verdicts(together(*(made_up(seed, truth=-1.0, same=0.9) for seed in range(3))))
    assert claims[1] == claims[7] == "does not hold" and claims[6] == "undecided at this size"


def test_where_detaching_never_gains_nothing_is_decided():
    seeds = [made_up(seed) for seed in range(3)]
    for one in seeds:
        for result in one.values():
            for cell in (cell for window in result["windows"] for cell in window["cells"]):
                cell["gain"] = -abs(cell["gain"])
    found = findings.findings(together(*seeds))
    assert found[1].gate and {one.verdict for one in found[1:6]} == {"undecided at this size"}
    assert json.dumps(found[1].values)


def test_a_fresh_projector_whose_gradients_agree_is_not_the_papers_picture():
    seeds = [made_up(seed) for seed in range(3)]
    seeds[1]["detach/one/fresh"]["windows"][0]["block"]["cosine"] = 0.5
    picture = findings.findings(together(*seeds))[0]
    assert picture.verdict == "undecided at this size" and not picture.passed
    assert 0.4 < picture.effect[0].value < 0.7 and picture.values["cosine, trained projector, median"][0] > 0.4


def test_signs_are_counted_by_hand():
    start = made_up(0)["detach/one/fresh"]
    start["windows"] = start["windows"][:1]
    values = [(1.0, 0.1, 0.5), (-1.0, 0.1, 0.5), (0.1, 0.1, 0.5)]  # right, wrong, not clear
    for cell, (gain, error, predicted) in zip(start["windows"][0]["cells"], values, strict=True):
        cell.update(gain=gain, gain_error=error, predicted=predicted, same=0.25 * gain)
    cells = Cells([start, start])
    assert cells.plain("condition (7)") == (2, 4) and cells.signs("condition (7)").value == 0.5
    assert cells.shorter().value == 0.75
    assert set(cells.rules) == set(RULES) and cells.within.tolist() == [[True] * 3] * 2
    assert cells.better("condition (7)", "own curvatures").value == 0.5 - cells.signs("own curvatures").value


def test_seeds_are_put_together_by_their_number():
    seeds = [made_up(seed) for seed in range(3)]
    found = together(*seeds)
    found.results["detach/one/fresh"] = found.results["detach/one/fresh"][1:]  # of seed 0 it is not there
    assert len(by_seed(found)) == 2


def arm_result(seed, shift, first=2.0):
    generator = torch.Generator().manual_seed(seed)
    losses = (1 + shift + 0.1 * torch.rand(160, generator=generator)).tolist()
    probe = {"mse": 0.1, "steps_to_half_fvu": 10, "tokens": "4 4 4"}
    return {
        "seed": seed, "curve": [[0, first], [40, 1.0 + shift]], "early": losses, "end": losses,
        "rows": statistics.pack_bits(torch.arange(160) < 80),
        "drift": {"image": 0.9, "attention": [0.1 + shift + 0.01 * i for i in range(8)]},
        "probe": {**probe, "errors": " ".join(str(error + shift) for error in (0.1, 0.11, 0.12))},
    }  # fmt: skip


def test_arms_are_compared_image_by_image(tmp_path: Path):
    shifts = {"none": 0.3, "fused": 0.2, "detached": 0.1, "short": 0.0}
    results = {f"detach/arm/fresh/sgd/{arm}": [arm_result(s, by) for s in range(3)] for arm, by in shifts.items()}
    results |= {"detach/bubble/2-1": [arm_result(0, 0.0)], "detach/bubble/3-0": [arm_result(0, 0.0)]}
    assert verdicts(Found("detach", results)) == ["holds", "holds", "does not hold", "holds", "holds", "holds"]
    found = Found("detach", {**results, **together(*map(made_up, range(3))).results})
    drawn = findings.figures(found)
    assert set(drawn) == {"steps", "arms", "bubbles"}
    for name, figure in drawn.items():
        assert write_figure(figure, tmp_path / f"{name}.png").stat().st_size > 1000
    results["detach/arm/fresh/sgd/detached"] = [arm_result(s, 0.1, first=2.5) for s in range(3)]  # began elsewhere
    assert set(verdicts(Found("detach", results))) == {"undecided at this size"}
    assert verdicts(Found("detach", {})) == [] and findings.figures(Found("detach", {})) == {}


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """A reader that has learnt nothing: what runs need of it is its shape."""
    folder = tmp_path_factory.mktemp("evidence")
    one = Context(0, Size("cpu", scale=TOY), torch.device("cpu"), folder, starts.READER)
    weights = reader.weights(reader.new(1))
    dense = {f"dense.{n.removeprefix('tower.')}": value for n, value in weights.items() if n.startswith("tower.")}
    one.keep({**weights, **dense})
    return one


def at(context, run):
    return dataclasses.replace(context, run=f"detach/{run}")


def test_a_held_stage_one_leaves_the_taps_as_they_were_and_a_trained_one_does_not(context):
    by = {start.name: start for start in starts.STARTS}
    taps = {}
    for name in ("held-noise", "trained"):
        start = by[name]
        starts.stage_one(at(context, start.stage), start)
        weight = context.load(f"detach/{start.stage}")["linear_1.weight"]
        taps[name] = weight[:, reader.VISION.width :]
    fusion = arms.Training(by["trained"], "fused", "sgd").fusion
    fresh = dataclasses.replace(by["trained"], projector="fresh")
    model, handle = starts.begin(context, fresh, fusion)
    own = handle.anatomy.first_linear()[2].weight[:, reader.VISION.width :]
    assert torch.equal(taps["held-noise"], own) and not torch.equal(taps["trained"], own)


def test_one_step_says_what_it_predicts(context, monkeypatch):
    """A quarter of a small step gains a quarter as much, which is what (7) says of it: the loss is nearly a plane."""
    for name, few in (("POPULATION", 16), ("PREDICTED", 3), ("MEASURED", 2)):
        monkeypatch.setattr(steps, name, few)
    start = dataclasses.replace(starts.STARTS[0], batch=2)
    found = steps.one_step(at(context, "one/fresh"), start, (0, 60), (0.001, 0.004))
    first, second = found["windows"]
    assert (first["after"], second["after"]) == (0, 1) and first["loss"] != second["loss"] and json.dumps(found)
    small, large = first["cells"]
    assert large["gain"] / small["gain"] == pytest.approx(4, rel=0.2) == large["predicted"] / small["predicted"]
    assert first["tower"]["curvature"] != 0 and {"c", "cosine", "snr_full"} <= set(first["block"])


@pytest.mark.parametrize("arm", ["none", "short"])
def test_arms_of_a_toy_run(context, arm):
    found = arms.train(at(context, arm), arms.Training(runs.FRESH, arm, "sgd"))
    assert found["curve"][0][0] == 0 and len(found["end"]) == arms.HELD and json.dumps(found)
    assert found["moved"] > 0 and -1 <= found["drift"]["image"] <= 1


def test_every_run_is_named_once_and_needs_what_is_there():
    names = [f"detach/{run.name}" for run in runs.RUNS]
    assert len(set(names)) == len(names) and len([n for n in names if "/one/" in n]) >= 12
    for place, run in enumerate(runs.RUNS):
        assert all(need == starts.READER or need in names[:place] for need in run.needs)
    quick = {f"detach/{run.name}" for run in runs.RUNS if run.quick}
    assert all(set(run.needs) <= {*quick, starts.READER} for run in runs.RUNS if run.quick)


def test_depths_are_compared_where_the_arms_were_run():
    runs_of = {"bubble/2-1": 120, "arm/fresh/adamw/fused": 80, "arm/fresh/adamw/detached": 140}
    results = {
        f"detach/{name}": [
            {**arm_result(s, 0.0), "rows": statistics.pack_bits(torch.arange(160) < right)} for s in range(3)
        ]
        for name, right in runs_of.items()
    }
    assert verdicts(Found("detach", results)) == ["holds", "does not hold"]
