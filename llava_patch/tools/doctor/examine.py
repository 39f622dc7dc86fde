"""All of the doctor's checks, in the order in which they are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llava_patch.core.version import __version__
from llava_patch.tools.doctor import NOTE, PROBLEM, Row, configured, machine, measured, software


def examine(checkpoint: str = "", gin_file: Sequence[str] = (), gin_param: Sequence[str] = ()) -> list[Row]:
    """Look at everything."""
    rows = [*software.check_packages(), *measured.check_measured()]
    broken = software.check_torch()
    if broken is not None:
        return [*rows, broken]
    hosts = software.check_hosts()
    hook = software.check_hook()
    asked, error = configured.read(gin_file, gin_param)
    rows += [_supported(asked is not None or error is not None), software.check_torchvision()]
    rows += [*hosts, *measured.check_imports(), *software.check_attention(), hook]
    rows += configured.check_configured(asked, error)
    rows += configured.check_ignored(asked, hook)
    rows += configured.check_deepspeed()
    rows += [*machine.check_device(), *machine.check_memory(), machine.check_disk()]
    if checkpoint:
        from llava_patch.tools.doctor.subject import check_checkpoint

        rows += check_checkpoint(checkpoint, asked, {row.what.removeprefix("host "): row for row in hosts})
    return rows


def _supported(asked: bool) -> Row:
    """Whether these versions can be patched; where LLaVA's own pins are installed, that need not be wanted."""
    from llava_patch.hosts.compat import unsupported

    try:
        reason = unsupported()
    except ImportError as error:  # no transformers
        reason = str(error)
    if reason is None:
        return Row("supported versions", "yes")
    stack, _ = measured.lock_of(measured.installed("transformers"))
    if stack == "main" or asked:
        return Row("supported versions", "no", PROBLEM, reason)
    found = f"no, these are {stack}.txt of scripts/locks: training and evaluation work, as without llava_patch"
    return Row("supported versions", found, NOTE, "to patch, use another environment: scripts/locks/main.txt is one")


def summary(rows: Sequence[Row]) -> str:
    """The outcome in one line."""
    problems, notes = (sum(row.state == state for row in rows) for state in (PROBLEM, NOTE))
    if problems:
        return f"{problems} problem{'s' * (problems != 1)}: something above cannot work; {notes} to note"
    return f"nothing in the way; {notes} to note" if notes else "all well"


def to_json(rows: Sequence[Row]) -> str:
    """For machines: format 1, which only grows."""
    values: dict[str, Any] = {
        "format": 1,
        "llava_patch": __version__,
        "problems": sum(row.state == PROBLEM for row in rows),
        "rows": [vars(row) for row in rows],
    }
    return json.dumps(values, indent=1)
