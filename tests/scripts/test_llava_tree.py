"""A checkout of LLaVA in front of the installed package: who finds it, and how it is called."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import llava_tree, tiny_train

FIND = "import importlib.util; print(importlib.util.find_spec('llava').origin)"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    (tmp_path / "LLaVA" / "llava").mkdir(parents=True)
    (tmp_path / "LLaVA" / "llava" / "__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return (tmp_path / "LLaVA").resolve()


def test_a_process_of_a_test_finds_the_llava_of_the_tests():
    assert tiny_train.run(["-c", FIND]).stdout.strip() == importlib.util.find_spec("llava").origin


def test_a_checkout_comes_before_the_installed_package(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {llava_tree.VARIABLE: "LLaVA", "PYTHONPATH": os.pathsep.join(["/first", str(tree), "/second"])}
    llava_tree.put_in_front(given)
    assert given == {llava_tree.VARIABLE: str(tree), "PYTHONPATH": os.pathsep.join(["/first", "/second", str(tree)])}
    llava_tree.put_in_front(given)
    assert sys.path.count(str(tree)) == 1 and sys.path.index(str(tree)) == 1
    done = subprocess.run([sys.executable, "-c", FIND], capture_output=True, text=True, env={**os.environ, **given})
    assert Path(done.stdout.strip()) == tree / "llava" / "__init__.py"
    for nothing in ({}, {llava_tree.VARIABLE: ""}):
        before = dict(nothing)
        llava_tree.put_in_front(nothing)
        assert nothing == before
    with pytest.raises(ValueError, match=r"LLAVA_PATCH_LLAVA_TREE=/nowhere: .* no llava/__init__\.py"):
        llava_tree.put_in_front({llava_tree.VARIABLE: "/nowhere"})


def test_the_line_says_which_llava_it_is(tree, monkeypatch):
    def git(*words):
        who = {f"GIT_{role}_{what}": "a@b" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        done = subprocess.run(["git", "-C", tree, *words], capture_output=True, text=True, env={**os.environ, **who})
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def line():
        return llava_tree.described().removeprefix(f"llava: {tree / 'llava'} ")

    spec = importlib.util.spec_from_file_location(
        "llava", tree / "llava" / "__init__.py", submodule_search_locations=[str(tree / "llava")]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert line() == "(of no known revision)"
    (tree / "llava_torch-1.2.2.dist-info").mkdir()
    assert line() == "(llava_torch-1.2.2)"
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    assert line() == f"(revision {git('rev-parse', 'HEAD')})"
    (tree / "llava" / "__init__.py").write_text("1")
    assert line().endswith(", changed)")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert llava_tree.described() == "llava: not installed"
