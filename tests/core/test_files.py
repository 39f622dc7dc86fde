"""Files appear whole or not at all."""

import pytest

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
    assert target.stat().st_mode & 0o044


def test_json_has_no_nan():
    assert plain({"a": [float("nan"), 1.0, (float("inf"), "x")]}) == {"a": [None, 1.0, [None, "x"]]}
