import json

import pytest
import torch

from llava_patch.measurements.rprobe.ablation import VARIANTS
from llava_patch.tools.evidence.findings import FAILS, HOLDS, UNDECIDED, Found
from llava_patch.tools.evidence.studies.rprobe import findings, runs
from llava_patch.tools.evidence.study import Context, Size

TOY = Size("toy", scale=0.005)


def probed(mse, fvu=0.1):
    errors = [mse * (1 + 0.1 * (number % 5 - 2)) for number in range(40)]
    joined = " ".join(f"{error:.4g}" for error in errors)
    return {"mse": mse, "fvu": fvu, "errors": joined, "tokens": " ".join(["4"] * 40)}


def ablation(masked, text, seen, both, fvu=1.0):
    values = (masked, text, seen, both)
    return {name: probed(mse, fvu if name == "masked_without_text" else 0.1) for name, mse in zip(VARIANTS, values)}


def found(order=(0.05, 0.03, 0.01, 0.005), fvu=1.0, taps=(0.013, 0.011, 0.019), held="8:ff"):
    damage = {"intact": 0.01, "blurred": 0.03, "dropped_0.25": 0.02, "dropped_0.5": 0.03}
    one = {
        "reader": {"held": held},
        "ablation/small_ink": ablation(*order, fvu),
        "ablation/fixed": ablation(0.1, 0.0001, 0.01, 0.0001),
        "damage": {name: probed(mse) for name, mse in damage.items()},
        **{f"taps/{arm}": probed(mse) for arm, mse in zip(("none", "taps", "other_image"), taps)},
    }
    return Found("rprobe", {f"rprobe/{name}": [result] * 3 for name, result in one.items()})


def verdicts(*args, **kwargs):
    return [one.verdict for one in findings.findings(found(*args, **kwargs))]


def test_what_is_in_order_holds_and_what_is_not_does_not():
    assert verdicts() == [HOLDS] * 8
    assert verdicts(order=(0.05, 0.03, 0.04, 0.005))[:3] == [HOLDS, FAILS, HOLDS]
    assert verdicts(taps=(0.013, 0.015, 0.019))[-1] != HOLDS


def test_nothing_is_decided_without_the_control_or_by_a_model_that_cannot_read():
    assert verdicts(fvu=0.7)[:3] == [UNDECIDED] * 3
    assert verdicts(held="8:0f")[:3] == [UNDECIDED] * 3
    assert verdicts(taps=(0.013, 0.011, 0.012))[-1] == UNDECIDED


def test_claims_whose_runs_are_not_there_are_left_out():
    short = Found("rprobe", {name: found().results[f"rprobe/{name}"] for name in ("reader", "ablation/small_ink")})
    assert len(findings.findings(short)) == 3


def test_figures_are_drawn():
    assert len(findings.figures(found())["rprobe_controls"].axes) == 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evidence")


def test_the_runs_work_one_after_another(folder):
    torch.manual_seed(0)
    for name in ("reader", "taps/other_image", "ablation/fixed"):
        run = next(run for run in runs.RUNS if run.name == name)
        assert all(need == runs.READER for need in run.needs)
        result = run.work(Context(0, TOY, torch.device("cpu"), folder, f"rprobe/{name}"))
        assert json.loads(json.dumps(result)) == result
        if name.startswith("taps"):
            assert result["errors"]
