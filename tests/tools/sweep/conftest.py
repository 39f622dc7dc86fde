"""A sweep over two splits with a script that stands in for training."""

import sys
from pathlib import Path

import pytest

FAKE = Path(__file__).parent / "fake_trainer.py"


@pytest.fixture
def sweep_file(tmp_path):
    path = tmp_path / "sweep.gin"
    path.write_text(
        'Sweep.gin_files = ("dpvr_lf_small.gin",)\nSweep.grid = {"Routing.split": (3, 5)}\nSweep.seeds = (1, 3)\n'
    )
    return path


@pytest.fixture
def command():
    return [sys.executable, str(FAKE)]


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The command lines that were run, in order."""
    path = tmp_path / "calls.txt"
    path.touch()
    monkeypatch.setenv("FAKE_CALLS", str(path))
    return lambda: path.read_text().splitlines()
