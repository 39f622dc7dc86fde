"""Locks between processes."""

import os

import filelock
import pytest

from llava_patch.core.locks import FileLock, held


def test_a_lock_is_one_also_where_lmms_eval_makes_filelocks_own_one_a_path(tmp_path, monkeypatch):
    evaluator = pytest.importorskip("lmms_eval.evaluator")
    monkeypatch.setattr(type(filelock.FileLock), "__call__", type(filelock.FileLock).__call__)  # put back afterwards
    monkeypatch.setattr(evaluator._enable_reentrant_filelocks, "_patched", False, raising=False)
    evaluator._enable_reentrant_filelocks()
    path = tmp_path / "lock"
    assert filelock.FileLock(path) is filelock.FileLock(path, timeout=0)
    first, second = FileLock(path, timeout=0), FileLock(path, timeout=5)
    assert (first.timeout, second.timeout) == (0, 5)
    with first, pytest.raises(filelock.Timeout):
        second.acquire(timeout=0)


def test_two_processes_hold_a_lock_one_after_the_other_and_leave_none(tmp_path):
    path, said, told = tmp_path / ".lock", os.pipe(), [os.pipe(), os.pipe()]

    def hold(number):
        if child := os.fork():
            return child
        with held(path):
            os.write(said[1], b"%d" % number)
            os.read(told[number][0], 1)
        os._exit(0)

    first = hold(0)
    assert os.read(said[0], 1) == b"0"
    second = hold(1)  # waits, and must not end up with the file that the first one takes away
    os.write(told[0][1], b"x")
    assert os.waitpid(first, 0)[1] == 0 and os.read(said[0], 1) == b"1"
    with pytest.raises(filelock.Timeout), held(path, 0):
        pass
    os.write(told[1][1], b"x")
    assert os.waitpid(second, 0)[1] == 0 and not path.exists()


def test_a_lock_whose_file_was_taken_away_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    path, real, calls = tmp_path / ".lock", FileLock.acquire, []

    def acquire(self, *args, **kwargs):
        real(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 1:  # its holder took the file away between the opening and the locking
            path.unlink()
            path.touch()

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with held(path):
        assert len(calls) == 2
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(path, timeout=0).acquire()
    assert not path.exists()
