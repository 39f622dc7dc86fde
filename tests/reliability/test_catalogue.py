"""Whatever is thrown at it: one clear error that names what is wrong and what to do, and nothing is written."""

from __future__ import annotations

import pytest

from tests.reliability.catalogue import rows
from tests.reliability.place import Place, Row
from tests.support.paths import ROOT


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_one_clear_error_and_nothing_written(row: Row, tmp_path):
    faults = Place(tmp_path / "place").attempt(row).faults(row)
    assert not faults, "\n".join(faults)


def test_rows_have_names_of_their_own_and_say_what_to_look_for():
    names = [row.name for row in rows()]
    assert len(names) == len(set(names))
    assert all(row.says and row.code in (1, 2) for row in rows())


def test_the_manual_says_how_many_rows_there_are():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert f"a catalogue of {len(rows())} rows" in page and len(rows()) >= 150


def test_a_row_that_is_accepted_or_ends_elsewhere_is_a_fault(tmp_path):
    accepted = Row("x", "fine", lambda place: lambda: None, ("word",))
    assert "accepted" in Place(tmp_path / "1").attempt(accepted).faults(accepted)[0]
    foreign = Row("x", "foreign", lambda place: lambda: {}["x"], ("x",), 1)
    assert "not an error of ours" in Place(tmp_path / "2").attempt(foreign).faults(foreign)[0]

    def writes(place):
        return lambda: place.file("half", "x") and place.command("convert")()

    half = Row("x", "half", writes, ("Missing",))
    assert "changed: half" in Place(tmp_path / "3").attempt(half).faults(half)
