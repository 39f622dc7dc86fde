"""The table of stacks, hosts and jobs: it says what its JSON says, and a part of the tests takes no column's place."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
from matrix import table

from tests.support.paths import ROOT

CELL = {"passed": 2, "skipped": {}, "failed": {}, "seconds": 1.0, "figures": []}
FOUND = {"transformers": "5.0.0"}


class Nox(SimpleNamespace):
    """As much of nox as the file's decorators need; it is not installed where the tests run."""

    def __init__(self):
        super().__init__(options=SimpleNamespace(), Session=object)

    def session(self, function=None, **_):
        return function or (lambda function: function)

    def parametrize(self, *_, **__):
        return lambda function: function


class Session:
    """One that leaves what a run of the jobs would."""

    def __init__(self, out, *posargs):
        self.out, self.posargs, self.said = out, list(posargs), ""

    def chdir(self, _):
        pass

    def run(self, *_, **__):
        self.out.parent.mkdir(exist_ok=True)
        self.out.write_text(json.dumps({"generate": {"hf": CELL}}))

    def log(self, text):
        self.said += text


@pytest.fixture
def noxfile(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nox", Nox())
    spec = importlib.util.spec_from_file_location("matrix_noxfile", ROOT / "scripts" / "matrix" / "noxfile.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"before\n{table.BEGIN}\n{table.END}\nafter\n")
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "FILE", tmp_path / "docs" / "matrix.json")
    monkeypatch.setattr(table, "versions", lambda environment: FOUND)
    monkeypatch.setattr(module, "WORK", tmp_path / "work")
    return module


def test_arguments_for_pytest_change_no_file(noxfile, tmp_path):
    all_jobs = {"generate": {"hf": CELL | {"passed": 7}}, "resume": {"hf": CELL}}
    table.add("main", table.column(FOUND, "", all_jobs))
    files = [table.FILE, table.FILE.with_suffix(".md"), tmp_path / "README.md"]
    before = [path.read_text() for path in files]
    part = Session(noxfile.WORK / "main.json", "--jobs", "generate")
    noxfile._jobs(part, "main", {"PYTHON": sys.executable})
    assert [path.read_text() for path in files] == before
    assert "| generate | 2, - |" in part.said
    whole = Session(noxfile.WORK / "main.json")
    noxfile._jobs(whole, "main", {"PYTHON": sys.executable})
    assert list(json.loads(table.FILE.read_text())["stacks"]["main"]["cells"]) == ["generate"]
    assert "| generate | 2, - |" in (tmp_path / "README.md").read_text()


def test_the_committed_table_says_what_its_json_says():
    values = json.loads(table.FILE.read_text(encoding="utf-8"))
    assert table.FILE.with_suffix(".md").read_text(encoding="utf-8") == table.markdown(values)
    assert f"{table.BEGIN}\n{table.cells(values)}\n{table.END}" in (ROOT / "README.md").read_text(encoding="utf-8")
