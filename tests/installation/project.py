"""What pyproject.toml asks for, and what a lock says."""

import re

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pytest brings it
    import tomli as tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT

LOCKS = ROOT / "scripts" / "locks"
MODULES = {"gin-config": "gin", "pillow": "PIL"}
"""Modules whose name is not their distribution's."""


def core():
    return [Requirement(line) for line in _project()["dependencies"]]


def extra(name):
    """Requirements of an extra, without references to other extras of ours."""
    found = []
    for need in map(Requirement, _project()["optional-dependencies"][name]):
        if need.name == "llava_patch":
            found += [one for inner in need.extras for one in extra(inner)]
        else:
            found.append(need)
    return found


def extras():
    return list(_project()["optional-dependencies"])


def module_of(need):
    return MODULES.get(need.name, need.name)


def lines(lock):
    return [line for line in lock.read_text().splitlines() if not line.startswith("#")]


def here(lock):
    """The lines of a lock that count for this Python on this platform."""
    needs = [Requirement(line) for line in lines(lock)]
    return [need for need in needs if need.marker is None or need.marker.evaluate()]


def locked(lock):
    """The version of each package that a lock gives here."""
    return {canonicalize_name(need.name): re.sub("^==", "", str(need.specifier)) for need in here(lock)}


def _project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
