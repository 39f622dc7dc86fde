"""Findings from looks that were made by hand, and one small run of each kind."""

import copy
import math

import pytest
import torch

from llava_patch.tools.evidence import statistics
from llava_patch.tools.evidence.findings import HOLDS, UNDECIDED, Found
from llava_patch.tools.evidence.small import chain, model, stacked
from llava_patch.tools.evidence.studies.saturation import findings, runs
from llava_patch.tools.evidence.study import Context, Size


def rows(share: float, count: int = 200) -> str:
    return statistics.pack_bits(torch.arange(count) < round(share * count))


def falls(at: int, low: float = 0.01) -> list[float]:
    return [1.0 if layer < at else low for layer in range(8)]


def look(vtw: int, lf: int, passive: int | None = None) -> dict:
    """Stock 0.95; VTW and LF keep it from a split on; signals of the picture stay where they are."""
    curves = {
        "mass": falls(8), "peak": falls(vtw, 0.3), "image_cosine": [0.5] * 6 + [0.99] * 2, "image_kl": falls(5),
        "answer_kl": falls(vtw + 1), "withdrawn_kl": falls(vtw),
    }  # fmt: skip
    return {
        "stock": rows(0.95),
        "vtw": [rows(0.95 if split >= vtw else 0.1) for split in range(8)],
        "lf": [rows(0.95 if split >= lf else 0.1) for split in range(7)],
        "curves": curves,
        "recommended": {"lf": lf, "vtw": None if vtw == 8 else vtw, "passive": passive},
    }


def result(cut: int) -> dict:
    deep = look(cut, min(cut, 6) if cut < 8 else 3)
    short = copy.deepcopy(deep)
    deep["curves"]["mass"][-2] = 0.3
    return {"looks": {"1 steps, 4 words": look(1, 1), "2 steps, 4 words": short, "2 steps, 40 words": deep}}


@pytest.fixture
def results() -> dict:
    found = {f"saturation/cut{cut}": [result(cut) for _ in range(3)] for cut in (2, 4, 6, 8)}
    reads = {"found": rows(0.8), "mass": [0.9, 0.2], "stock mass": [0.9, 0.2], "weight": [0.9, 0.8]}
    found["saturation/fusion/late"] = [reads] * 3
    found["saturation/fusion/early"] = [{**reads, "found": rows(0.1)}] * 3
    return found


def by_claim(results: dict) -> dict:
    return {one.claim: one for one in findings.findings(Found("saturation", results))}


def one(results: dict, words: str):
    (found,) = [finding for claim, finding in by_claim(results).items() if words in claim]
    return found


def test_what_was_planted_is_found_and_signals_of_the_picture_do_not_find_it(results):
    assert one(results, "placed where it was cut").verdict == HOLDS
    assert one(results, "what the answers lose says").verdict == HOLDS
    assert one(results, "the largest weight").verdict == HOLDS
    assert (
        one(results, "the image's logit lens").effect[0].high < one(results, "what the answers lose says").effect[0].low
    )
    assert one(results, "By itself, attention mass").effect[0].value < 0
    assert one(results, "is where LF keeps").verdict == HOLDS
    assert one(results, "below what VTW can bear").verdict == HOLDS
    assert one(results, "patch that the answer is in").verdict == HOLDS


def test_errors_are_layers_between_a_placement_and_the_sweep(results):
    lens = one(results, "the image's logit lens")
    truths = [1, 2, 2, 1, 4, 4, 1, 6, 6, 1, 8, 8]
    assert lens.values["error in layers"] == [pytest.approx(sum(abs(5 - t) for t in truths) / 12)] * 3
    assert lens.values["of the guess"] == [pytest.approx(sum(abs(4 - t) for t in truths) / 12)] * 3
    answers = one(results, "By itself, the answer's")
    assert answers.values["error in layers"] == [pytest.approx(10 / 12)] * 3  # layer 9 is none: 8 is right
    peak = one(results, "the largest weight")
    assert peak.values["with the share that is best on other seeds"] == [0, 0, 0]


def test_a_sweep_that_does_not_find_the_cut_decides_nothing(results):
    for seed in results["saturation/cut6"]:
        seed["looks"]["2 steps, 4 words"]["vtw"] = [rows(0.95)] * 8
    assert one(results, "placed where it was cut").verdict == UNDECIDED


