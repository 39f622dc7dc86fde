"""Optional packages: imported through one mechanism, and missed with one error before anything is done."""

import ast
import json
import subprocess
import sys

import pytest

from llava_patch.core import extras
from llava_patch.core.errors import MissingExtraError

from .project import ROOT, core, extra, module_of

HOSTS = {
    "llava",
    "lmms_eval",
    "peft",
    "deepspeed",
    "accelerate",
    "huggingface_hub",
    "yaml",
    "bitsandbytes",
    "tokenizers",
}
"""What llava_patch works on and what that brings: there when it is asked to, imported where it is used."""
INSIDE = {"lmms_eval": HOSTS | {"datasets"}, "llava": {"llava"}}
"""Files that a host imports may import that host, and what it needs itself, at their top."""
HOSTED = {"llava_patch/integrations/lmms_eval/tasks.py": "lmms_eval", "llava_patch/hosts/towers/llava.py": "llava"}

COMMANDS = {
    ("bench",): "matplotlib", ("sweep",): "matplotlib", ("saturation", "run"): "matplotlib",
    ("saturation", "compare"): "matplotlib", ("report",): "matplotlib and jinja2", ("fusion-attention",): "matplotlib",
    ("flops",): "matplotlib", ("drift",): "matplotlib", ("gradients", "run"): "matplotlib",
    ("gradients", "show"): "matplotlib", ("attention-maps",): "matplotlib", ("reach",): "matplotlib",
    ("rprobe", "preview"): "matplotlib", ("rprobe", "run"): "matplotlib and scipy",
    ("rprobe", "compare"): "matplotlib and scipy", ("rprobe", "correlate"): "matplotlib and scipy",
    ("correlate",): "matplotlib and scipy", ("evidence",): "matplotlib and jinja2 and scipy",
    ("demo",): "gradio",
}  # fmt: skip
CORE = {
    ("doctor",), ("inspect",), ("gin-files",), ("convert",), ("merge",), ("gradients", "table"), ("rprobe", "export"),
    ("rprobe", "store"),
}  # fmt: skip

HIDE = f"""
import importlib.machinery, json, sys
hidden = {sorted(extras.EXTRAS.values())}
class Hiding(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)
sys.meta_path[:] = [Hiding if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
from llava_patch.cli import main as cli
core = {CORE}
"""
EACH = """
import contextlib, io
import typer.main
def leaves(command, words=()):
    if not hasattr(command, "commands"):
        yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from leaves(inner, (*words, name))
def run(words):
    sys.argv, out, err = ["llava-patch", *words], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code
    return code, out.getvalue() + err.getvalue()
found = []
for words, command in leaves(typer.main.get_command(cli.app)):
    given = ["--output=x"] * any("--output" in p.opts and p.required for p in command.params)
    arguments = [p.required for p in command.params if p.param_type_name == "argument"]
    given += ["x"] * max(sum(arguments), bool(arguments))
    found.append([words, run([*words, "--help"]), None if words in core else run([*words, *given])])
heavy = [name for name in ("torch", "transformers") if name in sys.modules]
print(json.dumps({"found": found, "heavy": heavy}))
"""


