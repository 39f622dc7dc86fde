"""Installed versions beside the locks, and imports that would fail in the middle of a run."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava_patch.core.paths import locks_dir
from llava_patch.tools.doctor import NOTE, OK, PROBLEM, imports, software

MAIN = software.read_lock(locks_dir() / "main.txt")


def _environment(monkeypatch, **versions):
    """An environment as the main lock has it, but for some versions."""
    there = {**MAIN, **versions}
    monkeypatch.setattr(software, "installed", lambda name: there.get(name))


def test_a_lock_is_read_for_this_python(tmp_path):
    lock = tmp_path / "stack.txt"
    lock.write_text(
        "# a comment\nnumpy==1.0 ; python_version < '3'\nnumpy==2.4.6 ; python_version >= '3'\nSome_Name==1\n"
    )
    assert software.read_lock(lock) == {"numpy": "2.4.6", "some-name": "1"}


@pytest.mark.parametrize(
    "transformers, stack",
    [
        ("4.57.9", "main"),
        ("4.37.2", "llava_pinned"),
        ("5.24.0", "newest"),
        ("4.40.0", "llava_pinned"),
        ("4.53.0", "main"),
        ("5.0.0", "newest"),
        ("6.0", "main"),
        (None, "main"),
    ],
)
def test_the_nearest_stack(transformers, stack):
    assert software.lock_of(transformers)[0] == stack


def test_an_environment_as_locked(monkeypatch):
    _environment(monkeypatch)
    [row] = software.check_measured()
    assert row.state == OK and "every version as in main.txt" in row.found


def test_versions_that_were_never_run(monkeypatch):
    _environment(monkeypatch, peft="9.9", filelock="4.3.1", idna="1.0", deepspeed=None)
    host, rest = software.check_measured()
    assert (host.what, host.found, host.state) == ("measured: peft", "9.9", NOTE)
    assert f"pip install 'peft=={MAIN['peft']}'" in host.advice
    assert rest.found.startswith(f"2 of {len(MAIN)} packages") and f"filelock 4.3.1 ({MAIN['filelock']})" in rest.found


def test_the_line_to_type(monkeypatch):
    _environment(monkeypatch, filelock="4.3.1", decord=None)
    monkeypatch.setattr(software, "packages_distributions", lambda: {"filelock": ["filelock"], "yaml": ["PyYAML"]})
    wanted = f"pip install 'filelock=={MAIN['filelock']}': 4.3.1 is installed, {MAIN['filelock']} works"
    assert software.advice("filelock._api") == wanted
    assert software.advice("decord") == f"pip install 'decord=={MAIN['decord']}'"
    assert "compare this environment with main.txt" in software.advice("yaml.gone")  # as locked, and yet not there
    assert "compare this environment with main.txt" in software.advice("nobody_knows_it")


# --- imports ----------------------------------------------------------------------------------------------------------

HOST = """
import json
try:
    import never_there
except ImportError:
    never_there = None

def works():
    import os.path
    from there import name, inner
    from . import sibling

def optional_feature():
    import not_installed_at_all
    from not_installed_at_all.deeper import something

def expected():
    try:
        from there import gone_and_known_to_be
    except ImportError:
        pass

class Model:
    def moved_module(self):
        import there._api
    async def moved_name(self):
        from there import gone
"""


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Packages `a_host` and `there`, of which the first imports the second later, and `broken`."""
    texts = {
        "a_host/__init__.py": "", "a_host/run.py": HOST, "a_host/sibling.py": "", "there/__init__.py": "name = 1",
        "there/inner.py": "", "broken/__init__.py": "from there import nothing_like_it",
        "leaves/__init__.py": "exit(3)",
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [n for n in sys.modules if n.partition(".")[0] in ("a_host", "there", "broken", "leaves")]:
        del sys.modules[name]


def test_imports_inside_functions_are_tried(host):
    lines = HOST.splitlines()
    found = imports.failures(["a_host.run", "a_host.not_in_this_version", "not_installed_either.module"])
    assert [(lines[int(f["where"].partition(":")[2]) - 1].strip(), f["module"]) for f in found] == [
        ("import there._api", "there._api"),
        ("from there import gone", "there"),
    ]
    assert found[0]["error"] == "ModuleNotFoundError: No module named 'there._api'"


def test_a_module_that_cannot_be_imported(host):
    broken, leaves = imports.failures(["broken", "leaves"])
    assert broken["where"] == "broken" and broken["module"] == "there"
    assert broken["error"].startswith("ImportError: cannot import name 'nothing_like_it' from 'there'")
    assert leaves["error"] == "SystemExit: 3"


def test_every_command_is_tried_in_a_process_of_its_own(host, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(host), os.environ.get("PYTHONPATH", "")]))
    tried = {"good": ("there", "there.inner"), "bad": ("a_host.run",), "absent": ("not_installed_either",)}
    monkeypatch.setattr(software, "TRIED", tried)
    rows = {row.what: row for row in software.check_imports(software.start_imports())}
    assert rows.pop("imports: good").found == "all there"
    assert len(rows) == 2 and all(row.state == PROBLEM for row in rows.values())
    assert "a_host" not in sys.modules


def test_a_command_whose_import_ends_the_interpreter(host, monkeypatch):
    (host / "there" / "__init__.py").write_text(
        "import os; print('last words', file=__import__('sys').stderr); os._exit(7)"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(host), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(software, "TRIED", {"bad": ("there.inner",)})
    [row] = software.check_imports(software.start_imports())
    assert row.state == PROBLEM and row.found == "last words"


@pytest.mark.timeout(300)
def test_a_filelock_that_lmms_eval_cannot_import_is_found_by_the_command(tmp_path):
    """filelock 4.3 came into a fresh environment, and lmms-eval failed in the middle of a run."""
    real = Path(importlib.util.find_spec("filelock").origin).parent
    shutil.copytree(real, tmp_path / "filelock", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "filelock" / "_api.py").rename(tmp_path / "filelock" / "_core.py")
    for path in (tmp_path / "filelock").rglob("*.py"):
        path.write_text(path.read_text().replace("_api import", "_core import"))
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-W", "ignore", "-m", "llava_patch.tools.doctor.imports", *imports.TRIED["lmms-eval"]]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    [failure] = json.loads(done.stdout.splitlines()[-1])
    assert failure["where"].startswith("lmms_eval.evaluator:") and failure["module"] == "filelock._api"