def test_a_signal_that_does_not_depend_on_the_question_decides_nothing(results):
    """One step in the decoder cut at 6: a knock-out that names the cut all the same has not read the question."""
    for seed in results["saturation/cut6"]:
        seed["looks"]["1 steps, 4 words"]["curves"]["withdrawn_kl"] = falls(6)
    assert one(results, "placed where it was cut").verdict == UNDECIDED


def test_a_base_that_does_not_read_shuts_the_gate(results):
    for seed in results["saturation/cut4"]:
        seed["looks"]["2 steps, 4 words"]["stock"] = rows(0.5)
    assert "cut4 answers 50%" in one(results, "By itself, attention mass").gate


def test_attention_that_finds_the_patch_where_nothing_is_read_decides_nothing(results):
    for run in results["saturation/fusion/early"]:
        run["found"] = rows(0.8)
    assert one(results, "patch that the answer is in").verdict == UNDECIDED


def test_a_split_that_is_missed_and_none_where_lf_saves_nothing(results):
    seeds = results["saturation/cut6"]
    for seed in seeds:
        seed["looks"]["2 steps, 4 words"]["recommended"]["lf"] = 3
    assert one(results, "is where LF keeps").values["by what the answers lose"] == [pytest.approx(11 / 12)] * 3
    for seed in seeds:
        short = seed["looks"]["2 steps, 4 words"]
        short["lf"], short["recommended"]["lf"] = [rows(0.1)] * 7, None
    assert one(results, "is where LF keeps").values["by what the answers lose"] == [1, 1, 1]


def test_the_routing_bases_join_where_they_are_there(results):
    before = one(results, "By itself, attention mass").measured
    results["routing/early"] = [{"rows": ""}] * 3  # another study's run of that name
    assert "12 pairs" in one(results, "By itself, attention mass").measured
    results["saturation/early"] = [result(4)] * 3
    assert "12 pairs" in before and "15 pairs" in one(results, "By itself, attention mass").measured
    assert len(findings.figures(Found("saturation", results))["signals"].axes) == 5


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Context:
    folder = tmp_path_factory.mktemp("evidence")
    context = Context(0, Size("cpu", 1), torch.device("cpu"), folder, "routing/one")
    context.keep(model.weights(stacked.new(0, 2)))
    return context


def test_a_cut_is_trained_and_looked_at(context, monkeypatch):
    monkeypatch.setattr(runs, "SAMPLES", 2)
    own = Context(0, context.size, context.device, context.folder, "saturation/cut8")
    found = runs.cut(own, 8, steps=2, rows=4)
    again = runs.cut(own, 8, steps=2, rows=4)
    assert found == again and found["cut"] == 8
    assert set(found["looks"]) == {"1 steps, 4 words", findings.SHORT, findings.LONG}
    for one in found["looks"].values():
        assert len(one["vtw"]) == 8 and len(one["lf"]) == 7 and set(one["recommended"]) == {"lf", "vtw", "passive"}
        assert all(len(curve) == 8 and all(map(math.isfinite, curve)) for curve in one["curves"].values())
    reading = runs.fusion(Context(0, context.size, context.device, context.folder, "x"), "saturation/cut8", rows=4)
    assert len(reading["mass"]) == 2 and len(reading["weight"]) == 4


def test_hidden_layers_do_not_see_the_image_and_nothing_stays(context):
    made = stacked.put(context.load("routing/one"), {0: 0, 1: 1, 3: 0, 4: 1}, 0)
    batch = chain.Chain(0).batch(2, 3)
    other = chain.Chain(1).batch(2, 3)
    asked = batch.questions()
    swapped = type(asked)(other.pixels, asked.prefix, asked.questions, asked.labels)

    def answers(one) -> torch.Tensor:
        from llava_patch.tools.evidence.small.training import run_questions

        with torch.no_grad():
            return run_questions(made, one).logits[:, asked.prefix.shape[1] :]

    stock = answers(asked)
    with runs.hidden(made, list(range(8))):
        assert torch.equal(answers(asked), answers(swapped)) and not torch.equal(answers(asked), stock)
    with runs.hidden(made, list(range(1, 8))):
        assert not torch.equal(answers(asked), answers(swapped))
    assert torch.equal(answers(asked), stock)
