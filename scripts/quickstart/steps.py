"""Runs steps that leave files, each at most once, and none of them for done that has not left what it was to leave."""

import hashlib
import json
import math
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from .fileset import write_atomically

TAIL = 15
console = Console()


class Lacking(Exception):
    """Something that a step was to leave is not there; the message says what."""


class Steps:
    """Runs the steps of one output folder, each at most once for the same inputs."""

    def __init__(self, out: Path, inputs: object) -> None:
        """Start.

        Args:
            out: the folder.
            inputs: JSON values; when they change every step is run again.
        """
        self.out = out
        self.key = json.dumps(inputs, sort_keys=True, default=str)
        self.started = time.time()
        self._did = ""
        make_folder(out / "logs")

    def run(
        self,
        name: str,
        title: str,
        work: Callable[[], None],
        makes: Sequence[Path],
        check: Callable[[], object] | None = None,
    ) -> None:
        """Run a step unless it is done, that is: unless it has run for the same inputs and what it left is there.

        Args:
            name: of its marker and log.
            title: shown to the user.
            work: does it, and raises when it fails.
            makes: files and folders that the step leaves, none of them empty.
            check: looks into them, and raises `Lacking` where something is not in them.

        Raises:
            SystemExit: the step failed or left too little; one message names it, what is missing and where to look.
        """
        marker = self.out / f"{name}.done"
        self.key = hashlib.sha256(f"{self.key} {name}".encode()).hexdigest()
        if marker.is_file() and marker.read_text() == self.key and lacking(makes, check) is None:
            console.print(f"[green]done before[/] {title}")
            return
        marker.unlink(missing_ok=True)
        start = time.time()
        self._did = ""
        console.print(f"[bold]{title}[/]")
        try:
            work()
        except Lacking as missing:  # what it needs of the steps before
            raise SystemExit(f"step {name} ({title}) cannot start: {missing}") from None
        missing = lacking(makes, check)
        if missing is not None:
            raise SystemExit(f"step {name} ({title}) ended without an error, but {missing}{self._did}")
        write_atomically(marker, self.key.encode())
        console.print(f"  [green]{time.time() - start:.0f} s[/] (in all {(time.time() - self.started) / 60:.1f} min)")

    def command(self, name: str, command: list[str], cwd: Path | None = None, **env: object) -> None:
        """Run a command with its output in logs/NAME.log and its last line on the screen.

        Raises:
            SystemExit: it failed; with the end of its output.
        """
        log = self.out / "logs" / f"{name}.log"
        self._did = f"; look into {log}, which this command wrote: {shlex.join(command)}"
        environment = {**os.environ, **{k: str(v) for k, v in env.items()}}
        with log.open("w") as stream, console.status("  starting") as status:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, env=environment,
                bufsize=1, errors="replace",
            )  # fmt: skip
            assert process.stdout is not None
            for line in process.stdout:
                stream.write(line)
                if line.strip():
                    status.update("  " + line.strip().split("\r")[-1][: console.width - 8].replace("[", r"\["))
            code = process.wait()
        if code != 0:
            tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-TAIL:])
            raise SystemExit(f"{name} failed (exit {code}): {shlex.join(command)}; the end of {log}:\n{tail}")

    def shown(self, command: list[str], cwd: Path | None = None) -> None:
        """Run a command that shows its own progress.

        Raises:
            SystemExit: it failed.
        """
        self._did = f"; this command was to leave it: {shlex.join(command)}"
        code = subprocess.run(command, cwd=cwd).returncode
        if code != 0:
            raise SystemExit(f"failed (exit {code}), see above: {shlex.join(command)}")


def make_folder(folder: Path) -> Path:
    """Make a folder to write into.

    Raises:
        SystemExit: that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"{folder}: nothing can be written there: {error.strerror}; name another folder") from error
    return folder


# --- what a step has left ---------------------------------------------------------------------------------------------


def lacking(makes: Sequence[Path], check: Callable[[], object] | None = None) -> str | None:
    """What is missing of that which a step leaves, in words; None when all is there.

    Args:
        makes: files and folders, none of them empty.
        check: as for `Steps.run`.
    """
    for path in makes:
        if not path.exists():
            return f"{path} is not there"
        if not (any(path.iterdir()) if path.is_dir() else path.stat().st_size):
            return f"{path} is empty"
    try:
        if check is not None:
            check()
    except Lacking as missing:
        return str(missing)
    return None


def found(folder: Path, pattern: str) -> Path:
    """The newest file of a pattern below a folder.

    Raises:
        Lacking: there is none, or it is empty.
    """
    paths = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not paths or not paths[-1].stat().st_size:
        raise Lacking(f"{folder} holds no {pattern}" + (" that is not empty" if paths else ""))
    return paths[-1]


def json_with(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object that has these keys.

    Raises:
        Lacking: no such file, no JSON, or a key that is not there.
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Lacking(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    missing = [key for key in keys if not isinstance(read, dict) or key not in read]
    if missing:
        raise Lacking(f"{path} has no {', '.join(missing)}")
    return read


def losses(run: Path, steps: int = 1) -> list[float]:
    """Training losses of a run of LLaVA's Trainer, one a step.

    Args:
        run: its output folder.
        steps: how many it must have logged at least.

    Raises:
        Lacking: fewer, or one that is not finite.
    """
    path = run / "trainer_state.json"
    history = json_with(path, "log_history")["log_history"]
    values = [entry["loss"] for entry in history if "loss" in entry]
    if len(values) < steps:
        raise Lacking(f"{path} has the losses of {len(values)} steps, not of {steps}")
    if not all(map(math.isfinite, values)):
        raise Lacking(f"{path} has a loss that is not finite: {next(v for v in values if not math.isfinite(v))}")
    return values


def lmms_results(folder: Path, tasks: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Metrics of an lmms-eval run, by task.

    Args:
        folder: its --output_path.
        tasks: those that must have a metric.

    Raises:
        Lacking: no results file, or a task without a metric in it.
    """
    path = found(folder, "**/*_results.json")
    results = json_with(path, "results")["results"]
    for task in tasks:
        if not any("_stderr" not in key and key.strip() not in ("", "alias") for key in results.get(task) or {}):
            raise Lacking(f"{path} has no result of {task}")
    return results


def metric(results: dict[str, dict[str, Any]], task: str, name: str) -> float:
    """One metric, whatever filter lmms-eval has appended to its name; nan when a task reports none.

    Raises:
        Lacking: the task or the metric is not in the results.
    """
    for key, value in results.get(task, {}).items():
        if key.split(",")[0] == name:
            return float(value) if isinstance(value, (int, float)) else math.nan
    raise Lacking(f"the results have no {name} of {task}; they have {sorted(results.get(task, results))}")
