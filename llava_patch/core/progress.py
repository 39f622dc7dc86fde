"""Progress bars that stay readable in a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 15.0  # between two lines where nobody watches


def progress_bar(total: int, label: str, shown: bool) -> Any:
    """A tqdm bar on standard error, rarely redrawn where that is no terminal.

    Args:
        total: number of updates to come.
        label: what is counted.
        shown: False: a bar that stays silent.
    """
    watched = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=f"R-Probe: {label}",
        disable=not shown,
        mininterval=0.5 if watched else LOG_SECONDS,
        dynamic_ncols=watched,
    )
