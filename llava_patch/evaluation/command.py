"""The lmms-eval command that this process runs: whether llava_patch takes part in it, and whether it did its work.

lmms-eval's command line prints any exception that ends an evaluation and exits with 0, and what swallows one inside it
looks like a success. So an absence of exceptions proves nothing here; what counts is what was to come out: for every
evaluation of the command a table with every task in it, and its results file. That is looked for when the process ends,
the one place that lies around all of lmms-eval however it was started. What llava_patch takes part in is read from the
arguments. Commands that it takes no part in end as lmms-eval ends them.

Nothing heavy is imported here: this module is loaded before lmms-eval's own.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import fnmatch
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PROGRAM, MODULE = "lmms-eval", "lmms_eval"
OUTPUT_TYPE = "llava_patch_"  # how the output types of our tasks begin
_LISTS = ("list", "list_groups", "list_tags", "list_subtasks")
_NO_EVALUATION = {"-h", "--help", "--tui", "--power-analysis"}

_current: "Command | None" = None


class Command:
    """One command.

    Attributes:
        line: what was typed, for messages.
        words: its arguments, our flags among them.
        ours: whether a patched model or a task of ours was seen in it; its arguments count besides.
        error: what ended an evaluation of it.
        results: of the evaluations that ended well, in order; None on ranks that are given none.
    """

    def __init__(self, line: str, words: Sequence[str]) -> None:
        self.line, self.words, self.ours = line, list(words), False
        self.error: Exception | None = None
        self.results: list[dict[str, Any] | None] = []
        self.started, self.process = time.time(), os.getpid()

    def involves_us(self) -> bool:
        """Whether a patch is configured, or a task of ours or a checkpoint that carries a patch asked for."""
        if not self.ours:
            asked = evaluations(self.words)
            self.ours = bool(asked) and (_configured(self.words, asked) or any(map(_names_us, asked)))
        return self.ours

    def why_failed(self) -> str | None:
        """What went wrong, in one line; None when all that was asked for is there."""
        if self.error is not None:
            return f"{type(self.error).__name__}: {' '.join(str(self.error).split())}"
        asked = evaluations(self.words)
        if len(self.results) < len(asked):
            tasks = ", ".join(str(one.get("tasks") or "no task") for one in asked[len(self.results) :])
            return f"no table of results came out for {tasks}; the reason stands above"
        for one, results in zip(asked, self.results, strict=False):
            if results is not None:
                missing = _missing(results, one.get("output_path"), self.started)
                if missing:
                    return missing
        return None


def watch() -> None:
    """Look at the command that this process runs when it ends; called when lmms-eval's package is imported."""
    program = _program()
    if program is not None and _current is None:
        _begin(program)


def involves_us() -> bool:
    """Whether this process runs an lmms-eval command that llava_patch takes part in."""
    return _current is not None and _current.involves_us()


def seen() -> None:
    """A patched model, or a task of ours, is being evaluated."""
    if _current is not None:
        _current.ours = True


def failed(error: Exception) -> None:
    """An evaluation that llava_patch takes part in was ended by an exception, which the command line will swallow."""
    current = _current or _begin(Path(sys.argv[0]).name)
    current.ours, current.error = True, error


def finished(results: dict[str, Any] | None) -> None:
    """An evaluation ended well."""
    if _current is not None and not any(results is not None and results is other for other in _current.results):
        _current.results.append(results)


def _begin(program: str) -> Command:
    global _current
    words = sys.argv[1:]
    _current = Command(shlex.join([*program.split(), *words]), words)
    atexit.register(_at_exit)
    return _current


def _program() -> str | None:
    """How lmms-eval's command was started; None for another program that imports lmms-eval."""
    words, script = sys.orig_argv, Path(sys.argv[0])
    if "--multiprocessing-fork" in words:  # a worker has the arguments of the process that spawned it
        return None
    if script.stem in (PROGRAM, MODULE):
        return PROGRAM
    # While `python -m` looks for the module its name is not in sys.argv yet.
    located = script.name == "-m" and {MODULE, f"{MODULE}.__main__", f"-m{MODULE}"} & set(words)
    return f"python -m {MODULE}" if located or script.parts[-2:] == (MODULE, "__main__.py") else None


def _at_exit() -> None:
    command = _current
    if command is None or os.getpid() != command.process or not command.involves_us():
        return
    why = command.why_failed()
    if why is not None:
        _end(f"llava_patch: this evaluation failed: {why}; the command was: {command.line}")


def _end(message: str) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    print(message, file=sys.stderr, flush=True)
    if getattr(sys, "last_type", None) is None:  # else the exception that ended Python gives the exit status
        os._exit(1)  # too late for any other way; what else was to run at exit has run


# --- what was asked for -----------------------------------------------------------------------------------------------


def evaluations(words: Sequence[str]) -> list[dict[str, Any]]:
    """The evaluations that lmms-eval's arguments ask for, one a configuration in `--config`; none for its other jobs.

    Args:
        words: the arguments.

    Returns:
        Of each what matters here, where it is given: `tasks`, `model_args`, `include_path`, `output_path`, `env`.
    """
    words = words[1:] if words[:1] == ["eval"] else words
    if not words or not words[0].startswith("-") or _NO_EVALUATION & set(words):
        return []
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    # --model: else it would be taken for an abbreviation
    for name in ("config", "model", "tasks", "model_args", "include_path", "output_path"):
        parser.add_argument(f"--{name}")
    try:
        options = {k: v for k, v in vars(parser.parse_known_args(words)[0]).items() if v is not None}
    except argparse.ArgumentError:
        return []  # nothing that lmms-eval could parse: it says so and exits with 2
    listed = [{**given, **options} for given in _configurations(options.pop("config", None))]
    return [one for one in listed if one.get("tasks") not in _LISTS]


