"""The imports that the hosts' commands make, tried before a run makes them.

Run as a module (`python -m llava_patch.tools.doctor.imports NAME ...`), in a process of its own, because importing a
training script has effects: imports each module and then what its functions would import later, and prints what failed
as JSON. An import inside a function whose package is not installed belongs to a feature that nobody uses here; one
whose package is there but no longer has that module or name would end a run in the middle.
"""

import ast
import importlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

TRIED = {
    "training": (
        "llava.train.train", "llava.train.llava_trainer", "llava.model.builder", "llava.model.llava_arch",
        "llava.model.language_model.llava_llama", "llava.mm_utils", "deepspeed", "peft",
    ),
    "lmms-eval": (
        "lmms_eval.__main__", "lmms_eval.evaluator", "lmms_eval.tasks", "lmms_eval.api.task", "lmms_eval.utils",
        "lmms_eval.models.simple.llava_hf", "lmms_eval.models.llava_hf",
    ),
}  # fmt: skip
"""Modules that a training or an evaluation command goes through; those that are not installed are left out."""


def failures(names: list[str]) -> list[dict[str, str]]:
    """What of these modules (missing ones are left out), and of what they import later, cannot be imported.

    Each failure has "where" (module, or module:line), "error" (type and first line) and "module" (what was asked for).
    """
    found: dict[str, dict[str, str]] = {}

    def note(where: str, error: BaseException, module: str) -> None:
        text = (traceback.format_exception_only(type(error), error)[-1].strip().splitlines() or [""])[0]
        found.setdefault(text, {"where": where, "error": text, "module": module})

    for name in names:
        try:
            if importlib.util.find_spec(name) is None:
                continue
        except Exception as error:  # a parent package that this version lacks, or that fails while it is imported
            if not (isinstance(error, ModuleNotFoundError) and error.name and name.startswith(error.name)):
                note(name, error, name)
            continue
        try:
            module = importlib.import_module(name)
        except BaseException as error:  # whatever a host raises, or its exit
            note(name, error, (error.name if isinstance(error, ImportError) else None) or name)
            continue
        for line, wanted, attribute in later_imports(Path(str(module.__file__)), module.__package__ or ""):
            missing = _try(wanted, attribute)
            if missing is not None:
                note(f"{name}:{line}", missing, wanted)
    return list(found.values())


def later_imports(path: Path, package: str) -> Iterator[tuple[int, str, str]]:
    """The imports inside a file's functions: (line, module, name to take from it or "").

    Those inside a `try` are left out: whoever wrote them expects them to fail.
    """

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[int, str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Try):
                continue
            deeper = inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            if inside and isinstance(child, ast.Import):
                yield from ((child.lineno, alias.name, "") for alias in child.names)
            elif inside and isinstance(child, ast.ImportFrom):
                module = importlib.util.resolve_name("." * child.level + (child.module or ""), package)
                yield from ((child.lineno, module, alias.name) for alias in child.names)
            yield from walk(child, deeper)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


def _try(module: str, attribute: str) -> BaseException | None:
    """Import a module, and a name of it; the error, or None also where the whole package is not installed."""
    top = module.partition(".")[0]
    try:
        if importlib.util.find_spec(top) is None:
            return None
        loaded = importlib.import_module(module)
        if attribute not in ("", "*") and not hasattr(loaded, attribute):
            importlib.import_module(f"{module}.{attribute}")
    except ModuleNotFoundError as error:
        absent = (error.name or "").partition(".")[0]
        return None if absent and absent != top and importlib.util.find_spec(absent) is None else error
    except BaseException as error:  # as above
        return error
    return None


if __name__ == "__main__":
    print("\n" + json.dumps(failures(sys.argv[1:])), flush=True)  # last, behind whatever the modules print themselves
