"""Locks between processes."""

import filelock
import pytest

from llava_patch.core.locks import FileLock


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
