import pytest
import torch

from llava_patch import Routing
from llava_patch.tools.evidence import study
from llava_patch.tools.evidence.findings import FAILS, HOLDS, UNDECIDED, Found
from llava_patch.tools.evidence.small import arms
from llava_patch.tools.evidence.statistics import pack_bits
from llava_patch.tools.evidence.studies.routing import findings as report
from llava_patch.tools.evidence.studies.routing import runs
from llava_patch.tools.evidence.study import Context, Size

N = 200


def rows(right):
    return pack_bits(torch.arange(N) < right * N)


def base(reads, stock=0.95, untrained=0.5):
    vtw = {str(split): rows(0.1 if split <= reads else stock) for split in range(1, 9)}
    lf = {str(split): rows(untrained) for split in range(1, 8)}
    costs = ("vtw", "lf", "lf2", "pc", "kv", "fastv", "lf_fastv")
    cost = {name: {"prefill": 0.8, "decoder": 0.7, "token": 0.9} for name in costs}
    return {
        "stock": rows(stock), "one": rows(1.0), "one_vtw": rows(1.0),
        "vtw": vtw, "ideal": vtw["4"], "lf": lf, "lf2": lf, "fastv": rows(0.7),
        "cost": cost,
    }  # fmt: skip


def arm(trained, untrained=0.5, other=0.1, random=0.6):
    made = {"rows": trained, "untrained": untrained, "other": other, "random": random}
    return {**{name: rows(value) for name, value in made.items()}, "trainable": 0.1, "loss": 0.1, "other_loss": 1.0}


def seeds(result):
    return [result] * 3


@pytest.fixture
def results():
    variants = {"lf": arm(0.95), "pc": arm(0.95), "kv": arm(0.95)}
    early = {"lf": arm(0.15, 0.1), "pc": arm(0.9), "kv": arm(0.9)}
    sixth = {"K=1": arm(0.15, 0.1), "K=2": arm(0.95), "layer 6": arm(0.95)}
    batches = {f"{name} {rate:g}": arm(0.9) for name, (_, tried) in runs.RECIPES.items() for rate in tried}
    batches |= {"batch 128 0.0005": arm(0.7), report.FEW_OTHER: arm(0.1)}
    found = {
        **{name: base(report.READS[name]) for name in report.READS},
        "turned/arms": {"arms": variants}, "late/arms": {"arms": variants}, "early/arms": {"arms": early},
        "sixth/arms": {"arms": sixth}, "ladder/arms": {"arms": {"lf": arm(0.95)}},
        "turned/beside": {"arms": {"lf_fastv": arm(0.72), "lora": arm(0.95), "full": arm(0.95)}},
        "turned/rates": {"arms": {f"{v} {r:g}": arm(0.95) for v in ("lf", "pc") for r in runs.RATES}},
        "turned/recipes": {"arms": batches},
    }  # fmt: skip
    return {f"routing/{name}": seeds(result) for name, result in found.items()}


def verdicts(results):
    return {finding.claim: finding for finding in report.findings(Found("routing", results))}


def the(results, begins):
    (found,) = (finding for claim, finding in verdicts(results).items() if claim.startswith(begins))
    return found


def test_what_the_theory_predicts_is_found_in_figures_that_show_it(results):
    assert the(results, "LF keeps the accuracy of a base that reads late").verdict == HOLDS
    assert the(results, "LF does not bring back").verdict == HOLDS
    assert the(results, "Where the last but one layer reads").verdict == HOLDS
    assert the(results, "Image tokens that leave before layer 2").verdict == HOLDS
    assert the(results, "LF stays below the stock model").verdict == UNDECIDED  # they are equal in these figures
    assert the(results, "After few small steps").verdict == HOLDS


def test_a_base_that_cannot_answer_decides_nothing(results):
    results["routing/late"] = seeds(base(7, stock=0.6))
    found = the(results, "LF keeps the accuracy of a base that reads late")
    assert found.verdict == UNDECIDED and "0.60" in found.gate


def test_a_sweep_shows_nothing_where_one_step_misses_the_image_as_well(results):
    results["routing/late"] = seeds(base(7) | {"one_vtw": rows(0.5)})
    assert not the(results, "Image tokens that leave before layer 7").passed


def test_an_arm_that_does_as_well_without_its_image_shows_nothing(results):
    results["routing/late/arms"] = seeds({"arms": {"lf": arm(0.95, other=0.9)}})
    assert not the(results, "LF keeps the accuracy of a base that reads late").passed


def test_an_untrained_branch_that_does_as_well_says_that_training_does_not_help(results):
    results["routing/late/arms"] = seeds({"arms": {"lf": arm(0.95, untrained=0.95)}})
    assert the(results, "On a late base").verdict == FAILS


def test_lf_that_brings_the_early_base_back_contradicts_the_prediction(results):
    early = {"lf": arm(0.95), "pc": arm(0.95), "kv": arm(0.95)}
    results["routing/early/arms"] = seeds({"arms": early})
    found = the(results, "LF does not bring back")
    assert not found.passed and found.effect[0].high < report.MUCH


def test_claims_whose_runs_are_not_there_are_left_out(results):
    few = {name: results[f"routing/{name}"] for name in ("late", "turned", "turned/arms")}
    claims = verdicts({f"routing/{name}": result for name, result in few.items()})
    assert any(claim.startswith("Where the middle layers work") for claim in claims)
    assert not any("early base" in claim for claim in claims)


def test_the_figure_has_a_panel_a_base(results):
    pytest.importorskip("matplotlib")
    (figure,) = report.figures(Found("routing", results)).values()
    assert [axis.get_title() for axis in figure.axes] == list(report.READS)


def test_the_quickest_runs_need_only_one_another():
    quick = {f"routing/{run.name}" for run in runs.RUNS if run.quick}
    assert all(set(run.needs) <= quick for run in runs.RUNS if run.quick)


def test_runs_hand_on_their_weights_and_report_what_the_findings_read(tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "TEST", 8)
    monkeypatch.setattr(arms, "BATCH", 4)
    toy = Size("cpu", seeds=1, scale=0.004)
    done = {}
    for run in runs.RUNS[:3]:
        ctx = Context(0, toy, torch.device("cpu"), tmp_path, f"routing/{run.name}")
        done[f"routing/{run.name}"] = [run.work(ctx)]
    ctx = Context(0, toy, torch.device("cpu"), tmp_path, "routing/turned/arms")
    settings = {"lf": Routing(split=runs.SPLIT)}
    assert set(runs.trained(ctx, "turned", settings)["arms"]["lf"]) >= {"rows", "untrained", "other", "random"}
    kept = study.weights_path(tmp_path, "routing/turned", 0)
    assert kept.is_file()
    claims = report.findings(Found("routing", done))
    assert claims and all(finding.verdict == UNDECIDED and finding.gate for finding in claims)
