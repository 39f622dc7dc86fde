"""Lets a measurement follow on which positions the layers of a routed or pruned decoder run.

A layer's hidden states do not say which positions they are of, and its keys may be of more positions than its queries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from torch import Tensor

from llava_patch.routing.streams import Stream

Watcher = Callable[[int, Tensor, Tensor], None]
_watcher: ContextVar[Watcher | None] = ContextVar("llava_patch_watcher", default=None)


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Call `watcher(layer, asking, giving)` before every decoder layer that routing runs inside the block.

    `asking` are the positions whose hidden states the layer gets, `giving` those whose keys they look at: int64
    [batch, n] places in the conversation, in the order of the tensors. The side branch's layers are not told of.
    """
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def tell(layer: int, asking: Stream, giving: Stream, last: int | None = None) -> None:
    """Tell the watcher, if there is one.

    Args:
        layer: its number.
        asking: the stream whose new positions ask.
        giving: the stream whose positions give keys.
        last: only so many of the last new positions ask; None: all.
    """
    watcher = _watcher.get()
    if watcher is not None:
        index = asking.new.index
        watcher(layer, index if last is None else index[:, -last:], giving.keys.index)
