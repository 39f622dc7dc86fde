"""docs/guarantees.md against the tests that it names."""

import ast
import re

import pytest

from tests.support.paths import ROOT

ROWS = [
    [cell.strip() for cell in line.strip("|\n").split(" | ")]
    for line in (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and "::" in line
]


def test_the_table_is_found():
    assert len(ROWS) > 20


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:40] for row in ROWS])
def test_every_guarantee_is_held_by_a_test_that_can_be_run(row):
    _, close, held_by = row
    named = re.findall(r"`([\w/.]+)::(\w+)`", held_by)
    assert named and len(named) == held_by.count("::")
    text = ""
    for path, name in named:
        source = (ROOT / path).read_text(encoding="utf-8")
        functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{path} has no {name}"
        marks = " ".join(ast.unparse(mark) for mark in functions[name].decorator_list)
        assert "mark.skip(" not in marks and "xfail" not in marks
        text += source
    if close.startswith("exact"):  # an exact identity is compared bit for bit somewhere
        assert re.search(r"torch\.equal|==|identical", text)
