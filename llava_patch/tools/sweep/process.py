"""Runs one command of a sweep: output into a log, no second command in the same folder, nothing left running."""

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from llava_patch.core.errors import BusyError, RunError, brief
from llava_patch.core.files import storage_errors
from llava_patch.core.locks import is_of

_LOCK = ".lock"
TAIL_LINES = 15
GRACE_SECONDS = 20


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[int]:
    """Hold a folder for one run; yields the descriptor of a locked file, for the command to inherit.

    So the lock lasts as long as the command, though the sweep was killed, and none is started beside it. The file is
    taken away when nobody holds it any more. BusyError: such a command still runs.
    """
    with storage_errors(folder / _LOCK):
        folder.mkdir(parents=True, exist_ok=True)
    descriptor = _locked(folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
        with contextlib.suppress(BusyError, OSError):  # opened anew: a worker that is left holds the old one
            last = _locked(folder)
            (folder / _LOCK).unlink()
            os.close(last)


def _locked(folder: Path) -> int:
    """The descriptor of the folder's file, locked; BusyError: somebody else holds it."""
    while True:
        with storage_errors(folder / _LOCK):
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(descriptor, folder)
        except BaseException:
            os.close(descriptor)
            raise
        if is_of(descriptor, folder / _LOCK):  # else its last holder has just taken the file away
            return descriptor
        os.close(descriptor)


def check_free(folder: Path) -> None:
    """Refuse a folder in which a command still runs that a sweep has started (BusyError)."""
    with contextlib.suppress(FileNotFoundError), storage_errors(folder / _LOCK):
        descriptor = os.open(folder / _LOCK, os.O_RDWR)
        try:
            _take(descriptor, folder)
        finally:
            os.close(descriptor)


def _take(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BusyError(
            f"{folder}: a command that an earlier sweep started still runs there: wait for it, or end it"
        ) from error


def execute(command: Sequence[str], log: Path, descriptor: int) -> None:
    """Run a command to its end; its output is appended to `log`."""
    with storage_errors(log), log.open("ab") as stream:
        stream.write(f"$ {shlex.join(command)}\n".encode())
        stream.flush()
        start = stream.tell()
        # A session of its own: launchers start workers, and all of them are to end with the sweep.
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True,
                pass_fds=(descriptor,),
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise RunError(f"{command[0]}: cannot be started ({brief(error)})") from error
        try:
            code = process.wait()
        finally:
            for sign in (signal.SIGTERM, signal.SIGKILL) if process.poll() is None else ():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, sign)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS)
                    break
    if code != 0:
        how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
        with log.open("rb") as written:
            written.seek(max(start, os.path.getsize(log) - 20_000))
            text = written.read().decode(errors="replace")
        lines = text.replace("\r", "\n").splitlines()  # progress bars rewrite their line
        tail = "\n".join(f"    {line}" for line in lines[-TAIL_LINES:]) or "    (no output)"
        raise RunError(f"ended with {how}; the end of {log}:\n{tail}")


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """While the block runs, SIGTERM and SIGHUP end it as Ctrl-C does, so that no training is left behind."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {}
    for sign in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(sign) is not signal.SIG_IGN:  # nohup
            before[sign] = signal.signal(sign, interrupt)
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
