import torch

from llava_patch.tools.evidence.findings import HOLDS, UNDECIDED, Found
from llava_patch.tools.evidence.small import arms, stacked
from llava_patch.tools.evidence.statistics import pack_bits
from llava_patch.tools.evidence.studies.both import findings as report
from llava_patch.tools.evidence.studies.both import runs
from llava_patch.tools.evidence.study import Context, Size


def rows(right, n=200):
    return pack_bits(torch.arange(n) < right * n)


def made(lf, other=0.1):
    return {"tuned": rows(0.95), "untrained": rows(0.5), "rows": rows(lf), "other": rows(other)}


def test_lf_on_a_fused_model_is_judged_against_the_fused_model():
    kept = {"both/plain": [made(0.95)] * 3, "both/fused": [made(0.95)] * 3}
    lost = {"both/plain": [made(0.95)] * 3, "both/fused": [made(0.6)] * 3}
    assert [f.verdict for f in report.findings(Found("both", kept))] == [HOLDS, HOLDS, UNDECIDED]
    assert report.findings(Found("both", lost))[0].verdict != HOLDS


def test_without_its_runs_nothing_is_claimed():
    assert report.findings(Found("both", {})) == []


def test_taps_and_a_side_branch_train_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "TEST", 8)
    monkeypatch.setattr(arms, "BATCH", 4)
    toy = Size("cpu", seeds=1, scale=0.01)
    Context(0, toy, torch.device("cpu"), tmp_path, f"routing/{runs.BASE}").keep(stacked.new(0).state_dict())
    found = runs.arm(Context(0, toy, torch.device("cpu"), tmp_path, "both/fused"), fused=True)
    assert {"tuned", "untrained", "rows", "other"} <= set(found)
    assert found["projector"]["trainable"] > 0
