"""The lmms-eval command that this process runs: whether llava_patch takes part in it, and whether it did its work.

lmms-eval's command line prints any exception that ends an evaluation and exits with 0, and what swallows one inside it
looks like a success. So an absence of exceptions proves nothing here; what counts is what was to come out: for every
evaluation of the command a table with every task in it, and its results file. That is looked for when `cli_evaluate`
returns and, where that could not be wrapped, when the process ends. What llava_patch takes part in is read from the
arguments. Commands that it takes no part in end as lmms-eval ends them, also when something in here fails.

Nothing heavy is imported here: this module is loaded before lmms-eval's own.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import fnmatch
import functools
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_patch.core.errors import LlavaPatchError

PROGRAM, MODULE = "lmms-eval", "lmms_eval"
OUTPUT_TYPE = "llava_patch_"  # how the output types of our tasks begin
_LISTS = ("list", "list_groups", "list_tags", "list_subtasks")
_NO_EVALUATION = {"-h", "--help", "--tui", "--power-analysis"}
_OPTIONS = ("config", "model", "tasks", "model_args", "include_path", "output_path")

_current: "Command | None" = None


class EvaluationFailure(LlavaPatchError):
    """An evaluation that llava_patch takes part in failed; where there is a cause it is chained."""


class Evaluation:
    """One evaluation of a command.

    Attributes:
        asked: what was asked for, as `evaluations` gives it.
        arguments: lmms-eval's parsed arguments, by which it is known again.
        outcome: its results, or the exception that ended it; None before, and on ranks that are given none.
        complete: whether lmms-eval has come to the end of it.
        before: the results files that were there when it began.
    """

    def __init__(self, asked: dict[str, Any]) -> None:
        self.asked, self.arguments = asked, None
        self.outcome: dict[str, Any] | Exception | None = None
        self.complete, self.before = False, frozenset[Any]()

    def begin(self, arguments: Any) -> None:
        """It runs, maybe once more: what came of it before no longer counts."""
        self.arguments, self.outcome, self.complete = arguments, None, False
        self.before = _results_files(self.asked.get("output_path"))

    def looks_like(self, arguments: Any) -> bool:
        """Whether parsed arguments may be this evaluation's."""
        names = {"model", "tasks", "model_args", "output_path"} & set(self.asked)
        return all(getattr(arguments, name, None) == self.asked[name] for name in names)

    def why_failed(self) -> str | None:
        """What went wrong, in one line; None when all that was asked for is there."""
        if isinstance(self.outcome, Exception):
            return _in_words(self.outcome)
        if not self.complete:
            tasks = ",".join(_wanted(self.asked.get("tasks"))) or "no task"
            return f"no table of results came out for {tasks}; the reason stands above"
        return None if self.outcome is None else _missing(self.outcome, self.asked.get("output_path"), self.before)


