"""Files appear whole or not at all."""

import os

import pytest
import torch
from safetensors.torch import save_file

from llava_patch.core.files import atomic, plain


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "r.json"
    target.write_text("old")
    with pytest.raises(OSError, match="disk full"), atomic(target) as part:
        part.write_text("half")
        raise OSError("disk full")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    with atomic(target) as part:
        part.write_text("new")
    assert target.read_text() == "new"


def test_who_may_read_results_may_read_all_of_them(tmp_path):
    def fill(folder):
        (folder / "r.json").write_text("{}")
        save_file({"x": torch.ones(1)}, folder / "w.safetensors")

    before = os.umask(0o022)
    try:
        with atomic(tmp_path / "alone.safetensors") as part:
            save_file({"x": torch.ones(1)}, part)
        with atomic(tmp_path / "folder", folder=True) as part:
            fill(part)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3 and all(path.stat().st_mode & 0o777 == 0o644 for path in files)


def test_json_has_no_nan():
    assert plain({"a": [float("nan"), 1.0, (float("inf"), "x")]}) == {"a": [None, 1.0, [None, "x"]]}
