"""Packages that only some commands need: which extra of ours brings each, and what is said when it is not there.

Patching, training and loading need none of them, so that installing llava_patch moves nothing in an environment that
trains. Import them through `optional` alone; a command that will need some says so with `needs`, before it starts.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

from llava_patch.core.errors import MissingExtraError

EXTRAS = {"figures": "matplotlib", "report": "jinja2", "probe": "scipy", "data": "datasets", "demo": "gradio"}
"""The package that each extra of pyproject.toml is there for."""


def need(what: str, *extras: str) -> None:
    """Check that the packages of some extras are installed, without loading them; the error has the line to type."""
    missing = [extra for extra in extras if not _there(EXTRAS[extra])]
    if missing:
        raise MissingExtraError(_message(what, missing))


@contextlib.contextmanager
def needs(command: str, *extras: str) -> Iterator[None]:
    """Decorates a command that needs some extras: they are looked for when it is called, not for its --help."""
    need(command, *extras)
    yield


def optional(module: str, what: str = "this") -> Any:
    """Import a module of a package in `EXTRAS`.

    Raises:
        MissingExtraError: its package is not installed.
    """
    package = module.partition(".")[0]
    extra = next(extra for extra, brought in EXTRAS.items() if brought == package)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise  # it is there, and what it needs itself is not
        raise MissingExtraError(_message(what, [extra])) from error


def _there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


def _message(what: str, missing: list[str]) -> str:
    packages = " and ".join(EXTRAS[extra] for extra in missing)
    return f'{what} needs {packages}: pip install "llava_patch[{",".join(missing)}]"'
