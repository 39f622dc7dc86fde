"""One run in several processes: who does what, adding up gradients, and ending together when one fails.

Tensors (gradients, weights) go through the default process group, which fits the device. Everything else (rows of
results, decisions, failures) goes through `exchange`, on a gloo group of our own: it takes plain objects from any
device and does not time out while another process encodes images.

A process that fails says so in place of its part of the next `exchange`, so the others raise its message there instead
of waiting for it. That works as long as all processes call `exchange` and its users in the same order, inside `guard`.

Without an initialised process group everything here acts for one process.
"""

import atexit
import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llava_patch.core.errors import LlavaPatchError

T = TypeVar("T")
PATIENCE = datetime.timedelta(hours=24)  # encoding many images may take hours before the others are needed

_control: Any = None
_world_of_control: Any = None
_guarded = False


class PeerError(LlavaPatchError):
    """Another process of the same run failed; its message is in this one."""


def world() -> int:
    """Number of processes that take part."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0..world-1."""
    return dist.get_rank() if world() > 1 else 0


def share(count: int) -> range:
    """This process's part of `count` things: ranges that follow each other by rank; empty when there are too few."""
    size, own = world(), rank()
    return range(count * own // size, count * (own + 1) // size)


def gather_rows(rows: list[T]) -> list[T]:
    """The rows (plain values or CPU tensors) of all processes in the order of their ranks: of `share`s all of them."""
    return [row for part in exchange(rows) for row in part]


def exchange(value: T, failure: str | None = None) -> list[T]:
    """One value of every process, in the order of their ranks, on every process; PeerError: another one failed."""
    if world() == 1:
        return [value]
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, (value, failure), group=_control_group())
    for number, (_, message) in enumerate(parts):
        if failure is None and message is not None:
            raise PeerError(f"R-Probe ended because process {number} of {world()} failed: {message}")
    return [part for part, _ in parts]


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """End a block, which all processes enter and leave together, on all when it fails on one; once is enough."""
    global _guarded
    if world() == 1 or _guarded:
        yield
        return
    _guarded = True
    try:
        yield
        exchange(None)
    except PeerError:
        raise
    except Exception as error:
        # The others may be gone already; what counts is the error at hand.
        with contextlib.suppress(Exception):
            exchange(None, f"{type(error).__name__}: {error}")
        raise
    finally:
        _guarded = False


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over the processes, in place; all have the same shapes on every process."""
    if world() > 1:
        for work in [dist.all_reduce(tensor, group=_group(tensor), async_op=True) for tensor in tensors]:
            work.wait()


def from_rank_0(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by that of rank 0, in place."""
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0, group=_group(tensor))


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, for the time of the block; alone, or already joined: nothing to do."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not dist.is_available() or dist.is_initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        _end_control_group()
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this is rank 0, or will be: also before the processes have joined and after they have parted."""
    return int(os.environ.get("RANK", "0")) == 0 if world() == 1 else rank() == 0


def local_rank() -> int:
    """Number of this process on its machine: which of the machine's devices it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _group(tensor: Tensor) -> Any:
    return _control_group() if tensor.device.type == "cpu" else None


def _control_group() -> Any:
    """The gloo group, made by all processes at their first use of it."""
    global _control, _world_of_control
    if _control is None or _world_of_control is not dist.group.WORLD:
        _world_of_control = dist.group.WORLD
        _control = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _control


@atexit.register  # for a process group that a training script or lmms-eval made, and leaves to the interpreter
def _end_control_group() -> None:
    """Let the gloo group go while the interpreter runs: one whose threads it meets at its end can abort the process."""
    global _control, _world_of_control
    if _control is not None and dist.is_initialized() and _world_of_control is dist.group.WORLD:
        dist.destroy_process_group(_control)
    _control = _world_of_control = None
