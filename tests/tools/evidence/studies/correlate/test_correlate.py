import json

import pytest
import torch

from llava_patch.tools.evidence.findings import FAILS, HOLDS, UNDECIDED, Found
from llava_patch.tools.evidence.small import reader
from llava_patch.tools.evidence.statistics import pack_bits
from llava_patch.tools.evidence.studies.correlate import findings, runs
from llava_patch.tools.evidence.study import Context, Size

TOY = Size("toy", scale=0.005)


def rows(share, count=400):
    return pack_bits(torch.arange(count) < share * count)


def checkpoint(mse, share, largest=0.5):
    return {"mse": mse, "fvu": 0.1, "read": rows(share), "read_loss": 1 - share, "largest": rows(largest)}


def found(error=lambda share: 1 - share, moved=1.0, aided=0.9, aided_error=0.05, largest=0.5):
    shares = [0.1 * number for number in range(9)]
    training = [checkpoint(0.01 + error(share), share) for share in shares]
    blind = [checkpoint(0.2 * moved if share < 0.4 else 0.2, share) for share in shares]
    end = {"end": checkpoint(aided_error, aided, largest), "steps": 9, "step_time_ratio": 1.2}
    one = {
        "training": {"snapshots": training, "end": checkpoint(0.1, 0.7), "steps": 9},
        "damage/tower": {"snapshots": training},
        "damage/rank": {"snapshots": training},
        "damage/decoder": {"snapshots": blind},
        "auxiliary/0.1": end,
        "auxiliary/1": end,
    }
    return Found("correlate", {f"correlate/{name}": [result] * 3 for name, result in one.items()})


def verdicts(*args, **kwargs):
    return [one.verdict for one in findings.findings(found(*args, **kwargs))]


def test_errors_that_rank_checkpoints_as_reading_does_hold_and_others_do_not():
    assert verdicts()[:3] == [HOLDS] * 3
    assert verdicts(error=lambda share: share)[:3] == [FAILS] * 3
    assert verdicts(error=lambda share: (7 * share) % 0.5)[:3] == [UNDECIDED] * 3


def test_a_probe_that_sees_what_lies_behind_it_decides_nothing():
    assert verdicts(moved=1.1)[:3] == [UNDECIDED] * 3


def test_the_auxiliary_loss_is_judged_by_both_questions():
    assert verdicts()[3:5] == [HOLDS, UNDECIDED]
    assert verdicts(aided=0.5)[3] == FAILS
    assert verdicts(largest=0.4)[4] == HOLDS
    assert verdicts(aided_error=0.2)[3:] == [UNDECIDED] * 4


def test_claims_whose_runs_are_not_there_are_left_out():
    whole = found().results
    assert findings.findings(Found("correlate", {"correlate/training": whole["correlate/training"]})) == []


def test_figures_are_drawn():
    assert len(findings.figures(found())["rprobe_against_reading"].axes) == 3


def test_the_runs_work_one_after_another(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "HELD", 16)
    monkeypatch.setattr(runs, "DAMAGE", {"rank": (64, 2), "tower": (0.0, 0.5), "decoder": (0.0, 1.0)})
    torch.manual_seed(0)

    def done(name, work=None, **changed):
        run = next(run for run in runs.RUNS if run.name == name)
        work = work or run.work
        result = work(Context(0, TOY, torch.device("cpu"), tmp_path, f"correlate/{name}"), **changed)
        assert json.loads(json.dumps(result)) == result
        return result

    done("start")
    plain = done("training", snapshots=2)
    assert [one["step"] for one in plain["snapshots"]] == [0, plain["steps"]]
    assert plain["end"] == plain["snapshots"][-1] and plain["snapshots"][0]["read_loss"] != plain["end"]["read_loss"]
    aided = done("auxiliary/1")
    assert aided["step_time_ratio"] > 0 and aided["end"]["read_loss"] != plain["end"]["read_loss"]
    # What the reader would have kept.
    weights = tmp_path / "weights" / "rprobe"
    weights.mkdir(parents=True)
    (tmp_path / "weights" / "correlate" / "start-seed0.safetensors").rename(weights / "reader-seed0.safetensors")
    whole, noisy = done("damage/decoder")["snapshots"]
    assert whole["mse"] == noisy["mse"] and whole["read_loss"] != noisy["read_loss"]
    for part in ("tower", "rank"):
        one, other = done(f"damage/{part}")["snapshots"]
        assert one["mse"] != other["mse"] and one["read_loss"] != other["read_loss"]
    assert one["mse"] == pytest.approx(whole["mse"], rel=1e-3)  # a whole rank is no damage


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_the_auxiliary_loss_sees_the_same_batches(weight):
    drawn = runs.digits.draw(8, 0, held_out=False)
    model = reader.new(0)
    handle = runs.patch(model, probe=runs.AuxiliaryProbe(weight=weight)) if weight else None
    index = torch.tensor([3, 1])
    batch = runs._collator(drawn, handle, torch.device("cpu"))(index, "largest")
    expected = drawn.batch(index, "largest")
    assert all(torch.equal(batch[name], expected[name]) for name in ("input_ids", "labels", "pixel_values"))
    assert (runs.KEY in batch) == bool(weight)
