"""The positive control of the gradient statistics: it passes, and a blind instrument would not."""

import copy

import pytest
import torch

from llava_patch.tools.evidence.findings import Found
from llava_patch.tools.evidence.studies.gradients import findings, runs
from llava_patch.tools.evidence.study import Context, Size


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    contexts = [Context(s, Size("cpu"), torch.device("cpu"), folder, "gradients/analytic") for s in range(3)]
    return {
        "gradients/analytic": [runs.analytic(context) for context in contexts],
        "gradients/paths": [runs.paths(context) for context in contexts],
    }


def verdicts(results):
    return [one.verdict for one in findings.findings(Found("gradients", results))]


def test_what_is_planted_is_found(results):
    assert verdicts(results) == ["holds"] * 3
    assert set(findings.figures(Found("gradients", results))) == {"planted"}


def test_the_planted_numbers_follow_from_the_draws():
    """2,000 draws in one window: statistics to a few per cent."""
    for planted in runs.CASES:
        main, skip = planted.draw(2000, torch.Generator().manual_seed(0))
        known = planted.known()
        traces = [float(g.var(0, correction=0).sum()) for g in (main, skip)]
        assert traces[0] == pytest.approx(runs.NOISE, rel=0.05)
        assert traces[1] / traces[0] == pytest.approx(known["c"], rel=0.05)
        m, s = main.mean(0), skip.mean(0)
        joint = float((main * skip).sum(1).mean() - m @ s)
        assert 2 * joint / traces[1] == pytest.approx(known["delta"], rel=0.05, abs=0.01)


@pytest.mark.parametrize("damage", ["delta", "gain", "skip", "mixed"])
def test_an_instrument_that_is_blind_does_not_pass(results, damage):
    broken = copy.deepcopy(results)
    for one in broken["gradients/analytic"]:
        for case in one["cases"]:
            if damage == "delta":
                case["found"]["delta"] = [0.0] * runs.WINDOWS
            if damage == "gain":
                case["gain"]["by_own_curvatures"] = [-v for v in case["gain"]["by_own_curvatures"]]
            if damage == "mixed":
                case["delta_of_mixed_pairs"] = case["found"]["delta"]
    for one in broken["gradients/paths"]:
        for row in one["rows"]:
            row["skip"] = 1.0 if damage == "skip" else row["skip"]
    found = verdicts(broken)
    assert found[{"delta": 0, "mixed": 0, "gain": 1, "skip": 2}[damage]] != "holds" and found.count("holds") == 2
