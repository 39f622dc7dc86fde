"""The lmms-eval command that this process runs: whether llava_patch takes part in it, and whether it did its work.

lmms-eval's command line prints any exception that ends an evaluation and exits with 0. So an absence of exceptions
proves nothing here; what counts is what was to come out: for every evaluation of the command a table with every task in
it, and its results file. That is looked for when `cli_evaluate` returns and, where that could not be wrapped, when the
process ends. Commands that llava_patch takes no part in, by their arguments, end as lmms-eval ends them, also when
something in here fails. Nothing heavy is imported here: this module is loaded before lmms-eval's own.
"""

import atexit
import contextlib
import functools
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_patch.core.errors import LlavaPatchError
from llava_patch.integrations.lmms_eval import asked as asked_for

PROGRAM, MODULE = "lmms-eval", "lmms_eval"

_current: "Command | None" = None


class EvaluationFailure(LlavaPatchError):
    """An evaluation that llava_patch takes part in failed; where there is a cause it is chained."""


@dataclass(eq=False)
class Evaluation:
    """One evaluation of a command."""

    asked: dict[str, Any]  # as `asked.evaluations` gives it
    arguments: Any = None  # lmms-eval's parsed ones, by which it is known again
    outcome: dict[str, Any] | Exception | None = None  # None before it ended, and on ranks that are given no results
    complete: bool = False  # whether lmms-eval has come to the end of it
    before: frozenset[Any] = frozenset()  # the results files that were there when it began

    def why_failed(self) -> str | None:
        """What went wrong, in one line; None when all that was asked for is there."""
        if isinstance(self.outcome, Exception):
            return _in_words(self.outcome)
        if not self.complete:
            tasks = ",".join(asked_for.wanted_tasks(self.asked.get("tasks"))) or "no task"
            return f"no table of results came out for {tasks}; the reason stands above"
        return None if self.outcome is None else _missing(self.outcome, self.asked.get("output_path"), self.before)


@dataclass(eq=False)
class Command:
    """One command."""

    line: str  # what was typed, for messages
    words: Sequence[str]  # its arguments, our flags among them
    given: dict[str, Any] = field(default_factory=dict)  # arguments that a program hands over besides
    ours: bool = False  # whether a patched model or a task of ours was seen in it; its arguments count besides
    doubt: Exception | None = None  # what failed in here, so that it is not known whether llava_patch takes part
    told: bool = False  # whether its end was looked at
    process: int = field(default_factory=os.getpid)

    @functools.cached_property
    def evaluations(self) -> list[Evaluation]:
        """Its evaluations, in order."""
        return [Evaluation(one) for one in asked_for.evaluations(self.words, self.given)]

    @contextlib.contextmanager
    def doubting(self) -> Iterator[None]:
        """Inside the block nothing raises: no fault of ours may end an evaluation."""
        try:
            yield
        except Exception as error:
            self.doubt = self.doubt or error

    def asks(self) -> bool:
        """Whether it asks for any evaluation, as far as can be told."""
        with self.doubting():
            return bool(self.evaluations)
        return True

    def involves_us(self) -> bool:
        """Whether a patch is configured, or a task of ours or a checkpoint that carries a patch asked for."""
        with self.doubting():
            self.ours = self.ours or asked_for.involves_us(self.words, [one.asked for one in self.evaluations])
        return self.ours

    def began(self, arguments: Any) -> None:
        """An evaluation begins, with these parsed arguments; maybe once more, and what came of it no longer counts."""
        with self.doubting():
            for one in self._evaluation(arguments):
                one.arguments, one.outcome, one.complete = arguments, None, False
                one.before = _results_files(one.asked.get("output_path"))

    def ended(self, arguments: Any, outcome: dict[str, Any] | Exception | None, complete: bool = False) -> None:
        """An evaluation ended, with results or an exception, and complete if lmms-eval has nothing left to do in it."""
        with self.doubting():
            for one in self._evaluation(arguments):
                one.outcome, one.complete = outcome, complete

    def printed(self, results: dict[str, Any]) -> None:
        """lmms-eval prints the table of results, the last thing that it does with them."""
        with self.doubting():
            for one in self.evaluations:
                one.complete |= one.outcome is results

    def _evaluation(self, arguments: Any) -> list[Evaluation]:
        """The evaluation that has these parsed arguments; where several look alike, the first that has not run."""
        if len(self.evaluations) == 1:
            return self.evaluations
        known = [one for one in self.evaluations if arguments is not None and one.arguments is arguments]
        told = {name: getattr(arguments, name, None) for name in ("model", "tasks", "model_args", "output_path")}
        fresh = [one for one in self.evaluations if one.arguments is None]
        return known or [one for one in fresh if all(one.asked.get(k, v) == v for k, v in told.items())][:1]

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


def current() -> Command:
    """The command that this process runs; one that asks for nothing where there is none."""
    return _current or Command("", ())


def watch() -> None:
    """Look at the command that this process runs when it ends; called when lmms-eval's package is imported."""
    global _current
    program = _program()
    if program is not None and _current is None:
        _current = Command(_line(*program.split()), sys.argv[1:])
        atexit.register(_at_exit)


@contextlib.contextmanager
def called(arguments: Any = None) -> Iterator[None]:
    """Around lmms-eval's `cli_evaluate`, called by its command or by a program, which may give it parsed arguments.

    SystemExit: the command failed; EvaluationFailure: the evaluation of another program did.
    """
    global _current
    outer = run = _current
    if run is None or not run.asks():  # lmms-eval's wizard writes the arguments while it runs
        run = Command(_line(Path(sys.argv[0]).name), sys.argv[1:], dict(vars(arguments)) if arguments else {})
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
    message = None if command is None or command.told or os.getpid() != command.process else command.failure()
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


# --- what came out ----------------------------------------------------------------------------------------------------


def _missing(results: dict[str, Any], output_path: Any, before: frozenset[Any]) -> str | None:
    """What is not there of one evaluation's results, in the table or in the file; None when nothing is missing."""

    def has_metrics(row: Any) -> bool:  # one of them may be without a number (N/A)
        return isinstance(row, dict) and any(key.strip() not in ("", "alias") and "_stderr" not in key for key in row)

    tasks = list(results.get("configs") or results["results"])
    empty = [name for name in tasks if not has_metrics(results["results"].get(name))]
    if not tasks or empty:
        return f"the table has no result for {', '.join(empty) or 'any task'}"
    written = [path for path, *_ in _results_files(output_path) - before]
    if output_path and not any(set(tasks) <= _tasks_in(path) for path in written):
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


def _tasks_in(path: Path) -> set[str]:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return set(json.loads(path.read_text(encoding="utf-8"))["results"])
    return set()
