import dataclasses
import json

import pytest

from llava_patch.core.errors import InputError
from llava_patch.measurements.rprobe.result import FORMAT, VERSION, read_result, write_json
from tests.support.results import made_up_result


def test_round_trip_keeps_every_number(tmp_path):
    result = made_up_result()
    read = read_result(write_json(result, tmp_path / "r.json"))
    for field in dataclasses.fields(result):
        assert getattr(read, field.name) == getattr(result, field.name), field.name
    lone = dataclasses.replace(result, outside=None, mse_interval=None, fvu_interval=None)
    read = read_result(write_json(lone, tmp_path / "lone.json"))
    assert (read.outside, read.mse_interval, read.fvu_interval) == (None, None, None)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v.pop("format"), "version 1, this reads 2: measure the checkpoint again"),
        (lambda v: v.update(format="other"), "version 1"),
        (lambda v: v.clear(), "not an R-Probe result"),
        (lambda v: v.update(version=VERSION + 1), f"version {VERSION + 1}, this reads {VERSION}"),
        (lambda v: v.pop("psnr"), "psnr is missing"),
        (lambda v: v.update(colour=1), "colour is unknown"),
    ],
)
def test_other_files_are_refused_with_their_name(change, message, tmp_path):
    values = made_up_result().to_json()
    assert values["format"] == FORMAT
    change(values)
    (tmp_path / "other.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=message) as error:
        read_result(tmp_path / "other.json")
    assert "other.json" in str(error.value)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.json: cannot be read"):
        read_result(tmp_path / "nowhere.json")
    (tmp_path / "half.json").write_text('{"mse": 1')
    with pytest.raises(InputError, match=r"half\.json: cannot be read"):
        read_result(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match=r"list\.json: not an R-Probe result"):
        read_result(tmp_path / "list.json")


def test_the_summary_says_what_strokes_cost_and_how_many_documents_there_are():
    result = made_up_result()
    assert "[0.3000, 0.5000] (in text 0.500, beside it 0.100), FVU 0.400" in repr(result)
    assert "3 samples of 3 documents" in result.summary()
    bare = dataclasses.replace(result, inside=None, outside=None, documents=result.documents[:1])
    assert "FVU 0.400 (constant" in bare.summary() and "1 samples of 1 document," in bare.summary()
