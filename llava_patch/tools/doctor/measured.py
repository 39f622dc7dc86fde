"""Installed versions against those that llava_patch was run with, and the imports that its hosts make."""

import functools
import importlib.util
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from llava_patch.core.paths import locks_dir
from llava_patch.tools.doctor import NOTE, OK, PROBLEM, Row
from llava_patch.tools.doctor.imports import TRIED

HOSTS = ("torch", "transformers", "accelerate", "peft", "deepspeed", "lmms-eval", "llava-torch")
"""Packages whose every version is another host; the others of a lock are what those need."""
_PATIENCE = 300  # seconds; a cold disk may take one to read torch


def read_lock(path: Path) -> dict[str, str]:
    """The versions that a lock holds for this Python and platform, by canonical name."""
    versions: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate():
                versions[canonicalize_name(need.name)] = str(need.specifier).removeprefix("==")
    return versions


@functools.lru_cache
def lock_of(transformers: str | None) -> tuple[str, dict[str, str]]:
    """Name and versions of the lock with the same minor version of transformers, else of the main one."""
    locks = {path.stem: read_lock(path) for path in sorted(locks_dir().glob("*.txt"))}
    series = None if transformers is None else Version(transformers).release[:2]
    for name, versions in locks.items():
        if Version(versions["transformers"]).release[:2] == series:
            return name, versions
    return "main", locks["main"]


def installed(distribution: str) -> str | None:
    """A distribution's version; None when it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def check_measured() -> list[Row]:
    """One row for each host that was never run in the version that is here, and one for what the hosts need."""
    stack, lock = lock_of(installed("transformers"))
    rows, other = [], []
    for name, wanted in lock.items():
        there = (installed(name) or "").partition("+")[0]  # without its build's label, such as "+cpu"
        if there in ("", wanted):
            continue
        if name in HOSTS:
            advice = f"figures and tests are of {wanted}; should something fail: pip install '{name}=={wanted}'"
            rows.append(Row(f"measured: {name}", there, NOTE, advice))
        else:
            other.append(f"{name} {there} ({wanted})")
    if other:
        found = f"{len(other)} of {len(lock)} packages are of another version than measured: {', '.join(other)}"
        advice = f"usually harmless; {stack}.txt of scripts/locks has the versions in brackets"
        rows.append(Row("measured: the rest", found, OK, advice))
    return rows or [Row("measured", f"every version as in {stack}.txt of scripts/locks")]


def check_imports() -> list[Row]:
    """Whether training and evaluation commands would find all that they import, now and in the middle of a run.

    Each command is tried in a process of its own, both at once: importing a training script has effects.
    """
    started = {}
    for command, names in TRIED.items():
        if any(importlib.util.find_spec(name.partition(".")[0]) is not None for name in names):
            started[command] = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "llava_patch.tools.doctor.imports", *names],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
    return [row for command, process in started.items() for row in _outcome(command, process)]


def _outcome(command: str, process: "subprocess.Popen[str]") -> list[Row]:
    what = f"imports: {command}"
    try:
        printed, errors = process.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return [Row(what, f"not done after {_PATIENCE} s", NOTE, "try it by hand")]
    lines = printed.strip().splitlines()
    if process.returncode != 0 or not lines:
        last = (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        return [Row(what, last[:200], PROBLEM, "importing it ends the interpreter: reinstall it and what it needs")]
    failures = json.loads(lines[-1])
    return [
        Row(f"imports: {command}, {failure['where']}", failure["error"], PROBLEM, advice(failure["module"]))
        for failure in failures
    ] or [Row(what, "all there")]


def advice(module: str) -> str:
    """What to type when a module, or a name of it, is not there."""
    top = module.partition(".")[0]
    name = canonicalize_name((packages_distributions().get(top) or [top])[0])
    there = (installed(name) or "").partition("+")[0]
    stack, lock = lock_of(installed("transformers"))
    wanted = lock.get(name)
    if wanted is None or wanted == there:
        return f"compare this environment with {stack}.txt of scripts/locks, whose versions work together"
    return f"pip install '{name}=={wanted}'" + (f": {there} is installed, {wanted} works" if there else "")