def _configurations(path: str | None) -> list[dict[str, Any]]:
    if path is None:
        return [{}]
    read = _read_yaml(Path(path))
    return [one for one in (read if isinstance(read, list) else [read]) if isinstance(one, dict)] or [{}]


def _configured(words: Sequence[str], asked: Sequence[dict[str, Any]]) -> bool:
    from llava_patch import startup

    variables = (startup.FILE_VARIABLE, startup.PARAM_VARIABLE)
    values = [os.environ.get(name) for name in variables]
    values += [env.get(name) for one in asked if isinstance(env := one.get("env"), dict) for name in variables]
    flags = {word.partition("=")[0] for word in words} & {startup.FILE_FLAG, startup.PARAM_FLAG}
    return bool(flags) or any(value and str(value).strip(" ;") for value in values)


def _names_us(one: dict[str, Any]) -> bool:
    return _asks_for_ours(one.get("tasks"), one.get("include_path")) or _carries_patch(one.get("model_args"))


def _asks_for_ours(tasks: Any, include_path: Any) -> bool:
    from llava_patch.resources import eval_tasks_dir

    wanted = str(tasks or "").split(",")
    folders = [eval_tasks_dir(), *([Path(str(include_path))] if include_path else [])]
    files = [Path(name) for name in wanted if name.endswith(".yaml") or os.path.isdir(name)]  # tasks given by path
    names, members = set(), {}
    for path in _yaml_files([*folders, *files]):
        config = _task_config(path)
        name = config.get("task")
        if str(config.get("output_type")).startswith(OUTPUT_TYPE):
            if any(given == path or given in path.parents for given in files):
                return True
            names.add(name)
        elif "group" in config:
            members[config["group"]] = name if isinstance(name, list) else [name]
    while grown := {group for group, inside in members.items() if group not in names and names & _hashable(inside)}:
        names |= grown
    return any(fnmatch.fnmatch(str(name), pattern) for name in names for pattern in wanted)


def _hashable(inside: list[Any]) -> set[str]:
    return {str(one.get("task") or one.get("group")) if isinstance(one, dict) else str(one) for one in inside}


def _yaml_files(places: Sequence[Path]) -> Iterator[Path]:
    for place in places:
        yield from sorted(place.rglob("*.yaml")) if place.is_dir() else [place]


def _task_config(path: Path, depth: int = 0) -> dict[str, Any]:
    """A task's YAML with what it includes, without its functions."""
    own = _read_yaml(path)
    if not isinstance(own, dict):
        return {}
    above = own.get("include") or []
    merged: dict[str, Any] = {}
    for name in [above] if isinstance(above, str) else above:
        if depth < 10:
            merged |= _task_config(path.parent / str(name), depth + 1)
    return merged | own


def _read_yaml(path: Path) -> Any:
    """What a YAML file holds; None for one that cannot be read, of which lmms-eval complains itself."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)  # functions, which are not needed here
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None


def _carries_patch(model_args: Any) -> bool:
    """Whether a checkpoint that the model's arguments name is patched: in its config, or as an adapter."""
    if isinstance(model_args, dict):
        values = list(model_args.values())
    else:
        values = [pair.partition("=")[2] for pair in str(model_args or "").split(",")]
    return any(isinstance(value, str) and value and _is_patched(value) for value in values)


def _is_patched(checkpoint: str) -> bool:
    from llava_patch.records import CONFIG_KEY, SETTINGS_FILE

    if _find(checkpoint, SETTINGS_FILE) is not None:
        return True
    config = _find(checkpoint, "config.json")
    try:
        return config is not None and CONFIG_KEY in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _find(checkpoint: str, name: str) -> Path | None:
    """A file of a checkpoint, in its folder or in the hub's cache; None where it has none."""
    if os.path.isdir(checkpoint):
        path = Path(checkpoint, name)
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(checkpoint, name)
    except ValueError:  # no name of a repository
        return None
    return Path(cached) if isinstance(cached, str) else None


# --- what came out ----------------------------------------------------------------------------------------------------


def _missing(results: dict[str, Any], output_path: Any, since: float) -> str | None:
    """What is not there of one evaluation's results, in the table or in the file; None when nothing is missing."""
    tasks = list(results.get("configs") or results["results"])
    empty = [name for name in tasks if not has_metrics(results["results"].get(name))]
    if not tasks or empty:
        return f"the table has no result for {', '.join(empty) or 'any task'}"
    if not output_path:
        return None
    place = Path(str(output_path))
    place = place if place.is_dir() else place.parent
    written = [path for path in place.rglob("*results.json") if path.stat().st_mtime >= since - 2]
    if not any(set(tasks) <= set(_tasks_in(path)) for path in written):
        return f"no results file with {', '.join(tasks)} was written below {output_path}"
    return None


def has_metrics(row: Any) -> bool:
    """Whether one task's row of lmms-eval's results holds a metric, be it one without a number (N/A)."""
    return isinstance(row, dict) and any(key.strip() not in ("", "alias") and "_stderr" not in key for key in row)


def _tasks_in(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["results"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}
