"""Timing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch


class Clock:
    """Milliseconds of a piece of work; CUDA events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        """Time work on a device."""
        self.cuda = device.type == "cuda"

    def __enter__(self) -> "Clock":
        """Start."""
        if self.cuda:
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            self.start.record()
        else:
            self.began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop."""
        if self.cuda:
            self.end.record()
            torch.cuda.synchronize()
            self.ms = self.start.elapsed_time(self.end)
        else:
            self.ms = 1000 * (time.perf_counter() - self.began)


def median(values: Sequence[float]) -> float | None:
    """Median; None of nothing."""
    return statistics.median(values) if values else None
