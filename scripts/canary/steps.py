"""One step after the other; none stops the canary."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

OK, FAILED, SKIPPED = "ok", "failed", "skipped"


class CommandError(Exception):
    """A command ended badly; the message is the last line that it said."""


class Steps:
    """What was tried in one environment, in order.

    Args:
        log: file that gets everything the commands print.
    """

    def __init__(self, log: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        self._log = log

    def run(self, name: str, action: Callable[[], Any]) -> Any:
        """Do one thing and note how it ended.

        Returns:
            What it returns; None where it failed.
        """
        print(f"   {name} ...", flush=True)
        started = time.time()
        try:
            found = action()
        except Exception as error:  # whatever it is, the others are still worth knowing
            self.add(name, FAILED, f"{_kind(error)}{last_line(str(error))}", time.time() - started)
            return None
        self.add(name, OK, found if isinstance(found, str) else "", time.time() - started)
        return found

    def add(self, name: str, state: str, said: str = "", seconds: float = 0.0) -> None:
        """Note a step; where the environment lay says nothing."""
        said = said.replace(f"{self._log.parent}/", "")
        self.rows.append({"step": name, "state": state, "said": said, "seconds": round(seconds, 1)})
        print(f"   {name}: {state}{': ' * bool(said)}{said}", flush=True)

    def failed(self) -> bool:
        """Whether one of them did."""
        return any(row["state"] == FAILED for row in self.rows)

    def command(self, words: list[Any], cwd: Path, env: Mapping[str, str], timeout: float = 1800) -> str:
        """Run a command and return what it printed.

        Raises:
            CommandError: it ended badly, with its last line.
        """
        done = subprocess.run(
            list(map(str, words)), cwd=cwd, env=dict(env), capture_output=True, text=True, timeout=timeout, check=False
        )
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(map(str, words))}\n{done.stdout}{done.stderr}\n")
        if done.returncode != 0:
            raise CommandError(last_line(done.stderr) or last_line(done.stdout) or f"exit status {done.returncode}")
        return done.stdout


def last_line(text: str) -> str:
    """The last error that a text names, or else its last line that says something; short enough for a table."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line) and "it/s]" not in line]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or [""])[-1][:200]


def _kind(error: Exception) -> str:
    return "" if isinstance(error, CommandError) else f"{type(error).__name__}: "
