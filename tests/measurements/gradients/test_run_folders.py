"""Where `gradients table` finds runs: results, training runs, points of a sweep, whole sweeps."""

import pytest

from llava_patch.core.errors import InputError
from llava_patch.measurements.gradients.result import run_folders


def _run(folder):
    (folder / "gradients").mkdir(parents=True)
    (folder / "gradients" / "gradients.jsonl").write_text("")
    return folder / "gradients"


def test_a_sweep_in_all_forms(tmp_path):
    sweep = tmp_path / "lr"
    points = [sweep / f"Flags.learning_rate-{rate}" for rate in ("2e-05", "8e-05")]
    expected = {point.name: _run(point / "seed42") for point in points}
    (sweep / "results.json").write_text("{}")
    assert run_folders([sweep]) == expected
    assert run_folders(sorted(sweep.iterdir())) == expected  # a shell's lr/*
    assert run_folders([point / "seed42" for point in points]) == expected
    assert run_folders([folder for folder in expected.values()]) == expected
    assert run_folders([points[0]]) == {points[0].name: expected[points[0].name]}
    _run(points[0] / "seed1")
    names = [f"{points[0].name}/seed1", f"{points[0].name}/seed42", f"{points[1].name}/seed42"]
    assert list(run_folders([sweep])) == names
    with pytest.raises(InputError, match="named twice"):
        run_folders([sweep, points[1]])


def test_what_is_no_run(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"empty: no gradients\.jsonl"):
        run_folders([_run(tmp_path / "run").parent, tmp_path / "empty"])
    with pytest.raises(InputError, match="no folder of a measured run among them"):
        run_folders([tmp_path / "file", tmp_path / "file"])