def _imports(tree):
    """(node, module, inside a function) of every import that runs."""
    pending = [(child, False) for child in ast.iter_child_nodes(tree)]
    while pending:
        node, inside = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((node, name.name, inside) for name in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield node, node.module, inside
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        pending += [(child, inside) for child in ast.iter_child_nodes(node)]


def _sources():
    return {str(p.relative_to(ROOT)): ast.parse(p.read_text()) for p in sorted((ROOT / "llava_patch").rglob("*.py"))}


def test_every_import_is_of_the_core_or_a_host_or_goes_through_optional():
    allowed = {*sys.stdlib_module_names, "llava_patch", *map(module_of, core())}
    wrong, used = [], set()
    for path, tree in _sources().items():
        for node, module, inside in _imports(tree):
            root = module.partition(".")[0]
            host = (root in HOSTS and inside) or root in INSIDE.get(HOSTED.get(path, ""), ())
            if root not in allowed and not host:
                wrong.append(f"{path}:{node.lineno}: {module}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "optional":
                used.add(node.args[0].value.partition(".")[0])
    assert wrong == []
    assert used == set(extras.EXTRAS.values())


def test_what_a_host_imports_is_not_imported_at_the_start():
    for path, tree in _sources().items():
        modules = {module.replace(".", "/") + ".py" for _, module, inside in _imports(tree) if not inside}
        assert path in HOSTED or not modules & set(HOSTED), path


@pytest.mark.parametrize("name", extras.EXTRAS)
def test_each_optional_package_is_what_its_extra_brings(name):
    assert extras.EXTRAS[name] in map(module_of, extra(name))
    assert (extras.EXTRAS[name] in map(module_of, extra("all"))) == (name != "demo")  # a web server's packages
    assert extras.EXTRAS[name] not in map(module_of, core())


@pytest.fixture(scope="module")
def without_extras():
    done = subprocess.run([sys.executable, "-c", HIDE + EACH], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_command_is_known_here(without_extras):
    assert {tuple(words) for words, _, _ in without_extras["found"]} == CORE | set(COMMANDS)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_without_its_extra_says_what_to_type(words, without_extras):
    shown, ended = next((h, e) for found, h, e in without_extras["found"] if tuple(found) == words)
    assert shown[0] == 0 and "Usage: llava-patch" in shown[1]  # help needs nothing
    command = " ".join(words).removesuffix(" run").replace("rprobe correlate", "correlate")
    brings = {package: extra for extra, package in extras.EXTRAS.items()}
    line = ",".join(brings[package] for package in COMMANDS[words].split(" and "))
    assert ended == [1, f'llava-patch: {command} needs {COMMANDS[words]}: pip install "llava_patch[{line}]"\n']


def test_missing_extras_are_found_before_anything_is_loaded(without_extras):
    assert without_extras["heavy"] == []


@pytest.mark.parametrize("words", [["--help"], ["gin-files"], ["doctor", "--json"], ["inspect", "CKPT"]], ids=" ".join)
def test_the_core_alone_runs(words, tmp_path):
    from tests.support import models

    if words == ["inspect", "CKPT"]:
        models.hf_model().save_pretrained(tmp_path / "CKPT")
    code = f"{HIDE}\nsys.argv = ['llava-patch', *{words}]\ncli.main()"
    environment = [sys.executable, "-c", code]
    done = subprocess.run(environment, capture_output=True, text=True, cwd=tmp_path, env=_here())
    assert "Traceback" not in done.stderr, done.stderr
    if words[0] == "doctor":
        assert {row["what"] for row in json.loads(done.stdout)["rows"]} >= {"python", "torch", "host hf"}
    else:
        assert done.returncode == 0, done.stderr
        known = {"--help": "doctor", "gin-files": "dpvr_lf_7b.gin", "inspect": "none: a stock checkpoint"}
        assert known[words[0]] in done.stdout


def _here():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_the_library_says_the_same(monkeypatch):
    monkeypatch.setattr(extras.importlib, "import_module", _nothing_called("matplotlib"))
    with pytest.raises(MissingExtraError, match=r'^this needs matplotlib: pip install "llava_patch\[figures\]"$'):
        extras.optional("matplotlib.figure")
    monkeypatch.setattr(extras.importlib, "import_module", _nothing_called("kiwisolver"))
    with pytest.raises(ModuleNotFoundError, match="kiwisolver"):  # another fault: its own words
        extras.optional("matplotlib.figure")
    with pytest.raises(StopIteration):  # of no extra: a mistake of ours
        extras.optional("pandas")


def _nothing_called(name):
    def fail(module):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    return fail


def test_tasks_and_training_miss_theirs_before_they_start(monkeypatch):
    from llava_patch.integrations.lmms_eval.tasks import RProbeTask, task_class
    from llava_patch.integrations.training.gradients import follow

    monkeypatch.setattr(extras, "_there", lambda package: False)
    with pytest.raises(MissingExtraError, match="the lmms-eval task saturation needs matplotlib: pip install"):
        task_class("saturation")({"task": "saturation"})
    with pytest.raises(MissingExtraError, match="the lmms-eval task rprobe needs matplotlib and scipy"):
        RProbeTask({"task": "rprobe"})
    with pytest.raises(MissingExtraError, match="Gradients needs matplotlib"):
        follow(None)


def test_the_command_line_is_written_for_the_oldest_typer():
    """typer 0.9, of LLaVA's time, stops every command at an option of type `X | None`."""
    (need,) = [need for need in core() if need.name == "typer"]
    assert str(need.specifier) == ">=0.9"
    wrong = []
    for path, tree in _sources().items():
        if not any(module == "typer" for _, module, inside in _imports(tree) if not inside):
            continue
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            arguments = [*function.args.posonlyargs, *function.args.args]
            given = arguments[len(arguments) - len(function.args.defaults) :]
            wrong += [
                f"{path}:{argument.lineno}"
                for argument, default in zip(given, function.args.defaults, strict=True)
                if isinstance(default, ast.Call) and isinstance(argument.annotation, ast.BinOp)
            ]
    assert wrong == []