class Command:
    """One command.

    Attributes:
        line: what was typed, for messages.
        words: its arguments, our flags among them.
        given: arguments that a program hands over besides.
        ours: whether a patched model or a task of ours was seen in it; its arguments count besides.
        doubt: what failed in here, so that it is not known whether llava_patch takes part.
        told: whether its end was looked at.
    """

    def __init__(self, line: str, words: Sequence[str], given: dict[str, Any] | None = None) -> None:
        self.line, self.words, self.given = line, list(words), given or {}
        self.ours, self.told, self.process = False, False, os.getpid()
        self.doubt: Exception | None = None

    @functools.cached_property
    def evaluations(self) -> list[Evaluation]:
        """Its evaluations, in order."""
        return [Evaluation(one) for one in evaluations(self.words, self.given)]

    @contextlib.contextmanager
    def doubting(self) -> Iterator[None]:
        """Inside the block nothing raises: no fault of ours may end an evaluation."""
        try:
            yield
        except Exception as error:
            self.doubt = self.doubt or error

    def asks(self) -> bool:
        """Whether it asks for any evaluation, as far as can be told."""
        found = True
        with self.doubting():
            found = bool(self.evaluations)
        return found

    def involves_us(self) -> bool:
        """Whether a patch is configured, or a task of ours or a checkpoint that carries a patch asked for."""
        if not self.ours:
            with self.doubting():
                asked = [one.asked for one in self.evaluations]
                self.ours = bool(asked) and (_configured(self.words, asked) or any(map(_names_us, asked)))
        return self.ours

    def evaluation(self, arguments: Any) -> Evaluation | None:
        """The evaluation that has these parsed arguments; where several look alike, the first that has not run."""
        if len(self.evaluations) == 1:
            return self.evaluations[0]
        known = [one for one in self.evaluations if arguments is not None and one.arguments is arguments]
        alike = (one for one in self.evaluations if one.arguments is None and one.looks_like(arguments))
        return known[0] if known else next(alike, None)

    def why_failed(self) -> str | None:
        """What went wrong, in one line; None when all that was asked for is there."""
        return "; ".join(why for one in self.evaluations if (why := one.why_failed()) is not None) or None

    def failure(self) -> str | None:
        """The message about a command that failed; None for others and where llava_patch takes no part."""
        self.told = True
        involved = self.involves_us()
        if not involved and self.doubt is None:
            return None
        try:
            why = self.why_failed()
        except Exception as error:
            why = f"what came out of it cannot be told ({_in_words(error)})"
        if why is not None and not involved and self.doubt is not None:
            why = f"{why}; nor can it be told whether llava_patch takes part ({_in_words(self.doubt)})"
        return why and f"llava_patch: this evaluation failed: {why}; the command was: {self.line}"


def watch() -> None:
    """Look at the command that this process runs when it ends; called when lmms-eval's package is imported."""
    global _current
    program = _program()
    if program is not None and _current is None:
        _current = Command(_line(*program.split()), sys.argv[1:])
        atexit.register(_at_exit)


@contextlib.contextmanager
def called(arguments: Any = None) -> Iterator[None]:
    """Around lmms-eval's `cli_evaluate`, called by its command or by a program of one's own.

    Args:
        arguments: the parsed arguments that a program may give it.

    Raises:
        SystemExit: the command failed.
        EvaluationFailure: the evaluation of another program failed.
    """
    global _current
    outer = run = _current
    if run is None or not run.asks():  # lmms-eval's wizard writes the arguments while it runs
        run = Command(_line(Path(sys.argv[0]).name), sys.argv[1:], vars(arguments) if arguments else None)
    _current, ended = run, None
    try:
        try:
            yield
        except SystemExit as end:
            if end.code:
                raise  # a failure that lmms-eval tells itself
            ended = end
        message = run.failure()
        if message is not None:
            _flush()
            raise EvaluationFailure(message) if outer is None else SystemExit(message)
        if ended is not None:
            raise ended
    finally:
        _current = outer


def involves_us() -> bool:
    """Whether this process runs an lmms-eval command that llava_patch takes part in."""
    return _current is not None and _current.involves_us()


def seen() -> None:
    """A patched model, or a task of ours, is being evaluated."""
    if _current is not None:
        _current.ours = True


def doubted(error: Exception) -> None:
    """It cannot be told whether a model is patched or a task ours."""
    if _current is not None:
        _current.doubt = error


def began(arguments: Any) -> None:
    """An evaluation begins, with these parsed arguments."""
    if _current is not None:
        with _current.doubting():
            evaluation = _current.evaluation(arguments)
            if evaluation is not None:
                evaluation.begin(arguments)


def ended(arguments: Any, outcome: dict[str, Any] | Exception | None, complete: bool = False) -> None:
    """An evaluation ended, with results or an exception, and complete if lmms-eval has nothing left to do in it."""
    if _current is not None:
        with _current.doubting():
            evaluation = _current.evaluation(arguments)
            if evaluation is not None:
                evaluation.outcome, evaluation.complete = outcome, complete


def printed(results: dict[str, Any]) -> None:
    """lmms-eval prints the table of results, the last thing that it does with them."""
    if _current is not None:
        with _current.doubting():
            for evaluation in _current.evaluations:
                evaluation.complete |= evaluation.outcome is results


