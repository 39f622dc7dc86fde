"""The lock of a run's folder, which lasts as long as the command that works there."""

import subprocess
import sys

import pytest

from llava_patch.core.errors import BusyError
from llava_patch.tools.sweep import process


def test_the_lock_lasts_as_long_as_a_worker_and_leaves_no_file(tmp_path):
    folder = tmp_path / "run"
    with process.lock(folder) as descriptor:
        assert (folder / ".lock").is_file()
        worker = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(descriptor,))
    try:  # as of a sweep that was killed: its command goes on
        assert (folder / ".lock").is_file()
        with pytest.raises(BusyError, match="still runs there"):
            process.check_free(folder)
        with pytest.raises(BusyError, match="still runs there"), process.lock(folder):
            pass
    finally:
        worker.communicate(b"\n")
    with process.lock(folder):
        process.check_free(tmp_path)
    assert not list(folder.iterdir())


def test_a_file_that_its_last_holder_takes_away_is_locked_anew(tmp_path, monkeypatch):
    real, calls = process._take, []

    def take(descriptor, folder):
        real(descriptor, folder)
        calls.append(1)
        if len(calls) == 1:
            (folder / ".lock").unlink()

    monkeypatch.setattr(process, "_take", take)
    with process.lock(tmp_path):
        assert len(calls) == 2
        monkeypatch.setattr(process, "_take", real)
        with pytest.raises(BusyError):
            process.check_free(tmp_path)
