"""What long commands say before and while they work."""

import re
from pathlib import Path

import llava_patch
from llava_patch.core import files
from llava_patch.core.terminal import how_many, say_cost


def test_a_cost_is_one_line_on_standard_error(capsys):
    say_cost("saturation", how_many([1, 2, 3], 2), "a forward pass each", "")
    say_cost("saturation", how_many(iter([1]), 1), "a forward pass each", shown=False)
    assert capsys.readouterr() == ("", "saturation: 2 samples, a forward pass each\n")
    assert (how_many([1]), how_many(iter([]), 5), how_many(iter([]))) == ("1 sample", "5 samples", "")


def test_items_come_through_a_progress_bar_as_they_are(capsys):
    assert list(files.track([1, 2], "two", True)) == [1, 2] and "two: 100%" in capsys.readouterr().err
    assert list(files.track(iter([1, 2]), "some", True)) == [1, 2] and "some: 2it" in capsys.readouterr().err
    assert list(files.track([1, 2], "quiet", False)) == [1, 2] and capsys.readouterr().err == ""


def test_there_is_one_library_of_progress_bars():
    root = Path(llava_patch.__file__).parent
    uses = re.compile(r"rich\.progress|rich import progress|\btqdm\b.* import |import tqdm|\.status\(")
    found = [p.relative_to(root).as_posix() for p in root.rglob("*.py") if uses.search(p.read_text(encoding="utf-8"))]
    assert found == ["core/terminal.py"]
