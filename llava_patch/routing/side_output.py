"""Where a measurement looks at the side branch's output on its way into the deep layers; usually nobody does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor


class Watch(Protocol):
    """What looks on; each method may hand on an alias of what it gets."""

    def output(self, states: Tensor) -> Tensor:
        """The side branch's output, [batch, image positions, hidden], as it leaves the branch."""

    def read(self, states: Tensor, layer: int) -> Tensor:
        """The same as a layer is about to read it; layer L stands for the decoder's end, which no layer changes."""


_watch: ContextVar[Watch | None] = ContextVar("llava_patch_side_output", default=None)


@contextlib.contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Look on inside the block."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def output(states: Tensor) -> Tensor:
    """Called by the deep layers with the side branch's output."""
    watch = _watch.get()
    return states if watch is None else watch.output(states)


def read(states: Tensor, layer: int) -> Tensor:
    """Called by the deep layers where a layer reads it."""
    watch = _watch.get()
    return states if watch is None else watch.read(states, layer)
