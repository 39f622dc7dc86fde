"""The locks: exact, of no machine, and within what pyproject.toml admits."""

import re
import subprocess

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

from .project import LOCKS, ROOT, core, extra, extras, here, lines, locked

MAIN, PINNED = LOCKS / "main.txt", LOCKS / "llava_pinned.txt"
EXACT = re.compile(r"[a-z0-9][a-z0-9-]*==[0-9][0-9a-z.]*( ; [A-Za-z_0-9 '\".<>=!*()]+)?")
STACKS = sorted(path.stem for path in LOCKS.glob("*.in"))


def test_each_stack_has_a_lock():
    assert STACKS == ["llava_pinned", "main", "newest"]
    assert sorted(path.stem for path in LOCKS.glob("*.txt")) == STACKS


@pytest.mark.parametrize("stack", STACKS)
def test_every_line_is_exact_and_of_no_machine(stack):
    lock = LOCKS / f"{stack}.txt"
    assert len(lines(lock)) > 100
    assert [line for line in lines(lock) if not EXACT.fullmatch(line)] == []
    assert "/" not in lock.read_text().replace("scripts/lock.sh", "")  # no host, no path
    named = [line.partition("==")[0] for line in lines(lock)]
    assert named == sorted(named)
    # GPU packages go with the wheel of torch that a machine gets: torch pins them, and a CPU build has none.
    gpu = {name for name in named if re.match("nvidia-|cuda-|triton$", name)}
    assert gpu <= {"nvidia-ml-py"}  # pure Python, for DeepSpeed
    assert len(here(lock)) == len(locked(lock))  # one version of each, whatever the markers


@pytest.mark.parametrize("stack", ["main", "newest"])
def test_the_suites_locks_cover_what_pyproject_asks_for_and_are_within_it(stack):
    versions = locked(LOCKS / f"{stack}.txt")
    needs = core() + [need for name in extras() if name != "flash" for need in extra(name)]
    for need in needs:
        if need.marker is None or need.marker.evaluate():
            assert need.specifier.contains(Version(versions[canonicalize_name(need.name)])), need
    assert {"lmms-eval", "llava-torch", "deepspeed", "setuptools", "wheel", "hatchling", "editables"} <= set(versions)


def test_in_llavas_environment_only_gin_is_missing_and_nothing_is_out_of_range():
    versions = locked(PINNED)
    absent = [need.name for need in core() if canonicalize_name(need.name) not in versions]
    assert absent == ["gin-config"]
    for need in [*core(), *extra("all")]:
        version = versions.get(canonicalize_name(need.name))
        assert version is None or need.specifier.contains(Version(version)), need


@pytest.mark.parametrize("name", ["torch", "transformers", "accelerate", "numpy", "tokenizers", "huggingface-hub"])
def test_no_core_requirement_can_move_what_trains(name):
    assert all(str(need.specifier) == "" for need in core() if need.name == name)
    assert all(need.name != name for one in ("all", "eval") for need in extra(one))


def test_what_the_project_supports_is_in_one_extra():
    from llava_patch.hosts.compat import SUPPORTED_TRANSFORMERS

    low, high = SUPPORTED_TRANSFORMERS
    (need,) = [need for need in extra("hosts") if need.name == "transformers"]
    assert set(map(str, need.specifier)) == {f">={low}", f"<{high}"}


def test_beside_lmms_eval_filelock_keeps_the_module_that_it_imports():
    (need,) = extra("eval")
    assert need.name == "filelock" and need.specifier.contains("4.2.12") and not need.specifier.contains("4.3.1")
    assert str(next(need for need in core() if need.name == "filelock").specifier) == ""  # nobody else's is moved


def test_an_installation_resolves_nothing_but_torch(tmp_path):
    """Every call of pip that install.sh makes: all but torch's say --no-deps, and none builds in isolation."""
    said = tmp_path / "said"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >>{said}\n')
    python.chmod(0o755)
    subprocess.run(["bash", str(LOCKS / "install.sh"), str(python), str(MAIN)], check=True)
    first, rest = said.read_text().splitlines()
    assert f"--constraint {MAIN}" in first and f" torch=={locked(MAIN)['torch']}" in first
    assert all("==" in word for word in first.split(f"{MAIN} ")[1].split())
    assert f"--no-deps --requirement {MAIN}" in rest
    assert all("--no-build-isolation" in line for line in (first, rest))
    assert 'install.sh" "$VENV/bin/python" "$_lock"' in (ROOT / "scripts" / "install.sh").read_text()
