"""Which `llava` the tests run with: the installed one, or a checkout of LLaVA that a variable names."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path

VARIABLE = "LLAVA_PATCH_LLAVA_TREE"


def put_in_front(environment: MutableMapping[str, str] = os.environ) -> None:
    """Put the checkout that the variable names before the installed package, here and in processes that tests start.

    ValueError: it is none.
    """
    if not environment.get(VARIABLE):
        return
    tree = Path(environment[VARIABLE]).expanduser().resolve()
    if not (tree / "llava" / "__init__.py").is_file():
        raise ValueError(f"{VARIABLE}={environment[VARIABLE]}: no checkout of LLaVA, it has no llava/__init__.py")
    environment[VARIABLE] = str(tree)  # the folder of a process may be another one
    path = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(tree)]
    environment["PYTHONPATH"] = os.pathsep.join([*path, str(tree)])
    if str(tree) not in sys.path:
        sys.path.insert(1, str(tree))  # behind this repository, which has a folder `scripts` as well


def is_next() -> bool:
    """Whether the `llava` that is found is LLaVA-NeXT's package: it has a SigLIP of its own."""
    return importlib.util.find_spec("llava.model.multimodal_encoder.siglip_encoder") is not None


def described() -> str:
    """The `llava` that is found, in a line: where it lies, and its revision or version."""
    found = importlib.util.find_spec("llava")
    if found is None:
        return "llava: not installed"
    folder = Path(found.submodule_search_locations[0])
    return f"llava: {folder} ({_revision(folder) or _release(folder) or 'of no known revision'})"


def _revision(folder: Path) -> str:
    """The git revision of a checkout whose package this is; "" for any other folder, in a repository or not."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True).stdout

    try:
        lines = git("rev-parse", "--show-toplevel", "HEAD").split()
    except OSError:  # no git
        return ""
    if len(lines) != 2 or Path(lines[0]) != folder.resolve().parent:
        return ""
    return f"revision {lines[1]}" + (", changed" if git("status", "--porcelain", "--", ".") else "")


def _release(folder: Path) -> str:
    return " ".join(p.name.removesuffix(".dist-info") for p in folder.parent.glob("llava[_-]torch-*.dist-info"))
