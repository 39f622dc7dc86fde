import dataclasses
import json

import pytest

from llava_patch.core.errors import InputError
from llava_patch.measurements.rprobe.result import RProbeResult
from tests.support.results import made_up_result


def test_round_trip_keeps_every_number(tmp_path):
    result = made_up_result()
    read = RProbeResult.load(result.save(tmp_path, "r", ())[0])
    for field in dataclasses.fields(result):
        assert getattr(read, field.name) == getattr(result, field.name), field.name
    lone = dataclasses.replace(result, outside=None, mse_interval=None, fvu_interval=None)
    read = RProbeResult.load(lone.save(tmp_path, "lone", ())[0])
    assert (read.outside, read.mse_interval, read.fvu_interval) == (None, None, None)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: [v.pop(key) for key in ("format", "version")], "version 1, this version of llava_patch reads 2"),
        (lambda v: v.update(format="other"), "not a R-Probe result"),
        (lambda v: v.clear(), "R-Probe result of version 1"),
        (lambda v: v.update(version=3), "version 3, this version of llava_patch reads 2"),
        (lambda v: v.pop("psnr"), "missing: 'psnr'"),
        (lambda v: v.update(colour=1), "unknown: colour"),
    ],
)
def test_other_files_are_refused_with_their_name(change, message, tmp_path):
    values = made_up_result().to_dict()
    assert (values["format"], values["version"]) == ("llava_patch R-Probe result", 2)
    change(values)
    (tmp_path / "other.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=message) as error:
        RProbeResult.load(tmp_path / "other.json")
    assert "other.json" in str(error.value)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.json: cannot be read"):
        RProbeResult.load(tmp_path / "nowhere.json")
    (tmp_path / "half.json").write_text('{"mse": 1')
    with pytest.raises(InputError, match=r"half\.json: not valid JSON"):
        RProbeResult.load(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match=r"list\.json: not valid JSON of this kind"):
        RProbeResult.load(tmp_path / "list.json")


def test_the_summary_says_what_strokes_cost_and_how_many_documents_there_are():
    result = made_up_result()
    assert "[0.3000, 0.5000] (in text 0.500, beside it 0.100), FVU 0.400" in repr(result)
    assert "3 samples of 3 documents" in result.summary()
    bare = dataclasses.replace(result, inside=None, outside=None, documents=result.documents[:1])
    assert "FVU 0.400 (constant" in bare.summary() and "1 samples of 1 document," in bare.summary()