def _line(*program: str) -> str:
    return shlex.join([*program, *sys.argv[1:]])


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


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
    """The net behind `called`, for versions and installations in which that is not wrapped."""
    command = _current
    if command is None or command.told or os.getpid() != command.process:
        return
    message = command.failure()
    if message is None:
        return
    _flush()
    print(message, file=sys.stderr, flush=True)
    if getattr(sys, "last_type", None) is not KeyboardInterrupt:  # shells look for how such a process ended
        # Other handlers and open files come first: what `sys` holds goes when all modules are gone.
        sys._llava_patch_status = _Status()  # type: ignore[attr-defined]


class _Status:
    """Ends the process with exit status 1 when it is deleted."""

    def __del__(self, end: Any = os._exit) -> None:
        end(1)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


# --- what was asked for -----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(message)


def evaluations(words: Sequence[str], given: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The evaluations that lmms-eval's arguments ask for, one a configuration in `--config`; none for its other jobs.

    Args:
        words: the arguments.
        given: parsed arguments that count before them.

    Returns:
        Of each what matters here, where it is given: `tasks`, `model_args`, `include_path`, `output_path`, `env`.
    """
    words = words[1:] if words[:1] == ["eval"] else words
    if (not given and not words) or (words and not words[0].startswith("-")) or _NO_EVALUATION & set(words):
        return []
    parser = _Parser(add_help=False, exit_on_error=False)
    for name in _OPTIONS:  # --model: else it would be taken for an abbreviation
        parser.add_argument(f"--{name}")
    try:
        typed = vars(parser.parse_known_args(words)[0])
    except (argparse.ArgumentError, ValueError):
        return []  # nothing that lmms-eval could parse: it says so and exits with 2
    options = {k: v for k, v in {**typed, **(given or {})}.items() if k in _OPTIONS and v is not None}
    listed = [{**given, **options} for given in _configurations(options.pop("config", None))]
    return [one for one in listed if one.get("tasks") not in _LISTS]


def _configurations(path: str | None) -> list[dict[str, Any]]:
    if path is None:
        return [{}]
    read = _read_yaml(Path(path))
    return [one for one in (read if isinstance(read, list) else [read]) if isinstance(one, dict)] or [{}]


def _configured(words: Sequence[str], asked: Sequence[dict[str, Any]]) -> bool:
    from llava_patch.settings import active

    variables = (active.FILE_VARIABLE, active.PARAM_VARIABLE)
    values = [os.environ.get(name) for name in variables]
    values += [env.get(name) for one in asked if isinstance(env := one.get("env"), dict) for name in variables]
    flags = {word.partition("=")[0] for word in words} & {active.FILE_FLAG, active.PARAM_FLAG}
    return bool(flags) or any(active._flags) or any(value and str(value).strip(" ;") for value in values)


def _names_us(one: dict[str, Any]) -> bool:
    return _asks_for_ours(one.get("tasks"), one.get("include_path")) or _carries_patch(one.get("model_args"))


def _asks_for_ours(tasks: Any, include_path: Any) -> bool:
    from llava_patch.core.resources import eval_tasks_dir

    wanted = _wanted(tasks)
    given = {name: Path(name) for name in wanted if os.path.exists(name)}  # tasks given by path
    folders = [eval_tasks_dir(), *(Path(str(path)) for path in _listed(include_path)), *_plugin_folders()]
    ours: set[str] = set()
    groups: list[tuple[set[str], set[str]]] = []
    for path in dict.fromkeys(_yaml_files([*folders, *given.values()])):
        config = _task_config(path)
        names = {name for name, place in given.items() if place == path or place in path.parents}
        names |= _names([config.get("group"), config.get("tag")])
        if str(config.get("output_type")).startswith(OUTPUT_TYPE):
            ours |= names | _names(config.get("task"))
        elif isinstance(config.get("task"), list):
            groups.append((names, _names(config["task"])))
    while grown := [names for names, inside in groups if inside & ours and not names <= ours]:
        ours = ours.union(*grown)
    return any(name in ours or fnmatch.filter(ours, name) for name in wanted)


def _wanted(tasks: Any) -> list[str]:
    return [name.strip() for part in _listed(tasks) for name in str(part).split(",") if name.strip()]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _names(value: Any) -> set[str]:
    """The tasks, groups and tags that a part of a task's YAML names."""
    if isinstance(value, dict):
        return _names([value.get("task"), value.get("group")])
    if isinstance(value, list):
        return set().union(*map(_names, value))
    return set() if value is None else {str(value)}


def _plugin_folders() -> Iterator[Path]:
    for plugin in filter(None, os.environ.get("LMMS_EVAL_PLUGINS", "").split(",")):
        with contextlib.suppress(ImportError, ValueError):  # lmms-eval imports it and says so
            spec = importlib.util.find_spec(plugin)
            for folder in (spec and spec.submodule_search_locations) or ():
                yield Path(folder, "tasks")


def _yaml_files(places: Sequence[Path]) -> Iterator[Path]:
    for place in places:
        yield from sorted(place.rglob("*.yaml")) if place.is_dir() else [place]


def _task_config(path: Path, depth: int = 0) -> dict[str, Any]:
    """A task's YAML with what it includes, without its functions."""
    own = _read_yaml(path)
    if not isinstance(own, dict):
        return {}
    merged: dict[str, Any] = {}
    for name in map(str, reversed(_listed(own.get("include")))):  # the first one counts most
        if depth < 10:
            merged |= _task_config(Path(name) if os.path.isfile(name) else path.parent / name, depth + 1)
    return merged | own


def _read_yaml(path: Path) -> Any:
    """What a YAML file holds; None for one that cannot be read, of which lmms-eval complains itself."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    # Functions and Python's own types, which are not needed here.
    Loader.add_constructor(None, lambda loader, node: None)  # type: ignore[type-var]
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except Exception:  # whatever a constructor raises: ValueError for a date that there is not
        return None


def _carries_patch(model_args: Any) -> bool:
    """Whether a checkpoint that the model's arguments name is patched: in its config, or as an adapter."""
    if isinstance(model_args, dict):
        values = list(model_args.values())
    else:
        values = [pair.partition("=")[2] for pair in str(model_args or "").split(",")]
    return any(isinstance(value, str) and value and _is_patched(value) for value in values)


def _is_patched(checkpoint: str) -> bool:
    from llava_patch.core.records import CONFIG_KEY, SETTINGS_FILE

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


def _missing(results: dict[str, Any], output_path: Any, before: frozenset[Any]) -> str | None:
    """What is not there of one evaluation's results, in the table or in the file; None when nothing is missing."""
    tasks = list(results.get("configs") or results["results"])
    empty = [name for name in tasks if not has_metrics(results["results"].get(name))]
    if not tasks or empty:
        return f"the table has no result for {', '.join(empty) or 'any task'}"
    written = [path for path, *_ in _results_files(output_path) - before]
    if output_path and not any(set(tasks) <= set(_tasks_in(path)) for path in written):
        return f"no results file with {', '.join(tasks)} was written below {output_path}"
    return None


def _results_files(output_path: Any) -> frozenset[Any]:
    """The results files where lmms-eval puts them: in the folder of the path, or below it in one named by the model.

    With what tells a file that is written anew: no clock, as the files' server may have another.
    """
    found = set()
    for pattern in ("*results.json", "*/*results.json") if output_path else ():
        for path in Path(str(output_path)).glob(pattern):
            with contextlib.suppress(OSError):
                status = path.stat()
                found.add((path, status.st_mtime_ns, status.st_size))
    return frozenset(found)


def has_metrics(row: Any) -> bool:
    """Whether one task's row of lmms-eval's results holds a metric, be it one without a number (N/A)."""
    return isinstance(row, dict) and any(key.strip() not in ("", "alias") and "_stderr" not in key for key in row)


def _tasks_in(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["results"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}
