"""All rows of the catalogue, and the table of what becomes of them: `python -m tests.reliability.catalogue`."""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

from tests.reliability.place import Outcome, Place, Row


def rows() -> list[Row]:
    """Every row, in order of files."""
    files = sorted(Path(__file__).parent.glob("rows_*.py"))
    return [row for file in files for row in importlib.import_module(f"tests.reliability.{file.stem}").ROWS]


def main() -> int:
    """Print a line a row and how many were wrong."""
    wrong = 0
    for number, row in enumerate(rows(), 1):
        with tempfile.TemporaryDirectory() as folder:
            outcome: Outcome = Place(Path(folder) / "place").attempt(row)
        faults = outcome.faults(row)
        wrong += bool(faults)
        state = "WRONG" if faults else "ok"
        print(f"{number:4} {state:5} exit {outcome.code} | {row.name} | {outcome.text[:160]}", flush=True)
        for fault in faults:
            print(f"           {fault}", flush=True)
    print(f"{len(rows())} rows, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
