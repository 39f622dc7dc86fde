"""The host's work: operations and processor time of prefill and decode where arithmetic is nothing.

On a GPU a prompt at batch 1 waits for the host that launches its kernels: a method that saves arithmetic and adds
launches saves nothing there. Processor time at a width of 64 measures that, and is steady on machines that time is not;
the number of operations does not vary at all.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llava_patch.core import files
from llava_patch.hosts.sizes import Shape
from llava_patch.tools.bench.methods import Method, decode, make_inputs

SHAPE = Shape(32, 64, 128, 2, 256, 18)
"""7B's depth at a width of which arithmetic is next to nothing."""
IMAGE = 56
"""Pixels of the image's side: 16 tokens."""
TEXT, TOKENS = 16, 16
"""Text tokens of the prompt, and tokens that are decoded behind it."""


@dataclass
class Row:
    """One method's measurements."""

    method: str
    prefill_ms: list[float] = field(default_factory=list)  # each round's processor time, one thread, milliseconds
    decode_ms: list[float] = field(default_factory=list)  # the same of a decoded token
    prefill_operations: int = 0  # that compute or copy something: on a GPU mostly a kernel each
    decode_operations: int = 0  # of one token


class Operations(TorchDispatchMode):
    """Counts torch's operations, views apart: `with Operations() as found: ...; found.count`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count it, and let it run."""
        aliases = [result.alias_info for result in function._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliases) or "_unsafe_view" in str(function)
        self.count += not view
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Threads that wait for work use processor time as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def measure(model: Any, rows: Sequence[Method], *, repeats: int = 14, progress: bool = True) -> list[Row]:
    """Measure every method, one after the other in each round, after a warm-up round.

    Args:
        model: of `methods.build` with `SHAPE` and `IMAGE`.
        rows: the stock model first.
        repeats: rounds.
        progress: show a progress bar on stderr.
    """
    inputs = make_inputs(model, TEXT, 1, (IMAGE // 14) ** 2, IMAGE)
    results = [Row(method.name) for method in rows]
    steps = [(number, i) for number in range(repeats + 1) for i in range(len(rows))]
    with one_thread():
        for number, i in files.track(steps, "host time", progress):
            with rows[i].applied(model):
                model(**inputs, use_cache=True, logits_to_keep=1)  # what is made once for a patch is made here
                if not number:
                    _count(model, inputs, results[i])
                    continue
                began = time.process_time()
                cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
                prefilled = time.process_time()
                decode(model, inputs, cache, TOKENS)
                ended = time.process_time()
            results[i].prefill_ms.append(1000 * (prefilled - began))
            results[i].decode_ms.append(1000 * (ended - prefilled) / TOKENS)
    return results


def _count(model: Any, inputs: dict[str, Any], row: Row) -> None:
    with Operations() as prefill:
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    with Operations() as one:
        decode(model, inputs, cache, 1)
    with Operations() as two:
        decode(model, inputs, cache, 2)
    # The difference leaves out what the first of a row makes once, and what the loop itself prepares.
    row.prefill_operations, row.decode_operations = prefill.count, two.count - one.count


def least(row: Row, base: Row, what: str) -> float:
    """The least of a method's times over the least of the base's: what disturbs a process only adds to it."""
    return min(getattr(row, what)) / min(getattr(base, what))
