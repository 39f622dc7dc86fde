"""A sweep through LLaVA's unmodified train.py: what each run gets is what its point says."""

import json
import sys

import pytest

from llava_patch.tools.sweep.command import sweep
from tests.support.tiny_train import TRAIN, arguments, make_data


@pytest.mark.timeout(600)
def test_two_splits(tmp_path):
    data = make_data(tmp_path)
    file = tmp_path / "sweep.gin"
    file.write_text(
        'Sweep.gin_files = ("dpvr_lf_small.gin",)\nSweep.grid = {"Routing.split": (2, 4)}\n'
        'Sweep.gin_params = ("Flags.learning_rate = 3e-3",)\n'
    )
    command = [sys.executable, str(TRAIN), *arguments(data, 2, tmp_path / "unused", steps=3)]
    assert sweep(str(file), tmp_path / "out", command, seeds=[42])
    for split in (2, 4):
        folder = tmp_path / "out" / f"Routing.split-{split}" / "seed42"
        assert json.loads((folder / "llava_patch.json").read_text())["routing"]["split"] == split
        operative = (folder / "llava_patch_operative.gin").read_text()
        assert f"Routing.split = {split}\n" in operative and "Flags.learning_rate = 0.003\n" in operative
        log = (folder / "train.log").read_text()
        assert "--learning_rate 0.003 (instead of the script's --learning_rate 0.001)" in log
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        record = json.loads((folder / "llava_patch_sweep.json").read_text())
        assert record["loss"] == {"mean": pytest.approx(sum(losses) / 3), "steps": 3, "last_step": 3}
    assert not (tmp_path / "unused").exists()
